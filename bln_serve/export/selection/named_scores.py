"""Keras's losses and metrics by name, made for the outputs of a model.

A crossentropy must know whether the outputs are probabilities or logits. The model's last layer tells: with a softmax
or a sigmoid they are probabilities. Metrics follow the loss: of logits, those above 0 are probabilities above one half.
"""

import difflib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import keras

from bln_serve.errors import UsageError

_SHORT = {
    "bce": "BinaryCrossentropy",
    "kld": "KLDivergence",
    "mae": "MeanAbsoluteError",
    "mape": "MeanAbsolutePercentageError",
    "mse": "MeanSquaredError",
    "msle": "MeanSquaredLogarithmicError",
}
_BY_SHAPE = ("accuracy", "acc")  # Keras chooses between three by the shapes it meets
_NO_CHOICE = ("Loss", "Mean", "MeanMetricWrapper", "Metric", "Sum", "deserialize", "get", "serialize")
_PROBABILITIES = ("hard_sigmoid", "sigmoid", "softmax", "sparse_sigmoid", "sparsemax")
_PASS_ON = (
    "ActivityRegularization",
    "Cast",
    "Dropout",
    "Flatten",
    "GetItem",
    "Identity",
    "Permute",
    "Reshape",
    "Squeeze",
)


@cache
def _choices(kind: str) -> Mapping[str, Any]:
    """Return Keras's losses or metrics by the names that `compile` knows, and some more."""
    room = keras.losses if kind == "loss" else keras.metrics
    named = {name: item for name, item in vars(room).items() if name[0] != "_" and name not in _NO_CHOICE}
    classes = {name: item for name, item in named.items() if inspect.isclass(item)}
    functions = {name: item for name, item in named.items() if inspect.isfunction(item)}
    short = {name: classes[long] for name, long in _SHORT.items() if long in classes}
    return {**functions, **{_snake_case(name): item for name, item in classes.items()}, **classes, **short}


def _snake_case(name: str) -> str:
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def find(name: str, kind: str) -> Any:
    """Return a Keras loss or metric by its name.

    Args:
        name: of the class, in either spelling, or of the function; or short, such as mse.
        kind: "loss" or "metric".

    Returns:
        A class, a function, or `name` where Keras must see the shapes to choose.

    Raises:
        UsageError: there is none.
    """
    choices = _choices(kind)
    if kind == "metric" and name.lower() in _BY_SHAPE:
        return name
    found = choices.get(name.lower() if name.lower() in _SHORT else name)
    if found is None:
        near = difflib.get_close_matches(name, [*choices, *(_BY_SHAPE[:1] if kind == "metric" else ())])
        advice = f"Near it: {', '.join(near)}." if near else "Keras's documentation lists them."
        raise UsageError(f"Expected --{kind} with the name of a Keras {kind}. Received: {name!r}. {advice}")
    return found


def loss(name: str, model: Any, notes: list[str]) -> Any:
    """Make a loss.

    Args:
        name: as for `find`.
        model: with one output.
        notes: takes what is decided.

    Raises:
        UsageError: there is no such loss, it needs arguments, or the last layer does not tell what it must know.
    """
    found = find(name, "loss")
    if not inspect.isclass(found):
        return found
    return _made(found, name, **_logits_argument(found, name, model, None, notes))


def metric(name: str, model: Any, logits: bool | None, notes: list[str]) -> Any:
    """Make a metric that takes the outputs for what the loss takes them for.

    Args:
        name: as for `find`.
        model: with one output.
        logits: what `takes_logits` says of the loss.
        notes: takes what is decided.

    Returns:
        A metric, or its name where Keras must see the shapes to choose.

    Raises:
        UsageError: as for `loss`.
    """
    found = find(name, "metric")
    binary = logits and model.outputs[0].shape[-1] == 1
    if found == name:
        return _binary_accuracy(name) if binary else name
    if not inspect.isclass(found):
        return keras.metrics.MeanMetricWrapper(found, name=name)
    if found is keras.metrics.BinaryAccuracy and logits:
        return _binary_accuracy(name)
    arguments = _logits_argument(found, name, model, logits, notes)
    parameters = inspect.signature(found).parameters
    if logits and "from_logits" not in parameters and "thresholds" in parameters:
        arguments["thresholds"] = 0.0  # the logit of a probability of one half, Keras's default
    if "average" in parameters and parameters["average"].default is None:
        arguments["average"] = "macro"  # a number a class ranks nothing
        notes.append(f"{name} is the mean of the classes', each counting the same (average='macro')")
    return _made(found, name, **arguments, name=name)  # Keras would number the second of its kind


def _binary_accuracy(name: str) -> Any:
    """Return the accuracy of logits: above 0 is a probability above one half."""
    return keras.metrics.MeanMetricWrapper(keras.metrics.binary_accuracy, name=name, threshold=0.0)


def _logits_argument(found: Any, name: str, model: Any, logits: bool | None, notes: list[str]) -> dict[str, Any]:
    """Return `from_logits` for what has it."""
    if "from_logits" not in inspect.signature(found).parameters:
        return {}
    if logits is not None:
        return {"from_logits": logits}
    ending = _ending(model, name)
    notes.append(
        f"the outputs are taken for probabilities: the last layer has a {ending}"
        if ending
        else "the outputs are taken for logits: the last layer has no softmax or sigmoid"
    )
    return {"from_logits": ending is None}


def _made(found: Any, given: str, **arguments: Any) -> Any:
    try:
        return found(**arguments)
    except TypeError as error:
        raise UsageError(
            f"Expected a loss or metric that needs no arguments. Received: {given!r}: {error}. Compile the model "
            "with it."
        ) from error


def takes_logits(scored: Any) -> bool | None:
    """Whether a loss takes logits; None for one that is neither for logits nor for probabilities."""
    item = _choices("loss").get(scored, scored) if isinstance(scored, str) else scored
    if hasattr(item, "from_logits"):
        return bool(item.from_logits)
    argument = inspect.signature(item).parameters.get("from_logits") if callable(item) else None
    return None if argument is None else bool(argument.default)


def _ending(model: Any, name: str) -> str | None:
    """Return the activation that makes a model's output probabilities, or None."""
    tensor = (getattr(model, "outputs", None) or [None])[0]
    operation = model
    while tensor is not None:
        operation, node, place = tensor._keras_history
        kind = type(operation).__name__
        activation = getattr(getattr(operation, "layer", operation), "activation", None)
        for ending in (getattr(activation, "__name__", ""), _snake_case(kind)):
            if ending in _PROBABILITIES:
                return ending
        if isinstance(operation, keras.Model):
            tensor = operation.outputs[place] if getattr(operation, "outputs", None) else None
        elif kind in _PASS_ON or (kind == "Activation" and activation is keras.activations.linear):
            tensor = operation._inbound_nodes[node].input_tensors[0]
        elif type(operation).__module__.partition(".")[0] in ("keras", "bln_serve"):
            return None
        else:
            break
    raise UsageError(
        f"Expected a last layer that tells whether the outputs are logits, which {name} must know. Received: "
        f"{type(operation).__name__}. Compile the model with a loss that says from_logits, and leave --loss out."
    )
