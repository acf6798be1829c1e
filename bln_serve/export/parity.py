"""Keras against SavedModel against ONNX, number by number, on requests as a client would send them.

    answers         each case of `samples`, on several batches
    together        several mini-batches in one run against each alone
    row coupling    what the probe sees against what was proved
    slots           more rows than slots get no answer
    each layer      every BLN layer by itself where rows hardly differ, which a whole model may not show

The requests and Keras's answers become the artifact's samples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from bln_serve.artifact import Sample
from bln_serve.errors import RunError
from bln_serve.export import probe, samples
from bln_serve.export.samples import SEED, Case, Spread, draw
from bln_serve.export.saved_model import Callee, Serve
from bln_serve.signature import Arrays, TensorSpec, rows_of
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling
from bln_serve.verification import Check, Tolerance, VerificationReport, compare_all

_TOGETHER = 3


@dataclass(frozen=True)
class Engine:
    """What answers in Keras's place.

    Attributes:
        name: for the report.
        serve: takes rows, and of how many mini-batches they are.
        takes_several: whether that may be more than one.
    """

    name: str
    serve: Serve
    takes_several: bool


@dataclass(frozen=True)
class Subject:
    """What is to be verified.

    Attributes:
        callee: the Keras model, whose layers have their export policies applied.
        layers: its BLN layers.
        rule: how its rows may be cut; None where they are independent.
        proved: its row coupling, as proved on the graph.
        tolerance: how far an answer may be off.
    """

    callee: Callee
    layers: tuple[LayerStatistics, ...]
    rule: MiniBatchRule | None
    proved: RowCoupling
    tolerance: Tolerance

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """The inputs."""
        return self.callee.signature.inputs

    @property
    def rows(self) -> int:
        """The rows of one mini-batch: the model's default, or what stands for it."""
        if self.rule:
            return self.rule.default_rows
        return max((layer.m for layer in self.layers), default=samples.ROWS_WITHOUT_BLN)

    @property
    def slots(self) -> int | None:
        """The most rows of a mini-batch, if there is a limit."""
        return self.rule.max_rows if self.rule else None

    @property
    def fewest(self) -> int:
        """The fewest rows of a mini-batch."""
        return self.rule.min_rows if self.rule else 1


@dataclass(frozen=True)
class Parity:
    """What was found.

    Attributes:
        report: the checks.
        samples: the requests with Keras's answers.
        sensitivity: as `samples.Batches` says.
        notes: what else was seen, a sentence each.
    """

    report: VerificationReport
    samples: tuple[Sample, ...]
    sensitivity: float
    notes: tuple[str, ...]


def verify(subject: Subject, engines: Sequence[Engine]) -> Parity:
    """Compare every engine with Keras, and with itself.

    Raises:
        UnsupportedModelError: Keras's own answers are not finite.
    """
    batches = samples.choose(subject.callee, sorted({subject.fewest, subject.rows}), subject.tolerance)
    checks: list[Check] = []
    kept: list[Sample] = []
    for case in samples.cases(subject.rule, subject.rows, [layer.m for layer in subject.layers]):
        requests = _requests(subject.specs, case.rows, batches.spreads)
        answers = samples.keras_answers(subject.callee, requests, min(case.size or case.rows, case.rows))
        samples.require_finite(answers)
        asked = list(zip(requests, answers, strict=True))
        kept += [Sample(request, answer, case.mini_batch_rows) for request, answer in asked]
        checks += [check for engine in engines for check in _answers(engine, case, asked, subject.tolerance)]
    notes: list[str] = []
    for engine in engines:
        checks += _together(engine, subject, batches.spreads[0])
        coupled, seen = _row_coupling(engine, subject, batches.spreads[0])
        checks += coupled
        notes += seen
        checks += _slots(engine, subject)
    return Parity(VerificationReport(tuple(checks)), tuple(kept), batches.sensitivity, tuple(notes))


def _requests(specs: Sequence[TensorSpec], rows: int, spreads: Sequence[Spread]) -> list[Arrays]:
    return [
        draw(specs, rows, np.random.default_rng([SEED, rows, index]), spread) for index, spread in enumerate(spreads)
    ]


def _answers(
    engine: Engine, case: Case, asked: Sequence[tuple[Arrays, Arrays]], tolerance: Tolerance
) -> Iterable[Check]:
    label = f"{engine.name} = Keras, {case.describe()}"
    size = case.size or case.rows
    return _worst_of_each(
        check
        for request, answer in asked
        for check in compare_all(label, answer, _in_mini_batches(engine, request, size), tolerance)
    )


def _in_mini_batches(engine: Engine, request: Arrays, size: int) -> Arrays:
    parts = [
        engine.serve({name: array[start : start + size] for name, array in request.items()}, 1)
        for start in range(0, rows_of(request), size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _worst_of_each(checks: Iterable[Check]) -> list[Check]:
    """Keep the worst of all batches for each name."""
    worst: dict[str, Check] = {}
    for check in checks:
        held = worst.get(check.name)
        if held is None or check.difference * held.limit > held.difference * check.limit or not check.passed:
            worst[check.name] = check
    return list(worst.values())


def _together(engine: Engine, subject: Subject, spread: Spread) -> Iterable[Check]:
    """Compare mini-batches side by side in one run with each alone, and rows together with each alone."""
    checks: list[Check] = []
    if subject.rule is None:
        (request,) = _requests(subject.specs, subject.rows, [spread])
        alone = _in_mini_batches(engine, request, 1)
        label = f"{engine.name}: {subject.rows} rows together = each alone"
        checks += compare_all(label, alone, engine.serve(request, 1), subject.tolerance)
    if engine.takes_several:
        for size in sorted({subject.fewest, subject.rows}):
            (request,) = _requests(subject.specs, _TOGETHER * size, [spread])
            alone = _in_mini_batches(engine, request, size)
            label = f"{engine.name}: {_TOGETHER} mini-batches of {size} in one run = each alone"
            checks += compare_all(label, alone, engine.serve(request, _TOGETHER), subject.tolerance)
    return checks


def _row_coupling(engine: Engine, subject: Subject, spread: Spread) -> tuple[Iterable[Check], Iterable[str]]:
    """Check that the probe sees no more than was proved; say so where it sees less."""
    rows = max(subject.rows, subject.fewest + 1)
    rows = min(rows, subject.slots or rows)
    request, strangers = _requests(subject.specs, rows, [spread, spread])
    seen = probe.observe(engine.name, lambda inputs: engine.serve(inputs, 1), request, strangers, subject.tolerance)
    checks = _worst_of_each(seen.forbidden(subject.proved))
    if checks or subject.proved is seen.row_coupling:
        return checks, ()
    return (), (
        f"{engine.name}: the rows of {rows} random ones showed {seen.row_coupling} coupling alone; that it is "
        f"{subject.proved} was proved on the graph and holds.",
    )


def _slots(engine: Engine, subject: Subject) -> Iterable[Check]:
    """Check that a mini-batch with more rows than slots gets no answer."""
    if subject.slots is None:
        return ()
    (request,) = _requests(subject.specs, subject.slots + 1, [samples.SPREADS[0]])
    label = f"{engine.name} refuses {subject.slots + 1} rows in one mini-batch"
    try:
        engine.serve(request, 1)
    except (RunError, tf.errors.InvalidArgumentError):
        return (Check(label, 0.0, 0.0, 0.0),)
    return (Check(label, float("inf"), 0.0, 0.0, "it answered"),)
