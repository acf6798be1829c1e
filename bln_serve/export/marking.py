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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Call:
    """One marked call: of which layer, and on what."""

    layer: BatchLayerNormalization
    rows: int | None
    dtype: str


class _Marker:
    """Marks calls while a graph is traced, and remembers them in order."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def __call__(self, layer: BatchLayerNormalization, x: Any) -> Any:
        x = tf.cast(x, layer.compute_dtype)
        # The index makes each call's token its own: equal stateless operations would be merged into one.
        token = json.dumps({"bln_call": len(self.calls)})
        self.calls.append(_Call(layer, x.shape[0], layer.compute_dtype))
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
    _require_request_rows(callee)
    marker = _Marker()
    function = tf.function(callee, input_signature=callee.tensor_specs(), autograph=False)
    with marked_calls(marker):
        function.get_concrete_function()
    model = _convert(function, callee, opset)
    _fill_in(model, marker.calls, {item.layer: item.policy.code for item in frozen})
    _name_rows(model, callee)
    return model


def _require_request_rows(callee: Callee) -> None:
    """Trace once with a known number of rows: each BLN layer must see just these."""
    marker = _Marker()
    with marked_calls(marker):
        try:
            tf.function(callee, autograph=False).get_concrete_function(*callee.tensor_specs(_PROBE_ROWS))
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            raise UnsupportedModelError(
                f"Expected a model that takes any number of rows. Received: {error} for {_PROBE_ROWS} rows. "
                "A stateful recurrent layer, for one, keeps the batch size that it was built with."
            ) from error
    for call in marker.calls:
        if call.rows != _PROBE_ROWS:
            raise UnsupportedModelError(
                f"Expected axis 0 of layer {call.layer.name!r} to be the request's rows. Received: {call.rows} for "
                f"{_PROBE_ROWS} rows, so another dimension is folded into it. Move the layer before the reshape."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter, which logs tracebacks of what it then raises, and NumPy's deprecations inside it."""
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _convert(function: Any, callee: Callee, opset: int) -> onnx.ModelProto:
    model: onnx.ModelProto
    try:
        with _quiet():
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


def _fill_in(model: onnx.ModelProto, calls: Sequence[_Call], policies: Mapping[BatchLayerNormalization, str]) -> None:
    """Give each custom node its attributes and tables; as many nodes as calls, or a BLN layer was lost."""
    nodes = marked_nodes(model)
    found = sorted(helper.get_node_attr_value(node, "call") for node in nodes)
    if found != list(range(len(calls))):
        raise UnsupportedModelError(
            f"Expected {len(calls)} marked Batch Layer Normalization nodes in the main graph, one a call. "
            f"Received: {len(nodes)}. A layer inside a loop, or one whose output is not used, cannot be exported."
        )
    tables: dict[str, onnx.TensorProto] = {}
    for node in nodes:
        call = calls[helper.get_node_attr_value(node, "call")]
        del node.attribute[:]
        node.attribute.extend(_attributes(call, policies[call.layer]))
        stored = _tables(call.layer)
        node.input.extend(stored)
        tables |= stored
    model.graph.initializer.extend(tables.values())


def _attributes(call: _Call, policy: str) -> list[onnx.AttributeProto]:
    layer = call.layer
    w_b, w_f = layer.branch_weights
    facts: Mapping[str, int | str] = {
        "m": layer.batch_size,
        # Written as text: an ONNX float attribute is float32, and the tables are folded in float64.
        "epsilon": repr(layer.epsilon),
        "w_b": repr(w_b),
        "w_f": repr(w_f),
        "policy": policy,
        "layer": layer.name,
        "dtype": call.dtype,
    }
    return [helper.make_attribute(name, value) for name, value in facts.items()]


def _tables(layer: BatchLayerNormalization) -> dict[str, onnx.TensorProto]:
    """Return a layer's tables in float64, in the order of the node's inputs, by a name of their own."""
    values = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
    names = {f"{layer.path}/{name}": values[name].numpy() for name in TABLES}
    return {name: numpy_helper.from_array(np.asarray(table, np.float64), name) for name, table in names.items()}


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
