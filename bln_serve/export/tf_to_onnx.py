"""A traced function in ONNX: every marked call is one node `com.bln::Marked` with the attribute `call`, its index."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import tensorflow as tf
import tf2onnx
from onnx import helper, numpy_helper

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import tf_operators
from bln_serve.export.custom_ops import DOMAIN
from bln_serve.export.marks import call_index
from bln_serve.export.saved_model import Callee

ROWS = "rows"
"""The name of the batch dimension in the ONNX model."""

# The highest that the converter knows; onnx.version_converter takes the result further.
CONVERTER_OPSET = 18


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


def convert(function: Any, callee: Callee) -> onnx.ModelProto:
    """Convert a function whose calls were marked while it was traced.

    Args:
        function: a tf.function, called with the model's inputs in the signature's order.
        callee: whose signature names the inputs and outputs.

    Raises:
        UnsupportedModelError: the converter does not know an operator, or lost an input or output.
    """
    model: onnx.ModelProto
    try:
        with _quiet():
            model, _ = tf2onnx.convert.from_function(
                function,
                input_signature=callee.tensor_specs(),
                opset=CONVERTER_OPSET,
                custom_op_handlers={**tf_operators.HANDLERS, "PyFuncStateless": (_to_custom_node, [])},
                extra_opset=[helper.make_opsetid(DOMAIN, 1)],
            )
    except Exception as error:  # the converter raises whatever its handlers meet
        raise UnsupportedModelError(f"tf2onnx cannot convert the model: {error}") from error
    _put_constants_in(model, function.get_concrete_function())
    _name_rows(model, callee)
    return model


def _put_constants_in(model: onnx.ModelProto, traced: Any) -> None:
    """Make initializers of the tensors that the model's own code made before, which the converter takes for inputs.

    Keras's Normalization holds such ones.
    """
    constants = {inner.name: outer for outer, inner in traced.graph.captures if outer.dtype != tf.resource}
    taken = [value for value in model.graph.input if value.name in constants]
    for value in taken:
        model.graph.initializer.append(numpy_helper.from_array(constants[value.name].numpy(), value.name))
        model.graph.input.remove(value)


def _to_custom_node(context: Any, node: Any, _name: str, _arguments: Any) -> None:
    call = call_index(node.get_attr_str("token"))
    outputs = [(context.get_shape(output), context.get_dtype(output)) for output in node.output]
    for name in list(node.attr):
        del node.attr[name]
    node.type, node.domain = "Marked", DOMAIN
    node.set_attr("call", call)
    for output, (shape, dtype) in zip(node.output, outputs, strict=True):
        context.set_shape(output, shape)
        context.set_dtype(output, dtype)


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
            element_type = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(spec.name, element_type, [ROWS, *spec.shape[1:]]))
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
