"""Operators of other domains: our own, and the commoner ones of com.microsoft."""

from collections.abc import Sequence

import onnx

from bln_serve.export.coupling import elementwise, networks, products, quantization
from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, aligned
from bln_serve.export.coupling.sizes import ONE, Size, product
from bln_serve.export.coupling.states import Dependence, UnprovedError
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, EMBEDDING, RECURRENT, TABLES
from bln_serve.statistics import LayerStatistics, RowCoupling

_DEPENDENCE = {
    RowCoupling.INDEPENDENT: Dependence.NOTHING,
    RowCoupling.POSITIONAL: Dependence.SLOT,
    RowCoupling.MINI_BATCH: Dependence.OTHER_ROWS,
}


def layer_of(call: NodeCall) -> LayerStatistics:
    """Return what a marked node says of its layer; that its slots are pooled, its feature tables alone can show."""
    name = call.attributes.get("layer") or call.node.name
    tables = [call.given(1 + TABLES.index(statistic)) for statistic in ("feature_mean", "feature_var")]
    pooled = all(table is not None and table.sizes[0] == ONE for table in tables)
    return LayerStatistics(str(name), str(call.attributes["policy"]), int(call.attributes["m"]), pooled=pooled)


def _batch_layer_normalization(call: NodeCall) -> Sequence[Answer]:
    """Rows stay on axis 0, and are coupled as the layer's policy says.

    Where a row makes several entries of axis 0, slots are theirs, and still couple by place.
    """
    x = call.input(0)
    call.rows_only_in(0)
    if x.axis != 0:
        raise UnprovedError("expects its rows on axis 0")
    layer = layer_of(call)
    return [Answer(0, x.fold, x.sizes, _DEPENDENCE[layer.row_coupling], layer.reason)]


def _recurrent(call: NodeCall) -> Sequence[Answer]:
    """A whole recurrent layer: y, h[, c] from x[, h0[, c0]], W, R, B.

    x and y are (rows, time, ...), states (rows, ...), and R (directions, gates * units, units).
    """
    x, *states = call.inputs[:-3]
    if x is None or x.axis != 0:
        raise UnprovedError("expects its rows on axis 0")
    call.rows_only_in(*range(1 + len(states)))
    dependence = Dependence.NOTHING
    for state in states:
        if state is None or (state.axis, state.fold) != (0, x.fold):
            if state is None or not state.is_constant:
                raise UnprovedError("takes a state whose rows lie along another axis")
            dependence = Dependence.SLOT
    recurrent = call.input(len(call.inputs) - 2)
    width = product([recurrent.sizes[0], recurrent.sizes[-1]]) if recurrent.rank == 3 else None
    shapes = [(*x.sizes[:2], width), *[(x.sizes[0], width)] * (len(call.outputs) - 1)]
    return [Answer(0, x.fold, dims, dependence, "starts from a constant state by slot") for dims in shapes]


def _embedding(call: NodeCall) -> Sequence[Answer]:
    """A look-up in a table, which is mostly missing from the graph: the node says how wide it is."""
    ids, table, width = call.input(0), call.given(1), call.attributes.get("output_dim")
    call.rows_only_in(0)
    features = table.sizes[-1] if table is not None else None if width is None else Size(int(width))
    dtype = onnx.TensorProto.FLOAT if table is None else table.dtype
    return [Answer(ids.axis, ids.fold, (*ids.sizes, features), dtype=dtype)]


def _skip_normalization(call: NodeCall) -> Sequence[Answer]:
    """The sum of input and skip, normalised over the last axis."""
    x = call.input(0)
    if x.axis is None or x.axis == x.rank - 1:
        raise UnprovedError("normalises over the row axis")
    answer = aligned(call.present).answer(x.rank, x.sizes)
    statistics = aligned(call.present).answer(x.rank, (*x.sizes[:-1], ONE))
    return [answer, statistics, statistics, answer][: len(call.outputs)]


def _same_shape(call: NodeCall) -> Sequence[Answer]:
    """A bias along the last axis, and then entry by entry."""
    x = call.input(0)
    return [aligned(call.present).answer(x.rank, x.sizes)]


def _attention(call: NodeCall) -> Sequence[Answer]:
    """Attention: input, weights, bias, mask. Only masks that hold rows on axis 0 are followed."""
    x = call.input(0)
    call.rows_only_in(0, 3)
    mask = call.given(3)
    if x.axis != 0 or any(call.inputs[4:]) or len(call.outputs) > 1:
        raise UnprovedError("has inputs that are not followed")
    if mask is not None and (mask.axis, mask.fold) != (0, x.fold):
        raise UnprovedError("takes a mask without rows on axis 0")
    return [Answer(0, x.fold, (*x.sizes[:-1], None))]


def _multi_head_attention(call: NodeCall) -> Sequence[Answer]:
    """MultiHeadAttention: query, key, value, bias, key padding mask, attention bias."""
    x = call.input(0)
    if x.axis != 0 or len(call.inputs) > 6 or len(call.outputs) > 1:
        raise UnprovedError("has inputs that are not followed")
    call.rows_only_in(0, 1, 2, 4, 5)
    for index, tensor in enumerate(call.inputs):
        own = tensor is None or (tensor.axis, tensor.fold) == (0, x.fold)
        if not own and index != 3 and not (index == 5 and tensor is not None and tensor.sizes[0] == ONE):
            raise UnprovedError(f"takes as its input {index} what has no rows on axis 0")
    return [Answer(0, x.fold, (*x.sizes[:2], None) if x.rank == 3 else None)]


OWN: Rules = {
    BATCH_LAYER_NORMALIZATION: _batch_layer_normalization,
    EMBEDDING: _embedding,
    RECURRENT: _recurrent,
}

MICROSOFT: Rules = {
    **quantization.MICROSOFT,
    "Attention": _attention,
    "BiasGelu": _same_shape,
    "FastGelu": _same_shape,
    "FusedConv": networks.with_rows_first(3),
    "FusedGemm": products.gemm,
    "FusedMatMul": products.fused_product,
    "Gelu": elementwise.of_one,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": elementwise.of_one,
    "SkipLayerNormalization": _skip_normalization,
    "SkipSimplifiedLayerNormalization": _skip_normalization,
}
