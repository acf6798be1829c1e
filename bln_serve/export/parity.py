"""Keras against SavedModel against ONNX, number by number, on requests as a client would send them.

Every comparison is made on several different batches: an operator that silently keeps statistics of its own may agree
with Keras on one, and what a wrong constant moves depends on the inputs. The requests and Keras's answers become the
artifact's samples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bln_serve.artifact import Sample
from bln_serve.errors import RunError, UnsupportedModelError
from bln_serve.export.saved_model import Callee
from bln_serve.runtime import OnnxSession
from bln_serve.signature import Arrays, TensorSpec, rows_of
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling, strongest
from bln_serve.verification import Check, Tolerance, VerificationReport, compare_all

SEED = 2209_08898
# Mean and standard deviation of each batch's float inputs: standardised, wider, and far from zero as raw pixels are.
_BATCHES = ((0.0, 1.0), (0.5, 2.0), (8.0, 4.0))
_ROWS_WITHOUT_BLN = 8

Predict = Callable[[Arrays], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Case:
    """A request: how many rows, and how they are cut.

    Attributes:
        rows: of the request.
        size: rows of each mini-batch; None where rows are independent.
        mini_batch_rows: as the request names it; None for the default.
    """

    rows: int
    size: int | None
    mini_batch_rows: int | None = None

    def describe(self) -> str:
        """Return the case in words."""
        if self.size is None or self.size >= self.rows:
            return f"{self.rows} {'row' if self.rows == 1 else 'rows'}"
        return f"{self.rows} rows in mini-batches of {self.size}"


@dataclass(frozen=True)
class Parity:
    """What was found, and the requests with Keras's answers."""

    report: VerificationReport
    samples: tuple[Sample, ...]


def cases(rule: MiniBatchRule | None, size: int, trained: Sequence[int] = ()) -> tuple[Case, ...]:
    """Return the requests to try: the fewest rows, m-1 and m as one mini-batch, m+1 and 3m cut into several.

    Where rows are independent nothing is cut. A number of rows that cannot be cut, as 3 at m = 2 with slots, is left
    out.

    Args:
        rule: how rows may be cut; None where they are independent.
        size: m, or what stands for it.
        trained: every layer's m. One mini-batch of each is tried too where `size` is another, so that all slots are.
    """
    if rule is None:
        return tuple(Case(rows, None) for rows in sorted({1, size - 1, size, size + 1, 3 * size} - {0}))
    whole = sorted(rows for rows in {rule.min_rows, size - 1, size} if rule.min_rows <= rows)
    found = [Case(rows, size) for rows in whole]
    for rows in (size + 1, 3 * size):
        fitting = size if rule.allows(rows, size) else rule.largest_size(rows)
        if fitting:
            found.append(Case(rows, fitting, None if fitting == size else fitting))
    largest = {min(m, rule.max_rows or m) for m in trained} - {size}
    return tuple(found) + tuple(Case(m, m, m) for m in sorted(largest) if rule.allows(m, m))


def verify(
    callee: Callee,
    layers: Sequence[LayerStatistics],
    rule: MiniBatchRule | None,
    engines: Mapping[str, Predict],
    tolerance: Tolerance,
) -> Parity:
    """Compare every engine with Keras.

    Args:
        callee: the model, whose layers have their export policies applied.
        layers: its BLN layers.
        rule: how its rows may be cut; None where they are independent.
        engines: by name, what takes the rows of one mini-batch and answers.
        tolerance: how far an answer may be off.

    Returns:
        The checks, and the samples for the artifact.
    """
    checks: list[Check] = []
    samples: list[Sample] = []
    rows = rule.default_rows if rule else max((layer.m for layer in layers), default=_ROWS_WITHOUT_BLN)
    for case in cases(rule, rows, [layer.m for layer in layers]):
        requests = [
            draw(callee.signature.inputs, case.rows, np.random.default_rng([SEED, case.rows, index]), *spread)
            for index, spread in enumerate(_BATCHES)
        ]
        answers = [_keras(callee, request, case.size or case.rows) for request in requests]
        _require_finite(answers)
        samples += [
            Sample(request, answer, case.mini_batch_rows) for request, answer in zip(requests, answers, strict=True)
        ]
        for name, predict in engines.items():
            label = f"{name} = Keras, {case.describe()}"
            found = [
                check
                for request, answer in zip(requests, answers, strict=True)
                for check in compare_all(label, answer, _in_mini_batches(predict, request, case), tolerance)
            ]
            checks += _worst_of_each(found)
    for name, predict in engines.items():
        checks += _coupling_checks(name, predict, callee.signature.inputs, layers, tolerance)
    return Parity(VerificationReport(tuple(checks)), tuple(samples))


def draw(
    specs: Sequence[TensorSpec], rows: int, generator: np.random.Generator, mean: float = 0.0, deviation: float = 1.0
) -> Arrays:
    """Draw one request: normal floats, integers within their range (0 and 1 where none is known), random booleans.

    Floats with a range, which index an embedding, are drawn as integers.
    """
    arrays = {}
    for spec in specs:
        shape = (rows, *(size or 1 for size in spec.shape[1:]))
        if np.dtype(spec.dtype).kind == "f" and spec.value_range is None:
            arrays[spec.name] = generator.normal(mean, deviation, shape).astype(spec.dtype)
        else:
            low, high = spec.value_range or (0, 1)
            arrays[spec.name] = generator.integers(low, high, shape, endpoint=True).astype(spec.dtype)
    return arrays


def onnx_engine(session: OnnxSession) -> Predict:
    """Return ONNX Runtime as an engine."""
    return session.run


def saved_model_engine(serve: Callable[..., Mapping[str, Any]]) -> Predict:
    """Return a SavedModel's signature as an engine."""

    def predict(inputs: Arrays) -> Mapping[str, Any]:
        return serve(**{name: tf.constant(array) for name, array in inputs.items()})

    return predict


def _keras(callee: Callee, request: Arrays, size: int) -> Arrays:
    packed = callee.pack(request.values())
    outputs = keras.tree.flatten(callee.model.predict(packed, batch_size=size, verbose=0))
    names = (spec.name for spec in callee.signature.outputs)
    return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}


def _in_mini_batches(predict: Predict, request: Arrays, case: Case) -> Arrays:
    size = case.size or case.rows
    parts = [
        predict({name: array[start : start + size] for name, array in request.items()})
        for start in range(0, rows_of(request), size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _worst_of_each(checks: Sequence[Check]) -> list[Check]:
    """Keep the worst of all batches for each name."""
    worst: dict[str, Check] = {}
    for check in checks:
        held = worst.get(check.name)
        if held is None or check.difference * held.limit > held.difference * check.limit or not check.passed:
            worst[check.name] = check
    return list(worst.values())


def _coupling_checks(
    name: str, predict: Predict, specs: Sequence[TensorSpec], layers: Sequence[LayerStatistics], tolerance: Tolerance
) -> list[Check]:
    """Check what the declared row coupling promises; mini-batch coupling promises nothing of rows."""
    coupling, _ = strongest(layers)
    slots = min((layer.slots for layer in layers if layer.slots), default=None)
    checks: list[Check] = []
    if coupling is RowCoupling.INDEPENDENT:
        rows = max((layer.m for layer in layers), default=_ROWS_WITHOUT_BLN)
        request = draw(specs, rows, np.random.default_rng([SEED, rows]))
        alone = _in_mini_batches(predict, request, Case(rows, 1))
        checks += compare_all(f"{name}: {rows} rows together = each alone", alone, predict(request), tolerance)
    if coupling is RowCoupling.POSITIONAL and slots:
        checks += _among_others(name, predict, specs, slots, tolerance)
    if slots:
        checks.append(_refuses(name, predict, draw(specs, slots + 1, np.random.default_rng(SEED))))
    return checks


def _among_others(
    name: str, predict: Predict, specs: Sequence[TensorSpec], slots: int, tolerance: Tolerance
) -> Iterable[Check]:
    """Check that the middle and the last row keep their answers when every other row of the mini-batch is another."""
    checks: list[Check] = []
    request, others = (draw(specs, slots, np.random.default_rng([SEED, slots, index])) for index in range(2))
    among = predict(request)
    for row in sorted({slots // 2, slots - 1}):
        mixed = {key: array.copy() for key, array in others.items()}
        for key, array in mixed.items():
            array[row] = request[key][row]
        kept = {key: value[row : row + 1] for key, value in predict(mixed).items()}
        before = {key: value[row : row + 1] for key, value in among.items()}
        checks += compare_all(f"{name}: row {row} = among other rows", before, kept, tolerance)
    return checks


def _require_finite(answers: Sequence[Arrays]) -> None:
    for name, output in ((name, output) for answer in answers for name, output in answer.items()):
        if not np.isfinite(output.astype(np.float64)).all():
            raise UnsupportedModelError(
                f"Expected Keras to answer normally distributed inputs with finite numbers. Received: NaN or infinity "
                f"in output {name!r}. Nothing can be compared with that: give the model inputs of any value, by "
                "clipping or rescaling inside it."
            )


def _refuses(name: str, predict: Predict, request: Arrays) -> Check:
    label = f"{name} refuses {rows_of(request)} rows in one mini-batch"
    try:
        predict(request)
    except (RunError, tf.errors.InvalidArgumentError):
        return Check(label, 0.0, 0.0, 0.0)
    return Check(label, float("inf"), 0.0, 0.0, "it answered")
