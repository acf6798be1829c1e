"""Quantised arithmetic. A scale that is found from a whole tensor couples its rows; a stored one does not."""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, coupled, kept, normal
from bln_serve.export.coupling.networks import with_rows_first
from bln_serve.export.coupling.products import product_of
from bln_serve.export.coupling.sizes import ONE, Size
from bln_serve.export.coupling.states import Tensor, UnprovedError


def _is_single(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.axis is None and (tensor.rank == 0 or tensor.sizes == (ONE,)))


def _linear(call: NodeCall) -> Sequence[Answer]:
    """QuantizeLinear, DequantizeLinear: one scale, or one for each entry of an axis other than the rows'."""
    x = call.input(0)
    call.rows_only_in(0)
    if call.attributes.get("block_size", 0):
        raise UnprovedError("scales by blocks")
    scales = call.present[1:]
    by_place = [each for each in scales if not _is_single(each)]
    at_rows = by_place and normal(call.attributes.get("axis", 1), x.rank) == x.axis
    if at_rows or any(each.rank != 1 for each in by_place):
        raise UnprovedError("scales each place of the row axis by its own")
    return [kept(x, x.sizes)]


def _dynamic(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    reason = "finds one scale over all rows"
    return [coupled(reason, x.axis, x.fold, x.sizes), coupled(reason, dims=()), coupled(reason, dims=())]


def _product(call: NodeCall) -> Sequence[Answer]:
    """MatMulInteger(a, b, a zero point, b zero point)."""
    call.rows_only_in(0, 1)
    _require_single(call, 2)
    return [product_of(call.input(0), call.input(1))]


def _scaled_product(call: NodeCall) -> Sequence[Answer]:
    """QLinearMatMul(a, scale, zero point, b, scale, zero point, y scale, y zero point)."""
    call.rows_only_in(0, 3)
    _require_single(call, 1, 2, 6, 7)
    if call.input(3).axis is not None:
        _require_single(call, 4, 5)
    return [product_of(call.input(0), call.input(3))]


def _require_single(call: NodeCall, *indices: int) -> None:
    if not all(_is_single(call.given(index)) for index in indices):
        raise UnprovedError("scales each place of the row axis by its own")


def _to_float_product(call: NodeCall) -> Sequence[Answer]:
    """MatMulIntegerToFloat(a, b, a scale, b scale, zero points, bias) of com.microsoft, with a constant b."""
    call.rows_only_in(0)
    _require_single(call, 2, 4)
    a = call.input(0)
    if a.axis == a.rank - 2 and any(each.rank > 1 for each in call.present[6:]):
        raise UnprovedError("adds a bias by slot")
    return [product_of(a, call.input(1))]


def dynamic_product(call: NodeCall) -> Sequence[Answer]:
    """DynamicQuantizeMatMul of com.microsoft: the scale of a is found over all of it."""
    call.rows_only_in(0)
    answer = product_of(call.input(0), call.input(1))
    return [coupled("finds one scale over all rows", answer.axis, answer.fold, answer.dims)]


def nbits_product(call: NodeCall) -> Sequence[Answer]:
    """MatMulNBits of com.microsoft: the last axis of a is multiplied by a stored matrix of K by N."""
    a = call.input(0)
    call.rows_only_in(0)
    if a.axis is None or a.axis == a.rank - 1:
        raise UnprovedError("sums over the row axis")
    return [kept(a, (*a.sizes[:-1], Size(call.attributes["N"])))]


def _scaled_layer(call: NodeCall) -> Sequence[Answer]:
    """QLinear operators on one tensor with rows on axis 0."""
    return with_rows_first()(call)


def _scaled_entries(call: NodeCall) -> Sequence[Answer]:
    """QLinearSigmoid and QLinearLeakyRelu: entry by entry."""
    call.rows_only_in(0)
    _require_single(call, 1, 2, 3, 4)
    return [kept(call.input(0), call.input(0).sizes)]


RULES: Rules = {
    "DequantizeLinear": _linear,
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _product,
    "QLinearConv": _scaled_layer,
    "QLinearMatMul": _scaled_product,
    "QuantizeLinear": _linear,
}

MICROSOFT: Rules = {
    "DequantizeLinear": _linear,
    "DynamicQuantizeMatMul": dynamic_product,
    "MatMulIntegerToFloat": _to_float_product,
    "MatMulNBits": nbits_product,
    "QLinearConv": _scaled_layer,
    "QLinearLeakyRelu": _scaled_entries,
    "QLinearSigmoid": _scaled_entries,
    "QuantizeLinear": _linear,
}
