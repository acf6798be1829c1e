"""Operators that lay the same entries out anew: Reshape, Transpose, Expand, Tile and their like.

A Reshape keeps the row-major order of the entries. Rows on axis a of the source lie on axis b of the target where

    product(target[:b]) = product(source[:a])   and   target[b] is a whole number of entries a row
"""

from collections.abc import Sequence

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, coupled, kept, normal
from bln_serve.export.coupling.sizes import ONE, ROWS, Dims, Size, product
from bln_serve.export.coupling.states import Tensor, UnprovedError

_COPY, _FILL = 0, -1


def reshape_target(source: Dims, wanted: Dims, allow_zero: bool = False) -> Dims:
    """Return the sizes after a Reshape.

    Args:
        source: the sizes before.
        wanted: the target as it is written, in which -1 stands for what is left and 0 for the size before.
        allow_zero: whether 0 means 0.
    """
    target = list(wanted)
    for place, size in enumerate(target):
        if size == Size(_COPY) and not allow_zero:
            target[place] = source[place] if place < len(source) else None
    if Size(_FILL) in target:
        place = target.index(Size(_FILL))
        others = product(target[:place] + target[place + 1 :])
        total = product(source)
        target[place] = total.over(others) if total is not None and others is not None else None
    return tuple(target)


def relaid(x: Tensor, target: Dims, rows: int | None = None) -> Answer:
    """Answer where the rows of x lie once it is laid out as `target`.

    Args:
        x: with rows on an axis.
        target: the sizes, none of them -1 or 0.
        rows: how many there are, where the model is made for one number.

    Raises:
        UnprovedError: they need not lie on one axis.
    """
    ahead = product(x.sizes[: x.axis])
    for place, size in enumerate(target):
        fold = _entries_a_row(size, x, target[place + 1 :], rows)
        if fold is not None and ahead is not None and product(target[:place]) == ahead:
            return Answer(place, fold, target)
    shown = ", ".join("?" if size is None else str(size) for size in target)
    raise UnprovedError(f"need not keep the rows apart: it makes [{shown}]")


def _entries_a_row(size: Size | None, x: Tensor, behind: Dims, rows: int | None) -> Size | None:
    """Return how many entries a row would make on a target's axis of this size; None if it cannot hold the rows."""
    if size is None:
        return None
    if size.has_rows:
        return size.over(ROWS)
    if rows is None or size.number is None or size.number % rows or size.number == 1 != rows:
        return None
    block = product([x.fold, *x.sizes[(x.axis or 0) + 1 :]])
    block_behind = product(behind)
    fold = None if block is None or block_behind is None else block.over(block_behind)
    return fold if fold == Size(size.number // rows) else None


def _reshape(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    if call.version < 5:  # the target was an attribute then
        wanted: Dims | None = tuple(Size(entry) for entry in call.attributes.get("shape", ()))
    else:
        wanted = call.input(1).values
    if x.axis is None:
        return [_relaid_constant(x, wanted, call)]
    if wanted is None:
        raise UnprovedError("takes its target from a computation")
    rows = None if any(size is None or size.has_rows for size in wanted) else call.fixed_rows
    source = tuple(None if size is None else size.at(rows) for size in x.sizes)
    return [relaid(x, reshape_target(source, wanted, _zero_is_zero(call)), rows)]


def _relaid_constant(x: Tensor, wanted: Dims | None, call: NodeCall) -> Answer:
    if wanted is None:
        return Answer()
    target = wanted if x.dims is None else reshape_target(x.dims, wanted, _zero_is_zero(call))
    return Answer(dims=tuple(None if size in (Size(_FILL), Size(_COPY)) else size for size in target))


def _zero_is_zero(call: NodeCall) -> bool:
    return bool(call.attributes.get("allowzero", 0))


def _flatten(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    axis = call.attributes.get("axis", 1)
    axis = axis if axis == x.rank else normal(axis, x.rank)
    return [relaid(x, (product(x.sizes[:axis]), product(x.sizes[axis:])))]


def _transpose(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    order = [normal(axis, x.rank) for axis in call.attributes.get("perm", range(x.rank - 1, -1, -1))]
    if sorted(order) != list(range(x.rank)) or x.axis is None:
        raise UnprovedError("names an axis twice")
    return [Answer(order.index(x.axis), x.fold, tuple(x.sizes[axis] for axis in order))]


def _squeeze(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    axes = call.axes(x.rank)
    if axes is None or x.axis is None:
        raise UnprovedError("names no axes, and so takes the row axis away where there is one row")
    if x.axis in axes:
        raise UnprovedError("takes the row axis away")
    dims = tuple(size for place, size in enumerate(x.sizes) if place not in axes)
    return [Answer(x.axis - sum(axis < x.axis for axis in axes), x.fold, dims)]


def _unsqueeze(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    named = call.attributes.get("axes") or (call.input(1).numbers if len(call.inputs) > 1 else None)
    if named is None or x.axis is None:
        raise UnprovedError("takes its axes from a computation")
    rank = x.rank + len(named)
    axes = {normal(axis, rank) for axis in named}
    old = [place for place in range(rank) if place not in axes]
    if len(old) != x.rank:
        raise UnprovedError("names an axis twice")
    dims = tuple(ONE if place in axes else x.sizes[old.index(place)] for place in range(rank))
    return [Answer(old[x.axis], x.fold, dims)]


def _expand(call: NodeCall) -> Sequence[Answer]:
    x, target = call.input(0), call.input(1).values
    if target is None:
        raise UnprovedError("takes its target from a computation")
    rank = max(x.rank, len(target))
    old: Dims = (*[ONE] * (rank - x.rank), *x.sizes)
    new: Dims = (*[ONE] * (rank - len(target)), *target)
    return _spread(x, old, new, tuple(_broadcast(*pair) for pair in zip(old, new, strict=True)))


def _broadcast(old: Size | None, new: Size | None) -> Size | None:
    if new in (ONE, old):
        return old
    return new if old == ONE else None


def _spread(x: Tensor, old: Dims, new: Dims, result: Dims) -> Sequence[Answer]:
    """Answer for a tensor that is broadcast from sizes to sizes: rows stay, or a constant gets an axis of rows."""
    if x.axis is not None:
        axis = x.axis + len(old) - x.rank
        if result[axis] != old[axis]:
            raise UnprovedError("repeats rows")
        return [Answer(axis, x.fold, result)]
    grown = [place for place, size in enumerate(new) if size is None or size.has_rows]
    if len(grown) != 1 or old[grown[0]] != ONE:
        return [Answer(dims=result)] if not grown else [Answer(dims=None)]
    return uniform(result, grown[0])


def uniform(dims: Dims, axis: int) -> Sequence[Answer]:
    """Answer for a tensor that is the same at every place of an axis; it holds rows if the axis grows with them."""
    size = dims[axis]
    fold = None if size is None else size.over(ROWS)
    if fold is None or fold.has_rows:
        return [Answer(dims=dims)]
    return [Answer(axis, fold, dims)]


def _tile(call: NodeCall) -> Sequence[Answer]:
    x, repeats = call.input(0), call.input(1).values
    if repeats is None or len(repeats) != x.rank:
        raise UnprovedError("repeats as often as a computation says")
    pairs = list(zip(x.sizes, repeats, strict=True))
    dims = tuple(None if size is None or times is None else size * times for size, times in pairs)
    if x.axis is not None:
        if repeats[x.axis] != ONE:
            return [coupled("repeats the rows in turn", dims=dims)]
        return [kept(x, dims)]
    grown = [place for place, size in enumerate(dims) if size is None or size.has_rows]
    # A constant of length k, laid out again for each row, is k entries a row, the same for every row.
    return uniform(dims, grown[0]) if len(grown) == 1 and x.is_constant else [Answer(dims=dims)]


def _constant_of_shape(call: NodeCall) -> Sequence[Answer]:
    dims = call.input(0).values
    if dims is None:
        return [Answer(dims=None)]
    grown = [place for place, size in enumerate(dims) if size is None or size.has_rows]
    return uniform(dims, grown[0]) if len(grown) == 1 else [Answer(dims=dims)]


def _depth_space(call: NodeCall) -> Sequence[Answer]:
    x = call.input(0)
    if x.axis != 0:
        raise UnprovedError("expects its rows on axis 0")
    return [kept(x)]


RULES: Rules = {
    "DepthToSpace": _depth_space,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "SpaceToDepth": _depth_space,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

GROWING: Rules = {"ConstantOfShape": _constant_of_shape, "Expand": _expand, "Reshape": _reshape, "Tile": _tile}
"""Operators that may make rows out of a shape, and so are asked also where no input has rows."""
