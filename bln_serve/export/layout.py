"""Moving Transposes out of the way of BLN layers and look-ups.

Keras puts features last. ONNX's convolutions take them second and its recurrent operators take time first, so that a
BLN layer between two of them stands between two Transposes that undo each other:

    Transpose(perm) -> BLN -> Transpose(inverse)    =   BLN with its axes in other places
    Transpose(perm) -> BLN                          =   BLN with its axes in other places -> Transpose(perm)
    Embedding(ids) -> Transpose(perm)               =   Embedding(Transpose(ids)), which moves integers alone

Precondition: custom nodes as `marking` writes them. Result: the same function; the attribute `axes` of a BLN node says
where in x the axes 0, 1, ... of the layer's own input now lie, rows first, features last. Its tables stay as the layer
has them. No Transpose is left that undoes another.

A Transpose sinks through a layer where features stay last, or where it meets its inverse and features are few:
LayerNormalization takes features last, and is slower than plain operators over another axis where they are few, faster
where they are many (`make bench`, table "layout").
"""

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, DOMAIN, EMBEDDING

FEW_FEATURES = 8


def sink_transposes(marked: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with Transposes moved behind BLN layers, before look-ups, and away; `marked` is not changed."""
    model = ir.from_proto(marked)
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == BATCH_LAYER_NORMALIZATION:
            _sink_through_layer(node)
        elif node.domain == DOMAIN and node.op_type == EMBEDDING:
            _lift_over_lookup(node)
    for node in model.graph:
        _cancel(node)
    common.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _sink_through_layer(layer: ir.Node) -> None:
    before = _transpose_before(layer)
    if before is None or not _is_worth_it(layer, _perm(before)):
        return
    layer.replace_input_with(0, before.inputs[0])
    layer.attributes["axes"] = ir.AttrInt64s("axes", _perm(before))
    after = ir.node("Transpose", [None], {"perm": _perm(before)})
    layer.append(after)
    _take_over(layer.outputs[0], after.outputs[0])
    after.replace_input_with(0, layer.outputs[0])


def _is_worth_it(layer: ir.Node, perm: Sequence[int]) -> bool:
    if _keeps_last(perm):
        return True
    gamma = layer.inputs[1]
    few = gamma is not None and gamma.const_value is not None and gamma.const_value.size <= FEW_FEATURES
    return few and any(_undoes(node, perm) for node in layer.outputs[0].consumers())


def _lift_over_lookup(lookup: ir.Node) -> None:
    y = lookup.outputs[0]
    perms = {tuple(_perm(node)) for node in y.consumers()}
    perm = perms.pop() if len(perms) == 1 else ()
    # An output, the model's or a loop body's, keeps the Transpose that gives it its name.
    makes_output = any(value.is_graph_output() for value in (y, *(node.outputs[0] for node in y.consumers())))
    if not perm or makes_output or not _keeps_last(perm):
        return
    lifted = ir.node("Transpose", [lookup.inputs[0]], {"perm": perm[:-1]})
    lookup.prepend(lifted)
    lookup.replace_input_with(0, lifted.outputs[0])
    for node in tuple(y.consumers()):
        _skip(node, y)


def _cancel(node: ir.Node) -> None:
    """Let what takes Transpose(inverse) of a Transpose take what went in."""
    before = _transpose_before(node)
    if before is not None and _undoes(node, _perm(before)):
        _skip(node, before.inputs[0])


def _skip(node: ir.Node, value: ir.Value | None) -> None:
    # An output of the model keeps the node that gives it its name.
    if value is not None and not node.outputs[0].is_graph_output():
        node.outputs[0].replace_all_uses_with(value)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let everything that takes `old` take `new`, also the model's outputs, by the same name."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.type, new.shape, new.name = old.type, old.shape, old.name
    old.shape, old.name = None, f"{old.name}/transposed"


def _transpose_before(node: ir.Node) -> ir.Node | None:
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
    return before if before is not None and _perm(before) else None


def _perm(node: ir.Node) -> Sequence[int]:
    """Return a Transpose's permutation; empty for other nodes, and for one that reverses all axes unsaid."""
    perm = node.attributes.get("perm")
    return perm.as_ints() if perm is not None and node.op_type == "Transpose" and not node.domain else ()


def _undoes(node: ir.Node, perm: Sequence[int]) -> bool:
    second = _perm(node)
    return len(second) == len(perm) and all(perm[axis] == index for index, axis in enumerate(second))


def _keeps_last(perm: Sequence[int]) -> bool:
    return perm[-1] == len(perm) - 1
