"""Tracing with each BLN call as one recognisable custom op, and converting that trace to ONNX.

While the graph is traced, a BLN call becomes one `PyFuncStateless` operation, which TensorFlow carries through freezing
and optimisation untouched, and whose string attribute says which call it is. The converter makes it one node

    y = com.bln::BatchLayerNormalization(x, gamma, beta, batch_mean, batch_var, feature_mean, feature_var)
        <m, epsilon, w_b, w_f, policy, layer, dtype>

with the six tables as initializers in float64, put there from the layer's own weights and not from the traced graph, so
that no optimiser ever touches them. x and y have the shape (rows, ..., d). Such a model is complete and checkable, and
no runtime executes it: `decomposition` lowers it.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from onnx import helper, numpy_helper

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.layers import BatchLayerNormalization
from bln_serve.layers.batch_layer_normalization import marked_calls
from bln_serve.statistics import STATISTICS

DOMAIN = "com.bln"
OP_TYPE = "BatchLayerNormalization"
TABLES = ("gamma", "beta", *STATISTICS)
ROWS = "rows"
"""The name of the batch dimension in the ONNX model."""

# The highest that the converter knows; onnx.version_converter takes the result further.
CONVERTER_OPSET = 18
_PROBE_ROWS = 7  # a number that no layer has by chance


@dataclass
class _Marker:
    """Marks calls while a graph is traced, and remembers them."""

    policies: dict[int, str]
    calls: list[BatchLayerNormalization] = field(default_factory=list)
    rows: list[int | None] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)

    def __call__(self, layer: BatchLayerNormalization, x: Any) -> Any:
        # The index makes each call's token its own: equal stateless operations would be merged into one.
        token = json.dumps({"bln_call": len(self.calls)})
        self.calls.append(layer)
        self.rows.append(x.shape[0])
        self.dtypes.append(x.dtype.name)
        y = tf.raw_ops.PyFuncStateless(input=[x], token=token, Tout=[x.dtype])[0]
        return tf.ensure_shape(y, x.shape)


def to_marked_onnx(callee: Callee, frozen: Sequence[FrozenLayer], opset: int) -> onnx.ModelProto:
    """Trace a model and convert it to ONNX with one custom node a BLN call.

    Args:
        callee: the model, whose layers have their export policies applied.
        frozen: its BLN layers with their policies.
        opset: of the standard operators, at most `CONVERTER_OPSET`.

    Returns:
        The marked model. Inputs and outputs are named as in the signature, the batch dimension `rows`.

    Raises:
        UnsupportedModelError: a layer's rows are not the request's rows, a BLN call was lost on the way, or the
            converter does not know an operator.
    """
    _require_request_rows(callee, frozen)
    marker = _new_marker(frozen)
    function = tf.function(callee, input_signature=callee.tensor_specs(), autograph=False)
    with marked_calls(marker):
        function.get_concrete_function()
    model = _convert(function, callee, opset)
    _fill_in(model, marker)
    _name_rows(model, callee)
    return model


def _new_marker(frozen: Sequence[FrozenLayer]) -> _Marker:
    return _Marker({id(item.layer): item.policy.code for item in frozen})


def _require_request_rows(callee: Callee, frozen: Sequence[FrozenLayer]) -> None:
    """Trace once with a known number of rows: each BLN layer must see just these."""
    marker = _new_marker(frozen)
    with marked_calls(marker):
        tf.function(callee, autograph=False).get_concrete_function(*callee.tensor_specs(_PROBE_ROWS))
    for layer, rows in zip(marker.calls, marker.rows, strict=True):
        if rows != _PROBE_ROWS:
            raise UnsupportedModelError(
                f"Expected axis 0 of layer {layer.name!r} to be the request's rows. Received: {rows} for "
                f"{_PROBE_ROWS} rows, so another dimension is folded into it. Move the layer before the reshape."
            )


def _convert(function: Any, callee: Callee, opset: int) -> onnx.ModelProto:
    model: onnx.ModelProto
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy deprecations inside the converter
            model, _ = tf2onnx.convert.from_function(
                function,
                input_signature=callee.tensor_specs(),
                opset=opset,
                custom_op_handlers={"PyFuncStateless": (_to_custom_node, [])},
                extra_opset=[helper.make_opsetid(DOMAIN, 1)],
            )
    except Exception as error:  # the converter raises whatever its handlers meet
        raise UnsupportedModelError(f"tf2onnx cannot convert the model: {error}") from error
    return model


def _to_custom_node(context: Any, node: Any, _name: str, _arguments: Any) -> None:
    call = json.loads(node.get_attr_str("token"))["bln_call"]
    for name in list(node.attr):
        del node.attr[name]
    node.type, node.domain = OP_TYPE, DOMAIN
    node.set_attr("call", call)
    context.set_shape(node.output[0], context.get_shape(node.input[0]))
    context.set_dtype(node.output[0], context.get_dtype(node.input[0]))


def marked_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the custom nodes of the main graph, in order."""
    return [node for node in model.graph.node if node.domain == DOMAIN]


def _fill_in(model: onnx.ModelProto, marker: _Marker) -> None:
    """Give each custom node its attributes and tables; as many nodes as calls, or a BLN layer was lost."""
    nodes = marked_nodes(model)
    found = sorted(helper.get_node_attr_value(node, "call") for node in nodes)
    if found != list(range(len(marker.calls))):
        raise UnsupportedModelError(
            f"Expected {len(marker.calls)} marked Batch Layer Normalization nodes in the main graph, one a call. "
            f"Received: {len(nodes)}. A layer inside a loop, or one whose output is not used, cannot be exported."
        )
    stored: set[str] = set()
    for node in nodes:
        call = helper.get_node_attr_value(node, "call")
        layer = marker.calls[call]
        del node.attribute[:]
        w_b, w_f = layer.branch_weights
        node.attribute.extend(
            [
                helper.make_attribute("m", layer.batch_size),
                # Written as text: an ONNX float attribute is float32, and the tables are folded in float64.
                helper.make_attribute("epsilon", repr(layer.epsilon)),
                helper.make_attribute("w_b", repr(w_b)),
                helper.make_attribute("w_f", repr(w_f)),
                helper.make_attribute("policy", marker.policies[id(layer)]),
                helper.make_attribute("layer", layer.name),
                helper.make_attribute("dtype", marker.dtypes[call]),
            ]
        )
        tables = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
        for name in TABLES:
            key = f"{layer.path}/{name}"
            node.input.append(key)
            if key not in stored:
                stored.add(key)
                table = np.asarray(tables[name].numpy(), np.float64)
                model.graph.initializer.append(numpy_helper.from_array(table, key))


def _name_rows(model: onnx.ModelProto, callee: Callee) -> None:
    """Name inputs and outputs as the signature does, and their first dimension `rows`."""
    graph = model.graph
    for values, specs in ((graph.input, callee.signature.inputs), (graph.output, callee.signature.outputs)):
        by_name = {value.name.split(":")[0]: value for value in values}
        for spec in specs:
            value = by_name.get(spec.name)
            if value is None:
                raise UnsupportedModelError(f"The converter lost {spec.name!r}. Received: {sorted(by_name)}.")
            _rename(graph, value.name, spec.name)
            value.name = spec.name
            value.type.tensor_type.shape.dim[0].dim_param = ROWS
            for dim, size in zip(list(value.type.tensor_type.shape.dim)[1:], spec.shape[1:], strict=True):
                dim.dim_value = size
    del graph.value_info[:]  # its dimension names are the converter's; shape inference finds the shapes again


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    if old == new:
        return
    for node in graph.node:
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if value == old:
                    values[index] = new
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, old, new)
