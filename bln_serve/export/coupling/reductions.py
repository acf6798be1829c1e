"""Operators that work along an axis: over the rows' own axis they couple, along every other they do not."""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, aligned, coupled, kept, normal
from bln_serve.export.coupling.sizes import ONE
from bln_serve.export.coupling.states import Tensor, UnprovedError

_REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]
# Until then a softmax saw a matrix: everything from its axis on was one vector.
_SOFTMAX_OF_ONE_AXIS_SINCE = 13


def _reduce(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    axes = call.axes(x.rank)
    call.rows_only_in(0)
    if not axes:
        if call.attributes.get("noop_with_empty_axes", 0):
            return [kept(x, x.sizes)]
        axes = list(range(x.rank))
    return [_along(x, axes, keep=bool(call.attributes.get("keepdims", 1)), verb="reduces")]


def _along(x: Tensor, axes: Sequence[int], keep: bool, verb: str) -> Answer:
    """Answer for an operator that makes one entry of some axes."""
    places = range(x.rank)
    dims = tuple(ONE if place in axes else x.sizes[place] for place in places if keep or place not in axes)
    if x.axis is None or x.axis in axes:
        return coupled(f"{verb} the row axis", dims=dims)
    return Answer(x.axis if keep else x.axis - sum(axis < x.axis for axis in axes), x.fold, dims)


def _arg(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    axis = call.axis_attribute(0, x.rank)
    return [_along(x, [axis], keep=bool(call.attributes.get("keepdims", 1)), verb="searches")]


def _same_shape(verb: str, default: int) -> "_Along":
    return _Along(verb, default)


class _Along:
    """The rule of an operator that keeps the shape and works along one axis."""

    def __init__(self, verb: str, default: int) -> None:
        self.verb = verb
        self.default = default

    def __call__(self, call: NodeCall) -> Sequence[Answer]:
        """Answer for all outputs."""
        x = call.input(0)
        call.rows_only_in(0)
        axis = call.axis_attribute(self.default, x.rank)
        dims = [output.dims for output in call.outputs]
        if axis == x.axis:
            return [coupled(f"{self.verb} along the row axis", x.axis, x.fold, x.sizes)]
        return [kept(x, each) for each in dims]


def _softmax(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    flattens = call.version < _SOFTMAX_OF_ONE_AXIS_SINCE
    axis = call.axis_attribute(1 if flattens else -1, x.rank)
    over_rows = x.axis is not None and (axis <= x.axis if flattens else axis == x.axis)
    if over_rows:
        return [coupled("normalises along the row axis", x.axis, x.fold, x.sizes)]
    return [kept(x, x.sizes)]


def _top_k(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    if call.axis_attribute(-1, x.rank) == x.axis:
        raise UnprovedError("sorts along the row axis")
    call.rows_only_in(0)
    return [kept(x, call.dims(index)) for index in range(len(call.outputs))]


def _cumulative(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    call.rows_only_in(0)
    numbers = call.input(1).numbers
    if numbers is None or len(numbers) != 1:
        raise UnprovedError("takes its axis from a computation")
    if normal(numbers[0], x.rank) == x.axis:
        return [coupled("accumulates along the row axis", x.axis, x.fold, x.sizes)]
    return [kept(x, x.sizes)]


def from_axis_on(call: NodeCall) -> Sequence[Answer]:
    """LayerNormalization: everything from its axis on is one group; scale and bias are broadcast onto it."""
    x = call.input(0)
    axis = call.axis_attribute(-1, x.rank)
    if x.axis is None:
        raise UnprovedError("scales by rows what holds none")
    if axis <= x.axis:
        return [coupled("normalises over the row axis", x.axis, x.fold, x.sizes)]
    alignment = aligned(call.present)
    statistics = tuple(size if place < axis else ONE for place, size in enumerate(x.sizes))
    shapes = [x.sizes, *[statistics] * (len(call.outputs) - 1)]
    return [alignment.answer(x.rank, dims) for dims in shapes]


def _mean_variance(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    axes = [normal(axis, x.rank) for axis in call.attributes.get("axes", (0, 2, 3))]
    if x.axis in axes:
        return [coupled("normalises over the row axis", x.axis, x.fold, x.sizes)]
    return [kept(x, x.sizes)]


RULES: Rules = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "CumProd": _cumulative,
    "CumSum": _cumulative,
    "Hardmax": _softmax,
    "LayerNormalization": from_axis_on,
    "LogSoftmax": _softmax,
    "LpNormalization": _same_shape("normalises", -1),
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": from_axis_on,
    "Softmax": _softmax,
    "TopK": _top_k,
}
