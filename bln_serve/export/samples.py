"""The requests that an export is verified with: how many rows, cut how, and with what values.

What a wrong constant moves depends on the inputs, so there are several batches. And what float32 can tell apart depends
on them too: where rows hardly differ from each other, a live variance near epsilon raises the rounding of everything
before it by up to 1 / sqrt(epsilon), some 30 times a layer, and no two engines agree to the last digits, Keras
and Keras under XLA among them. Such a batch shows the model's condition and not the export's faults. So each batch's
*sensitivity* is measured with Keras alone: how far its answers move when every weight moves by one unit in its last
place. A batch whose sensitivity is not well below the tolerance is drawn wider; what was found is recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.saved_model import Callee, require_rows
from bln_serve.signature import Arrays, TensorSpec, rows_of
from bln_serve.statistics import MiniBatchRule
from bln_serve.verification import Tolerance, compare

SEED = 2209_08898
ROWS_WITHOUT_BLN = 8
# How often as far as the answers' own sensitivity the engines' answers lie apart at most; 0.9 to 2.3 were measured.
MARGIN = 4
_WIDENINGS = 4


@dataclass(frozen=True)
class Spread:
    """How the float inputs of a batch are drawn: normally, with this mean and standard deviation.

    For an input with a typical range, in units of a quarter of it about its middle.
    """

    mean: float
    deviation: float

    def wider(self) -> "Spread":
        """Return the spread four times as wide, about the same mean: only then do rows differ more for their size."""
        return Spread(self.mean, 4 * self.deviation)


# Standardised, wider, and far from zero as raw pixels are: this one not any more where it has to be drawn wider.
SPREADS = (Spread(0.0, 1.0), Spread(0.5, 2.0), Spread(8.0, 4.0))


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


def draw(specs: Sequence[TensorSpec], rows: int, generator: np.random.Generator, spread: Spread = SPREADS[0]) -> Arrays:
    """Draw one request: normal floats, integers within their range (0 and 1 where none is known), random booleans.

    Floats with a value range, which index an embedding, are drawn as integers.
    """
    return {spec.name: _values(spec, rows, generator, spread) for spec in specs}


def _values(spec: TensorSpec, rows: int, generator: np.random.Generator, spread: Spread) -> Any:
    shape = (rows, *(size or 1 for size in spec.shape[1:]))
    if _is_spread(spec):
        values = generator.normal(spread.mean, spread.deviation, shape)
        if spec.typical_range is None:
            return values.astype(spec.dtype)
        low, high = spec.typical_range
        return ((low + high) / 2 + (high - low) / 4 * values).astype(spec.dtype)
    lowest, highest = spec.value_range or spec.typical_range or (0, 1)
    return generator.integers(int(lowest), int(highest), shape, endpoint=True).astype(spec.dtype)


@dataclass(frozen=True)
class Batches:
    """The batches that the verification draws.

    Attributes:
        spreads: of each.
        sensitivity: how far Keras's answers to them move, relative to the largest, when each weight moves by one unit
            in its last place; the worst of them. Only float32 weights are moved.
    """

    spreads: tuple[Spread, ...]
    sensitivity: float


def choose(callee: Callee, sizes: Sequence[int], tolerance: Tolerance) -> Batches:
    """Choose how wide each batch is, so that the engines' rounding stays below the tolerance.

    Args:
        callee: the model, whose layers have their export policies applied.
        sizes: the mini-batches' rows to measure at.
        tolerance: of the verification.
    """
    if not any(_is_spread(spec) for spec in callee.signature.inputs):
        return Batches(SPREADS, *_sensitivities(callee, SPREADS[:1], sizes))
    tried: list[list[tuple[Spread, float]]] = [[] for _ in SPREADS]
    undecided = dict(enumerate(SPREADS))
    for _ in range(_WIDENINGS + 1):
        moved = _sensitivities(callee, list(undecided.values()), sizes)
        for (batch, spread), sensitivity in zip(undecided.items(), moved, strict=True):
            tried[batch].append((spread, sensitivity))
        undecided = {
            batch: spread.wider()
            for batch, spread in undecided.items()
            if tried[batch][-1][1] > tolerance.rtol / MARGIN
        }
        if not undecided:
            break
    # Where none is well below, the widest of the best: where activations saturate, the widest of all is the worst.
    best = [min(reversed(each), key=lambda one: one[1]) for each in tried]
    return Batches(tuple(spread for spread, _ in best), max(sensitivity for _, sensitivity in best))


def _is_spread(spec: TensorSpec) -> bool:
    """Whether an input's values are drawn by a spread."""
    return np.dtype(spec.dtype).kind == "f" and spec.value_range is None


def _sensitivities(callee: Callee, spreads: Sequence[Spread], sizes: Sequence[int]) -> list[float]:
    """Return for each spread how far Keras's answers move by weights moved in their last place."""

    def answers() -> list[list[Arrays]]:
        return [keras_answers(callee, [request(spread, size) for spread in spreads], size) for size in sizes]

    def request(spread: Spread, size: int) -> Arrays:
        return draw(callee.signature.inputs, size, np.random.default_rng([SEED, size]), spread)

    before = answers()
    with _weights_moved(callee.model):
        after = answers()
    moved = [list(map(_moved, one, other)) for one, other in zip(before, after, strict=True)]
    return [max(of_spread) for of_spread in zip(*moved, strict=True)]


def _moved(before: Arrays, after: Arrays) -> float:
    checks = [compare(name, before[name], after[name], Tolerance()) for name in before]
    return max(check.difference / (check.largest or 1.0) for check in checks)


@contextmanager
def _weights_moved(model: Any) -> Iterator[None]:
    """Move every float32 weight by one unit in its last place, up or down, inside the `with` block."""
    _turn_last_bits(model)
    try:
        yield
    finally:
        _turn_last_bits(model)


def _turn_last_bits(model: Any) -> None:
    # Twice is not at all, also for -0.0 and infinity, so that a table of gigabytes needs no copy to come back to.
    for weight in model.weights:
        if str(weight.dtype) == "float32":
            values = np.asarray(weight.numpy())
            weight.assign((values.view(np.uint32) ^ np.isfinite(values)).view(np.float32))


def keras_answers(callee: Callee, requests: Sequence[Arrays], size: int) -> list[Arrays]:
    """Return what `model.predict(request, batch_size=size)` answers to each request, by the outputs' names.

    Args:
        callee: the model.
        requests: all with the same number of rows.
        size: rows of a mini-batch.

    Raises:
        UnsupportedModelError: Keras refuses a request, or answers with other rows than the inputs'.
    """
    rows = rows_of(requests[0])
    if len(requests) > 1 and rows % size:
        return [answer for request in requests for answer in keras_answers(callee, [request], size)]
    # Whole mini-batches one after the other are what they are alone, and a call of predict takes its time.
    packed = callee.pack([np.concatenate([request[name] for request in requests]) for name in requests[0]])
    try:
        outputs = callee.by_name(callee.model.predict(_mini_batches(packed, size), verbose=0))
    except tf.errors.OpError as error:
        raise UnsupportedModelError(
            f"Expected Keras to answer a request with values that its inputs may have. Received: {_reason(error)}. "
            "Where columns of one input index tables of different lengths, give each an Input of its own."
        ) from error
    for name, output in outputs.items():
        require_rows(name, len(output), rows * len(requests))
    return [
        {name: np.asarray(output)[start : start + rows] for name, output in outputs.items()}
        for start in range(0, rows * len(requests), rows)
    ]


def _mini_batches(arrays: Any, size: int) -> tf.data.Dataset:
    """Return what `predict` makes of arrays and a batch size, without the functions that it traces for it each time."""
    rows = keras.tree.map_structure(_with_float_type, keras.tree.lists_to_tuples(arrays))
    # A tuple by itself would be taken for inputs with targets.
    return tf.data.Dataset.from_tensor_slices((rows,) if isinstance(rows, tuple) else rows).batch(size)


def _with_float_type(array: np.ndarray) -> np.ndarray:
    return array.astype(keras.config.floatx()) if keras.backend.is_float_dtype(array.dtype.name) else array


def _reason(error: tf.errors.OpError) -> str:
    """Return what TensorFlow says was wrong, without where in its own files."""
    lines = [line.strip() for line in error.message.splitlines() if line.strip() and "{{node" not in line]
    return str(lines[-1])


def require_finite(answers: Sequence[Arrays]) -> None:
    """Make sure that there is something to compare with.

    Raises:
        UnsupportedModelError: Keras answered NaN or infinity.
    """
    for name, output in ((name, output) for answer in answers for name, output in answer.items()):
        if not np.isfinite(output.astype(np.float64)).all():
            raise UnsupportedModelError(
                f"Expected Keras to answer normally distributed inputs with finite numbers. Received: NaN or infinity "
                f"in output {name!r}. Nothing can be compared with that: give the model inputs of any value, by "
                "clipping or rescaling inside it."
            )
