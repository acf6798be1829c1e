"""How Keras's take writes negative indices: an index below 0 is counted from the end before the look-up.

Where(x < 0, x + n, x)        or        x * not(x < 0) + (x + n) * (x < 0)
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx

STANDARD = ("", "ai.onnx")


class NegativeIndices:
    """Recognises the idiom.

    Args:
        graph: whose nodes may be it.
        constant: returns the entries of a constant by its name, None for anything else.
    """

    def __init__(self, graph: onnx.GraphProto, constant: Callable[[str], Any]) -> None:
        self._makers: Mapping[str, onnx.NodeProto] = {name: node for node in graph.node for name in node.output if name}
        self._constant = constant

    def source_of(self, node: onnx.NodeProto) -> str | None:
        """Return x where a node is Where(x < 0, x + n, x), or that as a sum of two products."""
        if node.op_type == "Where":
            condition, added, source = node.input
            return source if self._is_negative(condition, source) and self._is_moved(added, source) else None
        if node.op_type != "Add":
            return None
        products = [list(maker.input) for name in node.input if (maker := self._maker(name, "Mul"))]
        if len(products) != 2:
            return None
        for kept, moved in (products, products[::-1]):
            for source, rest in (kept, kept[::-1]):
                counted = any(self._is_counted(flag, added, source) for flag, added in (moved, moved[::-1]))
                if counted and self._is_kept(rest, source):
                    return str(source)
        return None

    def _is_counted(self, flag: str, added: str, source: str) -> bool:
        """Whether a product is x + n where x is negative, and else 0."""
        return self._is_negative(self._uncast(flag), source) and self._is_moved(added, source)

    def _maker(self, name: str, op_type: str) -> onnx.NodeProto | None:
        node = self._makers.get(name)
        return node if node is not None and node.op_type == op_type and node.domain in STANDARD else None

    def _uncast(self, name: str) -> str:
        seen = set()  # of a file from anywhere, where nodes may feed each other
        while (maker := self._maker(name, "Cast")) is not None and name not in seen:
            seen.add(name)
            name = maker.input[0]
        return name

    def _is_negative(self, condition: str, source: str) -> bool:
        less = self._maker(condition, "Less")
        if less is None or self._uncast(less.input[0]) != self._uncast(source):
            return False
        bound = self._constant(less.input[1])
        return bound is not None and bound.size == 1 and float(bound.max()) == 0

    def _is_kept(self, name: str, source: str) -> bool:
        """Whether a factor is 0 where x is negative, and else 1."""
        negated = self._maker(self._uncast(name), "Not")
        return negated is not None and self._is_negative(negated.input[0], source)

    def _is_moved(self, name: str, source: str) -> bool:
        added = self._maker(name, "Add")
        if added is None or source not in added.input:
            return False
        (other,) = [each for each in added.input if each != source] or [source]
        constant = self._constant(other)
        return constant is not None and constant.size == 1
