"""The model's signature, its call by flat inputs, and the SavedModel as TensorFlow Serving reads it."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from bln_serve.errors import UnsupportedModelError
from bln_serve.signature import ModelSignature, TensorSpec

# What NumPy, ONNX and Triton's configuration all have a name for.
_DTYPES = (
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)


@dataclass(frozen=True)
class Callee:
    """A Keras model as a function of named tensors.

    Attributes:
        model: the Keras model.
        signature: its inputs and outputs, the first dimension of each free.
    """

    model: Any
    signature: ModelSignature

    def __call__(self, *tensors: Any) -> dict[str, Any]:
        """Run inference on one tensor an input, in the signature's order, and return the outputs by name."""
        outputs = self.model(self.pack(tensors), training=False)
        return dict(zip((spec.name for spec in self.signature.outputs), keras.tree.flatten(outputs), strict=True))

    def pack(self, flat: Any) -> Any:
        """Arrange one value an input as the model takes them."""
        return keras.tree.pack_sequence_as(_input_structure(self.model), list(flat))

    def flat_inputs(self) -> list[Any]:
        """Return the model's symbolic inputs, in the signature's order."""
        return list(keras.tree.flatten(self.model.inputs))

    def tensor_specs(self, rows: int | None = None) -> list[Any]:
        """Return the inputs as TensorFlow describes them, with the number of rows free unless given."""
        return [tf.TensorSpec((rows, *spec.shape[1:]), spec.dtype, name=spec.name) for spec in self.signature.inputs]

    def named(self, tensors: Any) -> Mapping[str, Any]:
        """Give one value an input its name."""
        return dict(zip((spec.name for spec in self.signature.inputs), tensors, strict=True))


def describe(model: Any) -> Callee:
    """Read the signature of a functional or Sequential model.

    Raises:
        UnsupportedModelError: the model is not built, has an input with an unknown or missing dimension, or an output
            whose rows cannot be the inputs' rows.
    """
    if not getattr(model, "inputs", None) or not getattr(model, "outputs", None):
        raise UnsupportedModelError(
            f"Expected a functional or Sequential model with known inputs. Received: {type(model).__name__} without. "
            "Wrap it: keras.Model(inputs, model(inputs)) with inputs = keras.Input(...)."
        )
    inputs = tuple(_spec("input", _plain(tensor.name), tensor) for tensor in keras.tree.flatten(model.inputs))
    names = _output_names(model)
    outputs = tuple(_spec("output", name, tensor) for name, tensor in zip(names, model.outputs, strict=True))
    for kind, specs in (("inputs", inputs), ("outputs", outputs)):
        if len({spec.name for spec in specs}) != len(specs):
            raise UnsupportedModelError(
                f"Expected {kind} with different names. Received: {[spec.name for spec in specs]}."
            )
    return Callee(model, ModelSignature(inputs, outputs))


def write(callee: Callee, folder: Path) -> None:
    """Write the SavedModel with the signatures `serve` and `serving_default`."""
    archive = keras.export.ExportArchive()
    archive.track(callee.model)
    archive.add_endpoint("serve", _endpoint(callee), input_signature=callee.tensor_specs())
    # Keras writes into its own folder and prints a description that nobody asked for.
    with contextlib.redirect_stdout(io.StringIO()):
        archive.write_out(str(folder), verbose=False)


def read(folder: Path) -> Callable[..., Mapping[str, Any]]:
    """Load a SavedModel's default signature, to be called with named tensors."""
    loaded = tf.saved_model.load(str(folder))
    function = loaded.signatures["serving_default"]

    # A signature does not keep its variables alive; the loaded object does.
    function._bln_owner = loaded

    def serve(**tensors: Any) -> Mapping[str, Any]:
        return {name: value.numpy() for name, value in function(**tensors).items()}

    return serve


def _endpoint(callee: Callee) -> Callable[..., dict[str, Any]]:
    def serve(*tensors: Any) -> dict[str, Any]:
        return callee(*tensors)

    return serve


def _input_structure(model: Any) -> Any:
    return (
        model.input if isinstance(model, keras.Model) and not isinstance(model, keras.Sequential) else model.inputs[0]
    )


def _output_names(model: Any) -> list[str]:
    if isinstance(model, keras.Sequential):
        return [_plain(model.layers[-1].name)]
    structure = model.output
    if isinstance(structure, dict):
        # Flattened as Keras flattens the outputs themselves, which need not be the order of writing.
        return list(keras.tree.flatten({name: name for name in structure}))
    return [_plain(name) for name in model.output_names]


def _plain(name: str) -> str:
    return name.split(":", maxsplit=1)[0].replace("/", "_")


def _spec(kind: str, name: str, tensor: Any) -> TensorSpec:
    shape = tuple(tensor.shape)
    if not shape or None in shape[1:]:
        raise UnsupportedModelError(
            f"Expected {kind} {name!r} to have rows and known dimensions behind them. Received: shape {shape}. "
            "Give the model an Input with a fixed shape."
        )
    if str(tensor.dtype) not in _DTYPES:
        raise UnsupportedModelError(
            f"Expected {kind} {name!r} to be one of {', '.join(_DTYPES)}. Received: {tensor.dtype}."
        )
    return TensorSpec(name, str(tensor.dtype), (None, *shape[1:]))
