"""What a rule sees of a node, and what it answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx

from bln_serve.export.coupling.sizes import ONE, ROWS, Dims, Size
from bln_serve.export.coupling.states import Dependence, Tensor, UnprovedError, rows_of


@dataclass(frozen=True)
class Inferred:
    """What ONNX's own shape inference says of an output: its dtype, 0 where unknown, and its sizes."""

    dtype: int
    dims: Dims | None


@dataclass(frozen=True)
class NodeCall:
    """One node with what is known of its inputs.

    Attributes:
        node: the node.
        version: of its domain's operators.
        attributes: by name.
        inputs: what is known of each, None for one that is left out.
        outputs: what shape inference says of each output.
        fixed_rows: how many rows there are, where the model is made for one number.
    """

    node: onnx.NodeProto
    version: int
    attributes: Mapping[str, Any]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Inferred, ...]
    fixed_rows: int | None = None

    def given(self, index: int) -> Tensor | None:
        """Return an input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def input(self, index: int) -> Tensor:
        """Return an input that the operator cannot do without.

        Raises:
            UnprovedError: it is missing.
        """
        tensor = self.given(index)
        if tensor is None:
            raise UnprovedError(f"lacks its input {index}")
        return tensor

    @property
    def present(self) -> list[Tensor]:
        """The inputs that are given."""
        return [tensor for tensor in self.inputs if tensor is not None]

    @property
    def with_rows(self) -> list[int]:
        """Which inputs hold rows on an axis."""
        return [index for index, tensor in enumerate(self.inputs) if tensor is not None and tensor.axis is not None]

    def rows_only_in(self, *allowed: int) -> None:
        """Make sure that no other input holds rows.

        Raises:
            UnprovedError: one does.
        """
        for index in self.with_rows:
            if index not in allowed:
                raise UnprovedError(f"takes rows as its input {index}, where a constant is expected")

    def dims(self, output: int = 0) -> Dims:
        """Return the sizes of an output as shape inference found them.

        Raises:
            UnprovedError: it did not.
        """
        inferred = self.outputs[output].dims
        if inferred is None:
            raise UnprovedError("has an output of unknown shape")
        return inferred

    def axis_attribute(self, default: int, rank: int) -> int:
        """Return the attribute `axis`, counted from the front.

        Raises:
            UnprovedError: there is no such axis.
        """
        return normal(self.attributes.get("axis", default), rank)

    def axes(self, rank: int, index: int = 1) -> list[int] | None:
        """Return the axes that stand in an attribute or, since later versions, in an input; None where none are named.

        Raises:
            UnprovedError: they are computed, or there are no such axes.
        """
        named = self.attributes.get("axes")
        if named is None and (tensor := self.given(index)) is not None:
            named = tensor.numbers
            if named is None:
                raise UnprovedError("takes its axes from a computation")
        return None if named is None else [normal(axis, rank) for axis in named]


@dataclass(frozen=True)
class Answer:
    """What a rule says of one output.

    Attributes:
        axis: where its rows lie, None for no axis.
        fold: how many entries a row makes there.
        dims: its sizes; None for those that shape inference found.
        dependence: what the operator itself adds.
        reason: why, where it adds something; it goes on after the operator's name, or is a sentence of its own.
        values: the entries, where they are known.
        is_sequence: whether it is a sequence.
        dtype: where shape inference does not say it; 0 for that of the inputs.
        may_end_early: whether it is cut from a constant that may have fewer entries than there are rows.
    """

    axis: int | None = None
    fold: Size = ONE
    dims: Dims | None = None
    dependence: Dependence = Dependence.NOTHING
    reason: str = ""
    values: Dims | None = None
    is_sequence: bool = False
    dtype: int = 0
    may_end_early: bool = False

    def tensor(self, inferred: Inferred, fallback_dtype: int) -> Tensor:
        """Return the output's state, its dependence aside.

        Raises:
            UnprovedError: its shape is unknown, or two of its axes grow with the rows.
        """
        dims = inferred.dims if self.dims is None else self.dims
        dtype = inferred.dtype or self.dtype or fallback_dtype
        if self.axis is None:
            return Tensor(dtype, dims, values=self.values, is_sequence=self.is_sequence)
        if dims is None or self.axis >= len(dims):
            raise UnprovedError("has an output of unknown shape")
        return replace(rows_of(dtype, dims, self.axis, self.fold), is_sequence=self.is_sequence)


Rule = Callable[[NodeCall], Sequence[Answer]]
"""From a node to one answer for each output, or for the first alone where all are alike."""

Rules = Mapping[str, Rule]
"""The rules of a family of operators, by operator."""


def normal(axis: int, rank: int) -> int:
    """Count an axis from the front.

    Raises:
        UnprovedError: there is no such axis.
    """
    if not -rank <= axis < rank:
        raise UnprovedError(f"names axis {axis} of {rank}")
    return axis % rank


def kept(tensor: Tensor, dims: Dims | None = None) -> Answer:
    """Answer that rows stay where an input has them."""
    return Answer(tensor.axis, tensor.fold, dims)


def coupled(reason: str, axis: int | None = None, fold: Size = ONE, dims: Dims | None = None) -> Answer:
    """Answer that rows are mixed, and where they lie afterwards."""
    return Answer(axis, fold, dims, Dependence.OTHER_ROWS, reason)


@dataclass(frozen=True)
class Alignment:
    """Where the rows of operands meet when they are broadcast.

    Attributes:
        from_right: how many axes from the end.
        fold: how many entries a row makes there.
        dependence: SLOT where a constant operand differs from place to place along them.
    """

    from_right: int
    fold: Size
    dependence: Dependence

    def answer(self, rank: int, dims: Dims | None = None) -> Answer:
        """Answer for an output with so many axes.

        Raises:
            UnprovedError: it has no place for the rows.
        """
        if rank < self.from_right:
            raise UnprovedError("has no axis for the rows")
        reason = "combines rows with a constant that differs from place to place" if self.dependence else ""
        return Answer(rank - self.from_right, self.fold, dims, self.dependence, reason)


def aligned(operands: Sequence[Tensor]) -> Alignment:
    """Return where the rows of operands meet under NumPy's broadcasting; one operand at least has rows.

    Raises:
        UnprovedError: they meet nowhere, or an operand without rows may be as long as the rows by chance.
    """
    places = {(each.rank - each.axis, each.fold) for each in operands if each.axis is not None}
    if len(places) != 1:
        raise UnprovedError("combines rows that lie along different axes")
    (from_right, fold) = places.pop()
    dependence = Dependence.NOTHING
    for each in operands:
        if each.axis is None and each.rank >= from_right and (size := each.sizes[-from_right]) != ONE:
            if not each.is_constant or size is None or size.number is None:
                raise UnprovedError("combines rows with a tensor whose length along them is not known to be 1")
            dependence = Dependence.SLOT
    return Alignment(from_right, fold, dependence)


def row_size(fold: Size) -> Size:
    """Return the length of an axis with the rows."""
    return fold * ROWS
