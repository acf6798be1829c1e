"""Model-local functions, written out before anything is followed, unless a hostile file would never come to an end."""

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import onnx
import onnx.inliner

_MOST_NODES = 200_000


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its functions written out; as it is where they call themselves or would grow too large."""
    if not model.functions or not _is_finite(model):
        return model
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception:
        return model


def _is_finite(model: onnx.ModelProto) -> bool:
    """Whether the functions, written out, make a model of bearable size."""
    bodies = {(function.domain, function.name): list(_calls(function.node)) for function in model.functions}
    order = TopologicalSorter({key: [name for name in called if name in bodies] for key, called in bodies.items()})
    sizes: dict[tuple[str, str], int] = {}
    try:
        for key in order.static_order():  # a function is counted once all that it calls are
            sizes[key] = 1 + sum(sizes.get(name, 1) for name in bodies[key])
    except CycleError:
        return False
    return sum(sizes.get(name, 1) for name in _calls(model.graph.node)) <= _MOST_NODES


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterable[tuple[str, str]]:
    for node in nodes:
        yield node.domain, node.op_type
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _calls(graph.node)
