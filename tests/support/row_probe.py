"""What ONNX Runtime shows of how a graph's tensors depend on rows, against what is claimed of them.

An oracle that shares no rule with the analysis: it runs the graph on rows, on the same rows in another order, with one
row changed, and on the first rows alone, and compares every tensor of the main graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bln_serve.export.coupling import Tensor, tensors_of
from bln_serve.export.coupling.sizes import ROWS_SYMBOL, Size
from bln_serve.export.coupling.states import Dependence
from bln_serve.statistics import RowCoupling

Arrays = Mapping[str, np.ndarray]


def states(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Return what is claimed of every tensor of the main graph."""
    return dict(tensors_of(model)[1])


class Runner:
    """Runs a graph and returns every tensor that a node of the main graph makes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        exposed = onnx.ModelProto()
        exposed.CopyFrom(model)
        self.names = [name for node in model.graph.node for name in node.output if name]
        del exposed.graph.output[:]
        exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(exposed.SerializeToString(), options)

    def __call__(self, inputs: Arrays) -> dict[str, Any] | None:
        """Return all tensors, or None where the graph cannot take these inputs."""
        try:
            return dict(zip(self.names, self._session.run(self.names, dict(inputs)), strict=True))
        except Exception:  # what ONNX Runtime raises has no common base
            return None


@dataclass(frozen=True)
class Observation:
    """One run on changed rows.

    Attributes:
        rows: how many there were.
        order: which row of the first run each of them is; -1 for one with other values.
        tensors: what came out.
    """

    rows: int
    order: tuple[int, ...]
    tensors: Arrays


def observe(model: onnx.ModelProto, inputs: Arrays, others: Arrays) -> tuple[int, list[Observation]]:
    """Run a graph on rows and on changed rows.

    Args:
        model: the graph.
        inputs: the rows.
        others: as many, with other values.
    """
    run = Runner(model)
    rows = len(next(iter(inputs.values())))
    same = tuple(range(rows))
    orders = [same, tuple(np.roll(same, 1)), same[::-1], *(same[:count] for count in range(1, rows))]
    orders += [tuple(-1 if place == row else place for place in same) for row in same]
    found = []
    for order in orders:
        picked = {name: _pick(values, others[name], order) for name, values in inputs.items()}
        tensors = run(picked)
        if tensors is not None:
            found.append(Observation(len(order), order, tensors))
    return rows, found


def _pick(values: np.ndarray, others: np.ndarray, order: Sequence[int]) -> np.ndarray:
    return np.stack([others[place] if row == -1 else values[row] for place, row in enumerate(order)])


def contradictions(claims: Mapping[str, Tensor], rows: int, found: Sequence[Observation]) -> Iterator[str]:
    """Yield every claim that an observation disproves."""
    whole = [each for each in found if each.order == tuple(range(rows))]
    # A constant as long as the rows is broadcast over a single row, and then the rows are many.
    coupled = any(claim.dependence in (Dependence.SLOT, Dependence.OTHER_ROWS) for claim in claims.values())
    found = [each for each in found if each.rows > 1 or not coupled]
    for name, claim in claims.items():
        for each in found:
            if name not in each.tensors or not isinstance(each.tensors[name], np.ndarray):
                continue
            value = each.tensors[name]
            problem = _shape_problem(claim, value, each.rows)
            if problem is None and whole:
                problem = _value_problem(claim, whole[0].tensors[name], value, rows, each)
            if problem:
                yield f"{name}: claimed {_shown(claim)}, but {problem} for rows {each.order}"


def _shown(claim: Tensor) -> str:
    dims = None if claim.dims is None else [str(size) for size in claim.dims]
    return f"{claim.dependence.name} axis {claim.axis} fold {claim.fold} dims {dims} values {claim.values}"


def _at(size: Size | None, rows: int) -> int | None:
    if size is None or set(size.symbols) - {ROWS_SYMBOL}:
        return None
    return size.factor * rows ** len(size.symbols)


def _shape_problem(claim: Tensor, value: np.ndarray, rows: int) -> str | None:
    if claim.dims is None or claim.is_sequence or _is_beyond_its_slots(claim, value, rows):
        return None
    if len(claim.dims) != value.ndim:
        return f"its shape is {value.shape}"
    for size, length in zip(claim.dims, value.shape, strict=True):
        if (expected := _at(size, rows)) is not None and expected != length:
            return f"its shape is {value.shape}"
    if claim.values is not None:
        for size, entry in zip(claim.values, value.reshape(-1), strict=True):
            if (expected := _at(size, rows)) is not None and expected != entry:
                return f"its values are {value.tolist()}"
    return None


def _is_beyond_its_slots(claim: Tensor, value: np.ndarray, rows: int) -> bool:
    """Whether a constant that is cut to the rows has fewer slots: that claim is made for as many rows as slots."""
    if not claim.may_end_early or claim.axis is None or claim.axis >= value.ndim:
        return False
    return _at(claim.fold, rows) is None or value.shape[claim.axis] < rows * (_at(claim.fold, rows) or 0)


def _value_problem(claim: Tensor, whole: np.ndarray, value: np.ndarray, rows: int, each: Observation) -> str | None:
    if claim.dependence is Dependence.OTHER_ROWS or claim.is_sequence:
        return None
    if claim.dependence is Dependence.ROW_COUNT:
        return None if each.rows != rows or same(whole, value) else "its values differ at the same number of rows"
    if claim.axis is None:
        return None if same(whole, value) else "its values differ"
    if _is_beyond_its_slots(claim, value, each.rows) or _is_beyond_its_slots(claim, whole, rows):
        return None
    before, after = (_by_row(array, claim.axis, count) for array, count in ((whole, rows), (value, each.rows)))
    for place, row in enumerate(each.order):
        moved = claim.dependence is Dependence.SLOT and row != place
        if row != -1 and not moved and not same(before[row], after[place]):
            return f"row {row} differs at place {place}"
    return None


def _by_row(value: np.ndarray, axis: int, rows: int) -> np.ndarray:
    front = np.moveaxis(value, axis, 0)
    return front.reshape(rows, -1)


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays agree to float32 rounding."""
    if first.shape != second.shape:
        return False
    if first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return bool(np.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True))


def observed_coupling(name: str, rows: int, found: Sequence[Observation]) -> RowCoupling:
    """Return what an output was seen to depend on: the weakest coupling that no run contradicts."""
    (whole,) = [each.tensors[name] for each in found if each.order == tuple(range(rows))]
    if all(same(whole, each.tensors[name]) for each in found):
        return RowCoupling.INDEPENDENT
    seen = RowCoupling.INDEPENDENT
    for each in found:
        value = each.tensors[name]
        if whole.ndim == 0 or len(whole) != rows or len(value) != each.rows or value.shape[1:] != whole.shape[1:]:
            return RowCoupling.MINI_BATCH
        for place, row in enumerate(each.order):
            if row == -1 or same(whole[row], value[place]):
                continue
            if row == place:
                return RowCoupling.MINI_BATCH
            seen = RowCoupling.POSITIONAL
    return seen
