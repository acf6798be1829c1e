"""Which node couples first, and how that is said."""

from collections.abc import Sequence

import onnx

from bln_serve.export.coupling.calls import Answer, NodeCall
from bln_serve.export.coupling.states import Cause, Dependence, Tensor, Trail
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, is_op


def label(node: onnx.NodeProto) -> str:
    """Return what a node is called on a path: its name, or its operator."""
    return node.name or node.op_type


def sentence(node: onnx.NodeProto, said: str) -> str:
    """Return what a node does, with its name."""
    return f"{node.op_type} {node.name!r} {said}" if node.name else f"{node.op_type} {said}"


def first(inputs: Sequence[Tensor | None], cause: Cause) -> Cause:
    """Return what already couples the inputs, or else this node."""
    held = [each for each in inputs if each is not None and each.dependence is Dependence.OTHER_ROWS and each.cause]
    return held[0].cause or cause if held else cause


def cause_of(call: NodeCall, dependence: Dependence, answer: Answer, trail: Trail) -> Cause | None:
    """Return the first node that couples rows as strongly as they now are."""
    if dependence not in (Dependence.SLOT, Dependence.OTHER_ROWS):
        return None
    held = [each.cause for each in call.present if each.dependence is dependence and each.cause is not None]
    if held:
        return held[0]
    if is_op(call.node, BATCH_LAYER_NORMALIZATION):
        return Cause(answer.reason, trail)
    said = answer.reason if answer.dependence is dependence else "turns the number of rows into a value"
    return Cause(sentence(call.node, said), trail)
