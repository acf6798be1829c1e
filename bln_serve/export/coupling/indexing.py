"""Operators that pick, cut, join and place entries: harmless along every axis but the rows' own."""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, coupled, kept, normal, row_size
from bln_serve.export.coupling.sizes import ONE, Dims, Size
from bln_serve.export.coupling.states import Dependence, Tensor, UnprovedError

_BY_SLOT = "picks from a constant by slot"


def _gather(call: NodeCall) -> Sequence[Answer]:
    table, indices = call.input(0), call.input(1)
    axis = call.axis_attribute(0, table.rank)
    dims = (*table.sizes[:axis], *indices.sizes, *table.sizes[axis + 1 :])
    if table.axis is None and indices.axis is not None:
        return [Answer(axis + indices.axis, indices.fold, dims)]
    if table.axis is None or indices.axis is not None:
        raise UnprovedError("picks from rows at places that come from rows")
    if table.axis == axis:
        return [coupled("picks some of the rows", dims=dims)]
    return [kept(table, dims) if table.axis < axis else Answer(table.axis - 1 + indices.rank, table.fold, dims)]


def _gather_elements(call: NodeCall) -> Sequence[Answer]:
    data, indices = call.input(0), call.input(1)
    axis = call.axis_attribute(0, data.rank)
    if indices.axis is None or data.axis == axis:
        raise UnprovedError("picks some of the rows")
    if data.axis is None:
        by_slot = axis != indices.axis and data.sizes[indices.axis] != ONE
        slot = Dependence.SLOT if by_slot and data.is_constant else Dependence.NOTHING
        if by_slot and not slot:
            raise UnprovedError("picks from a computed table")
        return [Answer(indices.axis, indices.fold, indices.sizes, slot, _BY_SLOT)]
    _same_place(data, indices)
    return [kept(data, indices.sizes)]


def _gather_nd(call: NodeCall) -> Sequence[Answer]:
    data, indices = call.input(0), call.input(1)
    shared = call.attributes.get("batch_dims", 0)
    depth = indices.sizes[-1]
    if depth is None or depth.number is None or indices.axis == indices.rank - 1:
        raise UnprovedError("picks at places of unknown depth")
    dims = (*indices.sizes[:-1], *data.sizes[shared + depth.number :])
    if data.axis is not None:
        if data.axis >= shared:
            raise UnprovedError("picks some of the rows")
        _same_place(data, indices)
    elif indices.axis is not None and indices.axis < shared:
        raise UnprovedError("picks from a constant by slot")
    return [kept(indices, dims)]


def _same_place(*tensors: Tensor | None) -> None:
    """Make sure that rows lie on the same axis of each.

    Raises:
        UnprovedError: they do not.
    """
    if len({(each.axis, each.fold) for each in tensors if each is not None}) != 1:
        raise UnprovedError("combines rows that lie along different axes")


def _scatter_elements(call: NodeCall) -> Sequence[Answer]:
    data, indices, updates = call.input(0), call.input(1), call.input(2)
    _same_place(data, indices, updates)
    if call.axis_attribute(0, data.rank) == data.axis:
        raise UnprovedError("writes into rows that are computed")
    return [kept(data, data.sizes)]


def _scatter_nd(call: NodeCall) -> Sequence[Answer]:
    data, indices, updates = call.input(0), call.input(1), call.input(2)
    call.rows_only_in(0, 2)
    depth = indices.sizes[-1]
    if data.axis is None or depth is None or depth.number is None or data.axis < depth.number:
        raise UnprovedError("writes into rows by their place")
    place = data.axis - depth.number + indices.rank - 1
    if updates.axis is None and updates.sizes[place] is not None:
        return [Answer(data.axis, data.fold, data.sizes, Dependence.SLOT, "writes a constant by slot")]
    if (updates.axis, updates.fold) != (place, data.fold):
        raise UnprovedError("combines rows that lie along different axes")
    return [kept(data, data.sizes)]


def concatenate(call: NodeCall) -> Sequence[Answer]:
    """Rows of all operands lie alike, and not along the axis on which they are joined."""
    operands = call.present
    rank = max(each.rank for each in operands)
    if "axis" not in call.attributes and call.version >= 4:
        raise UnprovedError("names no axis")
    axis = call.axis_attribute(1, rank)
    places = {(each.axis, each.fold) for each in operands if each.axis is not None}
    if len(places) != 1:
        raise UnprovedError("combines rows that lie along different axes")
    ((place, fold),) = places
    if len(operands) == 1:
        return [kept(operands[0], operands[0].sizes)]
    if place == axis:
        return [coupled("puts something behind the rows")]
    return [Answer(place, fold, None, _beside(operands, place), "puts beside the rows a constant of a fixed length")]


def _beside(operands: Sequence[Tensor], place: int | None) -> Dependence:
    others = [each for each in operands if each.axis is None]
    for each in others:
        size = None if place is None else each.sizes[place]
        if not each.is_constant or size is None or size.number is None:
            raise UnprovedError("puts beside the rows what is not known to be as long")
    return Dependence.SLOT if others else Dependence.NOTHING


def _split(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    call.rows_only_in(0)
    if call.axis_attribute(0, x.rank) == x.axis:
        raise UnprovedError("splits the row axis")
    return [kept(x, call.dims(index)) for index in range(len(call.outputs))]


def _pad(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    call.rows_only_in(0)
    if call.version < 11:  # attributes then, under two names
        pads: Dims | None = tuple(map(Size, call.attributes.get("pads") or call.attributes.get("paddings") or ()))
    else:
        pads = call.input(1).values
    axes = call.axes(x.rank, 3) if call.version >= 18 else None
    axes = list(range(x.rank)) if axes is None else axes
    if pads is None or len(pads) != 2 * len(axes):
        raise UnprovedError("pads by what is computed")
    at_rows = [pads[place + half] for place, axis in enumerate(axes) if axis == x.axis for half in (0, len(axes))]
    if any(size != Size(0) for size in at_rows):
        raise UnprovedError("pads the row axis")
    return [kept(x)]


def _range(call: NodeCall) -> Sequence[Answer]:
    """Range(0, rows * k, 1) holds each row's own place."""
    start, end, step = (call.input(index).values for index in range(3))
    if start == (Size(0),) and step == (ONE,) and end and end[0] is not None:
        fold = end[0].over(row_size(ONE))
        if fold is not None and not fold.has_rows:
            return [Answer(0, fold, (end[0],), Dependence.SLOT, "counts the rows")]
    return [Answer() if all(each.is_constant for each in call.present) else Answer(dims=(None,))]


def _shape(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    start, end = call.attributes.get("start", 0), call.attributes.get("end", x.rank)
    sizes = list(x.sizes)
    if x.axis is not None and x.may_end_early:
        sizes[x.axis] = None
    values = tuple(sizes[start:end])
    return [Answer(dims=(Size(len(values)),), values=values)]


def _one_hot(call: NodeCall) -> Sequence[Answer]:
    indices = call.input(0)
    call.rows_only_in(0)
    axis = normal(call.attributes.get("axis", -1), indices.rank + 1)
    depth = call.input(1).values
    length = depth[0] if depth and len(depth) == 1 else None
    dims = (*indices.sizes[:axis], length, *indices.sizes[axis:])
    return [Answer((indices.axis or 0) + (axis <= (indices.axis or 0)), indices.fold, dims)]


def _trilu(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    call.rows_only_in(0)
    if x.axis is None or x.axis >= x.rank - 2:
        raise UnprovedError("cuts a triangle out of the rows")
    return [kept(x, x.sizes)]


def _reverse_sequence(call: NodeCall) -> Sequence[Answer]:
    x, lengths = call.input(0), call.input(1)
    batch, time = call.attributes.get("batch_axis", 1), call.attributes.get("time_axis", 0)
    if x.axis is None or x.axis == time:
        raise UnprovedError("reverses the row axis")
    if x.axis != batch:
        call.rows_only_in(0)
        return [kept(x, x.sizes)]
    if lengths.is_constant:
        return [Answer(x.axis, x.fold, x.sizes, Dependence.SLOT, "takes lengths by slot")]
    if (lengths.axis, lengths.fold) != (0, x.fold):
        raise UnprovedError("combines rows that lie along different axes")
    return [kept(x, x.sizes)]


RULES: Rules = {
    "Concat": concatenate,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "ReverseSequence": _reverse_sequence,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Split": _split,
    "Trilu": _trilu,
}

GROWING: Rules = {"Range": _range, "Shape": _shape}
"""Operators that are asked also where no input has rows, because a shape may bring the rows in."""
