"""Sequences of tensors: of all members one thing is known. Places in a sequence must not depend on rows."""

from collections.abc import Sequence
from dataclasses import replace

from bln_serve.export.coupling.calls import Answer, NodeCall, Rules, coupled
from bln_serve.export.coupling.sizes import ONE, Dims
from bln_serve.export.coupling.states import Tensor, UnprovedError


def _member(tensor: Tensor) -> Answer:
    return Answer(tensor.axis, tensor.fold, tensor.sizes)


def _together(members: Sequence[Tensor], places: Sequence[Tensor | None]) -> Sequence[Answer]:
    if any(place is not None and not place.is_constant for place in places):
        raise UnprovedError("finds a place in a sequence by what is computed")
    if len({(each.axis, each.fold, each.rank) for each in members}) != 1:
        raise UnprovedError("puts together what does not lie alike")
    sizes: list[Dims] = [each.sizes for each in members]
    dims = tuple(column[0] if len(set(column)) == 1 else None for column in zip(*sizes, strict=True))
    return [replace(_member(members[0]), dims=dims, is_sequence=True)]


def _construct(call: NodeCall) -> Sequence[Answer]:
    return _together(call.present, [])


def _insert(call: NodeCall) -> Sequence[Answer]:
    sequence, tensor = call.input(0), call.input(1)
    members = [tensor] if sequence.is_empty_sequence else [sequence, tensor]
    return _together(members, [call.given(2)])


def _erase(call: NodeCall) -> Sequence[Answer]:
    return _together([call.input(0)], [call.given(1)])


def _at(call: NodeCall) -> Sequence[Answer]:
    (answer,) = _together([call.input(0)], [call.input(1)])
    return [replace(answer, is_sequence=False)]


def _concatenate(call: NodeCall) -> Sequence[Answer]:
    member = call.input(0)
    new_axis = bool(call.attributes.get("new_axis", 0))
    rank = member.rank + new_axis
    axis = call.axis_attribute(0, rank)
    if member.axis is None or (axis == member.axis and not new_axis):
        return [coupled("puts rows behind rows")]
    if not new_axis:
        return [Answer(member.axis, member.fold, tuple(None if i == axis else s for i, s in enumerate(member.sizes)))]
    dims = (*member.sizes[:axis], None, *member.sizes[axis:])
    return [Answer(member.axis + (axis <= member.axis), member.fold, dims)]


def _split(call: NodeCall) -> Sequence[Answer]:
    x, lengths = call.input(0), call.given(1)
    axis = call.axis_attribute(0, x.rank)
    if axis == x.axis or (lengths is not None and not lengths.is_constant):
        raise UnprovedError("splits the row axis")
    if lengths is None and not call.attributes.get("keepdims", 1):
        dims = x.sizes[:axis] + x.sizes[axis + 1 :]
        return [Answer((x.axis or 0) - (axis < (x.axis or 0)), x.fold, dims, is_sequence=True)]
    dims = tuple((ONE if lengths is None else None) if i == axis else size for i, size in enumerate(x.sizes))
    return [Answer(x.axis, x.fold, dims, is_sequence=True)]


def _empty(_call: NodeCall) -> Sequence[Answer]:
    return [Answer(dims=(), values=(), is_sequence=True)]


RULES: Rules = {
    "ConcatFromSequence": _concatenate,
    "SequenceAt": _at,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SplitToSequence": _split,
}
