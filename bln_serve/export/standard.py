"""The end of the lowering: standard ONNX operators alone, or a refusal that names what is not."""

import onnx

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.graphs import all_nodes


def require_standard(model: onnx.ModelProto) -> None:
    """Drop the operator sets that no node needs any more, and make sure that no custom node is left.

    Raises:
        UnsupportedModelError: an operator is none of the ONNX standard's: ours, or one that the converter left as
            TensorFlow has it.
    """
    foreign = [node for node in all_nodes(model.graph) if not _is_standard(node)]
    if foreign:
        received = ", ".join(sorted({_described(node) for node in foreign}))
        raise UnsupportedModelError(
            f"Expected standard ONNX operators only. Received: {received}. Let the layers that make them compute the "
            "same in other operations, or do that part before or behind the model."
        )
    standard = [item for item in model.opset_import if item.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(standard)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and bool(onnx.defs.has(node.op_type))


def _described(node: onnx.NodeProto) -> str:
    op_type = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{op_type} ({node.name})" if node.name else op_type
