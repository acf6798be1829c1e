"""Layers of neural networks: convolution, pooling, normalisation, recurrence, attention, resizing.

These name the axis of their rows themselves: 0, or 1 for recurrent operators in their first layout.
"""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rule, Rules, coupled, kept, row_size
from bln_serve.export.coupling.sizes import ONE
from bln_serve.export.coupling.states import Dependence, Tensor, UnprovedError

# From then on a batch normalisation says by an attribute that it trains; before, by how many outputs it has.
_TRAINING_IS_AN_ATTRIBUTE_SINCE = 14


def with_rows_first(*others: int) -> Rule:
    """Return the rule of an operator that works on each entry of axis 0 of input 0, and of the others named, alone."""

    def rule(call: NodeCall) -> Sequence[Answer]:
        call.rows_only_in(0, *others)
        x = _rows_first(call.input(0))
        for index in others:
            other = call.given(index)
            if other is not None and (other.axis, other.fold) != (0, x.fold):
                raise UnprovedError(f"takes as its input {index} what has no rows on axis 0")
        return [kept(x)]

    return rule


def _rows_first(x: Tensor) -> Tensor:
    if x.axis != 0:
        raise UnprovedError("expects its rows on axis 0")
    return x


_alone = with_rows_first()


def _same_shape(call: NodeCall) -> Sequence[Answer]:
    return [kept(_rows_first(call.input(0)), call.input(0).sizes) for _ in _alone(call)]


def _max_pool(call: NodeCall) -> Sequence[Answer]:
    answers = list(_alone(call))
    if len(call.outputs) > 1:  # places counted through the whole tensor, rows before included
        x = call.input(0)
        answers.append(Answer(x.axis, x.fold, None, Dependence.SLOT, "counts places through all rows"))
    return answers


def _batch_normalization(call: NodeCall) -> Sequence[Answer]:
    x = _rows_first(call.input(0))
    call.rows_only_in(0)
    if call.version >= _TRAINING_IS_AN_ATTRIBUTE_SINCE:
        trains = bool(call.attributes.get("training_mode", 0))
    elif call.version >= 7:
        trains = len([name for name in call.node.output if name]) > 1
    else:
        trains = not call.attributes.get("is_test", 0)
    if trains:
        return [coupled("normalises over the rows: it is in training mode", 0, x.fold, x.sizes), coupled("trains")]
    if call.attributes.get("spatial", 1) == 0:
        raise UnprovedError("normalises each place by itself")
    return [kept(x, x.sizes)]


def _recurrent(call: NodeCall) -> Sequence[Answer]:
    """LSTM, GRU, RNN: x is (time, rows, features), or (rows, time, features) in layout 1; so are states and lengths."""
    x = call.input(0)
    rows_first = bool(call.attributes.get("layout", 0))
    axis = 0 if rows_first else 1
    if x.axis != axis:
        raise UnprovedError(f"expects its rows on axis {axis}")
    expected = {0: axis, 4: 0, 5: axis, **({6: axis} if call.node.op_type == "LSTM" else {})}
    call.rows_only_in(*expected)
    slots = [index for index in expected if index and _by_slot(call.given(index), expected[index], x)]
    dependence = Dependence.SLOT if slots else Dependence.NOTHING
    reason = "starts from a constant state by slot" if slots else ""
    sequence_axis = 0 if rows_first else 2
    places = [sequence_axis, axis, axis]
    return [Answer(place, x.fold, None, dependence, reason) for place in places[: len(call.outputs)]]


def _by_slot(state: Tensor | None, axis: int, x: Tensor) -> bool:
    """Whether a state is a constant with an entry for each slot; rows must lie as in x."""
    if state is None or (state.axis, state.fold) == (axis, x.fold):
        return False
    if not state.is_constant:
        raise UnprovedError("takes a state whose rows lie along another axis")
    return True


def _resize(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    call.rows_only_in(0)
    if call.attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize" or x.axis is None:
        raise UnprovedError("crops by regions")
    if call.attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise UnprovedError("scales all axes alike")
    first = 1 if call.version < 11 else 2
    scales, sizes = call.given(first), call.given(first + 1)
    axes = call.attributes.get("axes") or list(range(x.rank))
    wanted = sizes.values if sizes is not None else None
    factors = scales.array.reshape(-1) if scales is not None and scales.array is not None else None
    if x.axis not in [axis % x.rank for axis in axes]:
        return [kept(x)]
    place = [axis % x.rank for axis in axes].index(x.axis)
    same_size = wanted is not None and len(wanted) == len(axes) and wanted[place] == row_size(x.fold)
    same_scale = factors is not None and len(factors) == len(axes) and factors[place] == 1
    if not same_size and not same_scale:
        raise UnprovedError("resizes the row axis")
    if same_size and wanted is not None:
        dims = list(x.sizes)
        for axis, size in zip(axes, wanted, strict=True):
            dims[axis % x.rank] = size
        return [kept(x, tuple(dims))]
    return [kept(x)]


def _attention(call: NodeCall) -> Sequence[Answer]:
    """Attention of the standard: every input has rows on axis 0 but the mask, which may serve all rows."""
    x = _rows_first(call.input(0))
    for index, tensor in enumerate(call.inputs):
        if (
            tensor is not None
            and (tensor.axis, tensor.fold) != (0, x.fold)
            and not (index == 3 and _serves_all(tensor))
        ):
            raise UnprovedError(f"takes as its input {index} what has no rows on axis 0")
    return [Answer(0, x.fold) for _ in call.outputs]


def _serves_all(mask: Tensor) -> bool:
    """Whether a mask that is broadcast to (rows, heads, queries, keys) is the same for all rows."""
    return mask.axis is None and (mask.rank < 4 or mask.sizes[0] == ONE)


def _rotary(call: NodeCall) -> Sequence[Answer]:
    """RotaryEmbedding: the caches are a table, or each row's own if their rank is 3; so are position_ids."""
    x = _rows_first(call.input(0))
    for tensor in call.present[1:]:
        own = (tensor.axis, tensor.fold) == (0, x.fold)
        position_ids = call.given(3)
        table = tensor.axis is None and position_ids is not None and tensor is not position_ids and tensor.rank == 2
        if not own and not table:
            raise UnprovedError("takes a table by slot")
    return [kept(x, x.sizes)]


_ALONE = [
    "AveragePool",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "GlobalAveragePool",
    "GlobalLpPool",
    "GlobalMaxPool",
    "LpPool",
    "Col2Im",
]

_SAME_SHAPE = ("GroupNormalization", "InstanceNormalization", "LRN")

RULES: Rules = {
    **dict.fromkeys(_ALONE, _alone),
    **dict.fromkeys(_SAME_SHAPE, _same_shape),
    "Attention": _attention,
    "BatchNormalization": _batch_normalization,
    "DeformConv": with_rows_first(2, 4),
    "GRU": _recurrent,
    "GridSample": with_rows_first(1),
    "LSTM": _recurrent,
    "MaxPool": _max_pool,
    "RNN": _recurrent,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "Upsample": _resize,
}
