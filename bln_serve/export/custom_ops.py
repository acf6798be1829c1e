"""The names of our own ONNX operators.

    com.bln::BatchLayerNormalization    one call of a BLN layer, written by `marking`
    com.bln::Recurrent                  a whole recurrent layer, (rows, time, features) in
    com.bln::Embedding                  a look-up: ids, table

They stand in a marked model and in no artifact. What reads a graph imports them from here, and so no TensorFlow.
"""

from typing import Any

import onnx
from onnx import helper

from bln_serve.statistics import STATISTICS

DOMAIN = "com.bln"
BATCH_LAYER_NORMALIZATION = "BatchLayerNormalization"
RECURRENT = "Recurrent"
EMBEDDING = "Embedding"

TABLES = ("gamma", "beta", *STATISTICS)
"""The inputs of a BatchLayerNormalization node behind x."""


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name: numbers, lists, tensors and graphs as they are, text decoded.

    Text that is not UTF-8 keeps its readable part. An attribute that only refers to a function's own is left out.
    """
    held = (item for item in node.attribute if not item.ref_attr_name)
    return {item.name: _decoded(helper.get_attribute_value(item)) for item in held}


def is_op(node: onnx.NodeProto, op_type: str) -> bool:
    """Whether a node is the one of our own operators with this name."""
    return node.domain == DOMAIN and node.op_type == op_type


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list) and value and all(isinstance(item, bytes) for item in value):
        return [item.decode(errors="replace") for item in value]
    return value
