"""TensorFlow operators that the converter does not know, in those that it does.

    Erfc     erfc(x) = 1 - erf(x)         Keras's gelu
    Expm1    expm1(x) = exp(x) - 1        Keras's celu

TensorFlow has them for precision where the answer is next to 0. Here it is off by the rounding of 1 there, 6e-8 in
float32, beside activations of about 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tf2onnx.utils import map_onnx_to_numpy_type

Handler = Callable[[Any, Any, str, Any], None]


def _erfc(context: Any, node: Any, name: str, _arguments: Any) -> None:
    erf = _beside(context, node, "Erf")
    _replace(context, node, name, "Sub", [_one(context, node, name), erf])


def _expm1(context: Any, node: Any, name: str, _arguments: Any) -> None:
    exp = _beside(context, node, "Exp")
    _replace(context, node, name, "Sub", [exp, _one(context, node, name)])


def _beside(context: Any, node: Any, op_type: str) -> str:
    """Add an operator that takes what a node takes, and return its output."""
    return str(context.make_node(op_type, list(node.input), **_alike(context, node)).output[0])


def _one(context: Any, node: Any, name: str) -> str:
    dtype = map_onnx_to_numpy_type(context.get_dtype(node.output[0]))
    return str(context.make_const(f"{name}/one", np.ones((), dtype)).output[0])


def _replace(context: Any, node: Any, name: str, op_type: str, inputs: list[str]) -> None:
    outputs, alike = list(node.output), _alike(context, node)
    context.remove_node(name)
    context.make_node(op_type, inputs, name=name, outputs=outputs, **alike)


def _alike(context: Any, node: Any) -> dict[str, Any]:
    output = node.output[0]
    return {"shapes": [context.get_shape(output)], "dtypes": [context.get_dtype(output)]}


HANDLERS: Mapping[str, tuple[Handler, list[Any]]] = {"Erfc": (_erfc, []), "Expm1": (_expm1, [])}
"""As `tf2onnx.convert.from_function` takes them."""
