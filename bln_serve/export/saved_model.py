"""The model's signature, its call by flat inputs, and the SavedModel as TensorFlow Serving reads it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from bln_serve.errors import UnsupportedModelError
from bln_serve.manifest import MINI_BATCHES
from bln_serve.signature import Arrays, ModelSignature, TensorSpec

SERVE_MINI_BATCHES = "serve_mini_batches"

# What TensorFlow takes for the name of a function's argument.
_INPUT_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.>-]*")

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
        return self.by_name(self.model(self.pack(tensors), training=False))

    def by_name(self, outputs: Any) -> dict[str, Any]:
        """Give the model's outputs their names."""
        return dict(zip((spec.name for spec in self.signature.outputs), keras.tree.flatten(outputs), strict=True))

    def pack(self, flat: Any) -> Any:
        """Arrange one value an input as the model takes them."""
        return keras.tree.pack_sequence_as(_input_structure(self.model), list(flat))

    def flat_inputs(self) -> list[Any]:
        """Return the model's symbolic inputs, in the signature's order."""
        return list(keras.tree.flatten(self.model.inputs))

    def twin(self) -> Any:
        """Return another Keras model of the same layers, not compiled, which takes a list of inputs."""
        sequential = isinstance(self.model, keras.Sequential)
        return keras.Model(self.flat_inputs(), self.model.outputs[0] if sequential else self.model.output)

    def tensor_specs(self, rows: int | None = None) -> list[Any]:
        """Return the inputs as TensorFlow describes them, with the number of rows free unless given."""
        return [tf.TensorSpec((rows, *spec.shape[1:]), spec.dtype, name=spec.name) for spec in self.signature.inputs]


def functional(model: Any) -> Any:
    """Return a model with known inputs: the model itself, or a functional one around a subclassed one.

    A subclassed model remembers the shapes that it was built with and no dtypes: its inputs are taken for float32, as
    Keras's own export does.

    Raises:
        UnsupportedModelError: the model is not built.
    """
    if getattr(model, "inputs", None) and getattr(model, "outputs", None):
        return model
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    try:
        (shape,) = shapes
        inputs = _symbolic(shape)
        return keras.Model(inputs, model(inputs), name=model.name)
    except Exception as error:  # whatever the model's own code makes of symbolic tensors
        raise UnsupportedModelError(
            f"Expected a built model with known inputs. Received: {type(model).__name__} "
            f"{'without' if not shapes else f'that was built with {shapes}: {error}'}. "
            "Wrap it: keras.Model(inputs, model(inputs)) with inputs = keras.Input(...)."
        ) from error


def _symbolic(shape: Any) -> Any:
    """Return an input of a shape, or one of each by name or in order."""
    if isinstance(shape, dict):
        return {name: keras.Input(each[1:], name=name) for name, each in shape.items()}
    if isinstance(shape[0], list | tuple):
        return [keras.Input(each[1:], name=f"input_{place}") for place, each in enumerate(shape)]
    return keras.Input(shape[1:], name="input")


def describe(model: Any) -> Callee:
    """Read the signature of a model with known inputs.

    Raises:
        UnsupportedModelError: the model has an input with an unknown or missing dimension, or an output whose rows
            cannot be the inputs' rows.
    """
    inputs = tuple(_spec("input", _plain(tensor.name), tensor) for tensor in keras.tree.flatten(model.inputs))
    names = _output_names(model)
    if len(names) != len(model.outputs):
        raise UnsupportedModelError(
            "Expected outputs that are one tensor, a list or a dict of tensors. Received: "
            f"{len(model.outputs)} tensors under the names {names}. Give each a name of its own: "
            "keras.Model(inputs, {name: tensor, ...})."
        )
    if passed := {id(tensor) for tensor in model.outputs} & {id(tensor) for tensor in model.inputs}:
        raise UnsupportedModelError(
            f"Expected outputs that the model computes. Received: {len(passed)} of its inputs among them. Leave it "
            "out, or let a layer pass it on: keras.layers.Identity()(x)."
        )
    outputs = tuple(_spec("output", name, tensor) for name, tensor in zip(names, model.outputs, strict=True))
    for spec in inputs:
        if not _INPUT_NAME.fullmatch(spec.name) or spec.name == MINI_BATCHES:
            raise UnsupportedModelError(
                "Expected an input name of letters, digits, '_', '.', '-' and '>', beginning with a letter, a digit or "
                f"'.', other than {MINI_BATCHES!r}. Received: {spec.name!r}. Rename the model's Input."
            )
    for kind, specs in (("inputs", inputs), ("outputs", outputs)):
        if len({spec.name for spec in specs}) != len(specs):
            raise UnsupportedModelError(
                f"Expected {kind} with different names. Received: {[spec.name for spec in specs]}."
            )
    return Callee(model, ModelSignature(inputs, outputs))


def require_rows(output: str, received: int | None, rows: int) -> None:
    """Make sure that an output has as many rows as the inputs, where that is known.

    Raises:
        UnsupportedModelError: it has not.
    """
    if received not in (None, rows):
        raise UnsupportedModelError(
            f"Expected output {output!r} to have a row for each row of the inputs. Received: {received} for {rows} "
            "rows. Take what is not a row's own answer out of the model, or give every row its copy."
        )


def write(callee: Callee, folder: Path) -> None:
    """Write the SavedModel with the signatures `serving_default`, `serve`, which is the same, and `serve_mini_batches`.

    `serve_mini_batches` takes one tensor more, `mini_batches`, int64 without a dimension: the rows are so many
    mini-batches of equal size, and each gets the answer that `serve` gives it alone. A number that does not divide the
    rows is an InvalidArgumentError.

    Raises:
        UnsupportedModelError: TensorFlow cannot save the model.
    """
    module = tf.Module()
    # The functions read them, and only what the module holds is saved. Keras's own archive traces the model four times.
    module.weights = [variable.value for variable in callee.model.variables]
    module.serve = _function(callee, callee.tensor_specs())
    count = tf.TensorSpec((), tf.int64, name=MINI_BATCHES)
    module.serve_mini_batches = _function(_one_by_one(module.serve), [*callee.tensor_specs(), count])
    signatures = {
        "serving_default": module.serve,
        "serve": module.serve,
        SERVE_MINI_BATCHES: module.serve_mini_batches,
    }
    try:
        tf.saved_model.save(module, str(folder), signatures=signatures)
    except (AssertionError, ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"Expected a model that TensorFlow can save. Received: {error} A layer must hold each variable, table and "
            "seed generator that it uses as its own attribute."
        ) from error


def _function(call: Callable[..., dict[str, Any]], specs: Sequence[Any]) -> Any:
    return tf.function(call, input_signature=specs, autograph=False)


Serve = Callable[[Arrays, int], Arrays]
"""Takes rows by the input's name, and of how many mini-batches they are."""


def read(folder: Path) -> Serve:
    """Load a SavedModel, to be called as a client of TensorFlow Serving calls it."""
    loaded = tf.saved_model.load(str(folder))

    def serve(inputs: Arrays, mini_batches: int = 1) -> Arrays:
        tensors = {name: tf.constant(array) for name, array in inputs.items()}
        if mini_batches == 1:
            answers = loaded.signatures["serving_default"](**tensors)
        else:
            count = {MINI_BATCHES: tf.constant(mini_batches, tf.int64)}
            answers = loaded.signatures[SERVE_MINI_BATCHES](**tensors, **count)
        return {name: value.numpy() for name, value in answers.items()}

    return serve


def _one_by_one(serve: Any) -> Callable[..., dict[str, Any]]:
    def serve_mini_batches(*tensors: Any) -> dict[str, Any]:
        *inputs, count = tensors
        rows = tf.shape(inputs[0], tf.int64)[0]
        words = f"Expected {MINI_BATCHES} to divide the number of rows."
        with tf.control_dependencies([tf.debugging.assert_equal(count * (rows // count), rows, words)]):
            parts = [tf.reshape(x, _shape(count, rows // count, *x.shape[1:])) for x in inputs]
        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, serve.get_concrete_function().structured_outputs)
        answers = tf.map_fn(lambda part: serve(*part), parts, fn_output_signature=specs)
        return {name: tf.reshape(y, _shape(rows, *y.shape[2:])) for name, y in answers.items()}

    return serve_mini_batches


def _shape(*lengths: Any) -> Any:
    return tf.stack([tf.cast(length, tf.int64) for length in lengths])


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
    if not shape or None in shape[1:] or 0 in shape[1:]:
        raise UnsupportedModelError(
            f"Expected {kind} {name!r} to have rows and known dimensions behind them. Received: shape {shape}. "
            "Give the model an Input with a fixed shape."
        )
    if str(tensor.dtype) not in _DTYPES:
        raise UnsupportedModelError(
            f"Expected {kind} {name!r} to be one of {', '.join(_DTYPES)}. Received: {tensor.dtype}."
        )
    return TensorSpec(name, str(tensor.dtype), (None, *shape[1:]))
