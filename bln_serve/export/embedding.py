"""Lowering `com.bln::Embedding` to Gather, and putting the tables in.

Precondition: each node is y = Embedding(ids) with integer ids of any shape and the name of its table as an attribute.
Result: none is left, y = Gather(table, ids) over axis 0, and every table is an initializer.

A table of 20,000 words and 512 features is 41 MB. It joins the model here, after everything that copies or reads the
graph: on its way through TensorFlow's freezing and the converter it costs ten seconds and two gigabytes.
"""

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from bln_serve.export.custom_ops import EMBEDDING, attributes_of, is_op
from bln_serve.export.graphs import replace_nodes


def lower(model: onnx.ModelProto) -> None:
    """Turn every Embedding node into a Gather, in place."""
    nodes = [_gather(node) if is_op(node, EMBEDDING) else node for node in model.graph.node]
    replace_nodes(model.graph, nodes)


def _gather(node: onnx.NodeProto) -> onnx.NodeProto:
    return helper.make_node("Gather", [attributes_of(node)["table"], *node.input], node.output, name=node.name, axis=0)


def inject(model: onnx.ModelProto, tables: Mapping[str, NDArray[Any]]) -> None:
    """Add the tables, by the name of their initializers, in place."""
    for name, values in tables.items():
        tensor = model.graph.initializer.add()  # filled in its place: a copy would be another 41 MB
        tensor.name, tensor.data_type = name, helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor.dims.extend(values.shape)
        tensor.raw_data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
