"""From each look-up back to the model's inputs."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import inf
from typing import Any

import numpy as np
import onnx

from bln_serve.export.coupling import MALFORMED, Tensor
from bln_serve.export.custom_ops import EMBEDDING, attributes_of, is_op
from bln_serve.export.index_ranges.idioms import STANDARD, NegativeIndices
from bln_serve.export.index_ranges.limits import NO_LIMITS, Need, Range

_KEEP_LAYOUT = ("Cast", "Dropout", "Identity")
_KEEP_ENTRIES = ("Expand", "Flatten", "Reshape", "ReverseSequence", "Squeeze", "Tile", "Transpose", "Unsqueeze")
# Exporters write the end of an axis as the largest int32 or int64, give or take one.
_BEHIND_ANY_END = 2**31 - 2


class Walk:
    """One walk through a graph, from its end to its beginning.

    Attributes:
        needs: what look-ups ask of each tensor; a tensor's own are complete when its maker is met.
    """

    def __init__(self, graph: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.tensors = tensors
        self._negative_indices = NegativeIndices(graph, self._constant)
        self.needs: defaultdict[str, Need] = defaultdict(Need)

    def run(self) -> None:
        """Walk."""
        for node in reversed(self.graph.node):
            with suppress(*MALFORMED):  # nothing is claimed of what is not as its operator wants it
                if is_op(node, EMBEDDING) and len(node.input) > 1:
                    self._look_up(node.input[0], node.input[1], 0)
                elif node.domain in STANDARD:
                    self._standard(node)

    def _look_up(self, indices: str, table: str, axis: int) -> None:
        dims = self.tensors[table].dims if table in self.tensors else None
        if dims is None or not -len(dims) <= axis < len(dims):
            return
        size = dims[axis]
        if size is not None and size.number:
            self.needs[indices].add(Need(Range(0, size.number - 1)))

    def _standard(self, node: onnx.NodeProto) -> None:
        attributes = attributes_of(node)
        if node.op_type == "Gather":
            self._look_up(node.input[1], node.input[0], attributes.get("axis", 0))
        need = self.needs.get(node.output[0]) if node.output else None
        if node.op_type == "Split":
            self._split(node, attributes)
        elif need is not None:
            self._pass(node, attributes, need)

    def _pass(self, node: onnx.NodeProto, attributes: Mapping[str, Any], need: Need) -> None:
        """Hand a need on from a node's output to its inputs."""
        source = self._negative_indices.source_of(node)
        if source is not None:
            self.needs[source].add(need, lambda limits: limits.meet(Range(low=0)))
        elif node.op_type == "Cast" and attributes.get("to") == onnx.TensorProto.BOOL:
            return
        elif node.op_type in _KEEP_LAYOUT:
            self.needs[node.input[0]].add(need)
        elif node.op_type in _KEEP_ENTRIES:
            self.needs[node.input[0]].add(Need(need.whole))
        elif node.op_type == "Concat":
            for name in node.input:
                self.needs[name].add(Need(need.whole))
        elif node.op_type == "Slice":
            self._slice(node, attributes, need)
        else:
            for name, change in self._arithmetic(node, attributes):
                self.needs[name].add(need, change)

    def _arithmetic(
        self, node: onnx.NodeProto, attributes: Mapping[str, Any]
    ) -> Iterator[tuple[str, Callable[[Range], Range]]]:
        """Yield the input that a node moves or bounds by constants, and what becomes of a range before it."""
        constants = [self._constant(name) if name else None for name in node.input]
        varying = [name for name, constant in zip(node.input, constants, strict=True) if name and constant is None]
        if len(varying) != 1 or self._is_spread(node, varying[0]):
            return
        place = list(node.input).index(varying[0])
        fixed = [constant for constant in constants if constant is not None]
        if node.op_type in ("Add", "Sub", "Max", "Min") and len(fixed) == 1:
            yield varying[0], _CHANGES[node.op_type, place](fixed[0])
        elif node.op_type == "Neg":
            yield varying[0], Range.mirrored
        elif node.op_type == "Relu":
            yield varying[0], lambda limits: limits.before_max(0)
        elif node.op_type == "Clip" and place == 0:
            low, high = (self._bound(node, attributes, *each) for each in ((1, "min", -inf), (2, "max", inf)))
            yield varying[0], lambda limits: limits.before_min(high).before_max(low)

    def _bound(self, node: onnx.NodeProto, attributes: Mapping[str, Any], index: int, name: str, none: float) -> float:
        """Return a bound of a Clip: an input, or an attribute before that."""
        constant = self._constant(node.input[index]) if len(node.input) > index and node.input[index] else None
        return float(attributes.get(name, none) if constant is None else constant.max())

    def _is_spread(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether broadcasting gives the output another shape than the input, in which parts have no meaning."""
        before, after = self._dims(name), self._dims(node.output[0])
        return bool(self.needs[node.output[0]].parts) and (before is None or before != after)

    def _dims(self, name: str) -> Any:
        return self.tensors[name].dims if name in self.tensors else None

    def _constant(self, name: str) -> Any:
        tensor = self.tensors.get(name)
        array = None if tensor is None or not tensor.is_constant else tensor.array
        return None if array is None or not array.size or array.dtype.kind not in "iuf" else array.astype(np.float64)

    def _slice(self, node: onnx.NodeProto, attributes: Mapping[str, Any], need: Need) -> None:
        """Hand a need on to the part of an input that a Slice cuts out along one axis of known length."""
        if need.whole == NO_LIMITS:
            return
        names = ("starts", "ends", "axes", "steps")
        stored = [self._entries(node, attributes, index + 1, name) for index, name in enumerate(names)]
        starts, ends, axes, steps = stored
        dims = self._dims(node.input[0])
        if starts is None or ends is None or dims is None:
            return
        axes = list(range(len(starts))) if axes is None else [axis % len(dims) for axis in axes]
        cuts = zip(axes, starts, ends, steps or [1] * len(starts), strict=True)
        partial = [cut for cut in cuts if not (cut[1] == 0 and cut[3] == 1 and _reaches(cut[2], dims[cut[0]]))]
        if not partial:
            self.needs[node.input[0]].add(Need(need.whole))
        elif len(partial) == 1:
            ((axis, start, end, step),) = partial
            size = dims[axis]
            if size is not None and size.number is not None:
                places = range(size.number)[start:end:step]
                self.needs[node.input[0]].add(Need(parts={(axis, place): need.whole for place in places}))

    def _entries(self, node: onnx.NodeProto, attributes: Mapping[str, Any], index: int, name: str) -> list[int] | None:
        if name in attributes:
            return [int(entry) for entry in attributes[name]]
        constant = self._constant(node.input[index]) if len(node.input) > index and node.input[index] else None
        return None if constant is None else [int(entry) for entry in constant.reshape(-1)]

    def _split(self, node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
        dims = self._dims(node.input[0])
        if not dims:
            return
        axis, start = attributes.get("axis", 0) % len(dims), 0
        for name in node.output:
            part = self._dims(name)
            size = part[axis] if part else None
            if size is None or size.number is None:
                return
            places = range(start, start + size.number)
            start += size.number
            if name in self.needs and self.needs[name].whole != NO_LIMITS:
                limits = self.needs[name].whole
                self.needs[node.input[0]].add(Need(parts={(axis, place): limits for place in places}))


def _reaches(end: int, size: Any) -> bool:
    return end >= _BEHIND_ANY_END or (size is not None and size.number is not None and end >= size.number)


_CHANGES: Mapping[tuple[str, int], Callable[[Any], Callable[[Range], Range]]] = {
    ("Add", 0): lambda constant: lambda limits: limits.before_adding(constant),
    ("Add", 1): lambda constant: lambda limits: limits.before_adding(constant),
    ("Sub", 0): lambda constant: lambda limits: limits.before_adding(-constant),
    ("Sub", 1): lambda constant: lambda limits: limits.mirrored().before_adding(-constant),
    ("Max", 0): lambda constant: lambda limits: limits.before_max(constant.max()),
    ("Max", 1): lambda constant: lambda limits: limits.before_max(constant.max()),
    ("Min", 0): lambda constant: lambda limits: limits.before_min(constant.min()),
    ("Min", 1): lambda constant: lambda limits: limits.before_min(constant.min()),
}
