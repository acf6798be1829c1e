"""What validation data is scored with: the loss and the metrics a model was compiled with, or Keras's by name.

What a .keras file was compiled with is built only as far as it is needed, and only where it names nothing but Keras's
own: see loading.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from bln_serve.errors import UsageError
from bln_serve.export import loading
from bln_serve.export.selection import named_scores

_LOSS = ("loss", "loss_weights")
_METRICS = ("metrics", "weighted_metrics")
_BY_SHAPE = ("acc", "accuracy", "ce", "crossentropy")  # Keras chooses by the shapes it meets

_Take = Callable[[Sequence[str]], dict[str, Any]]
"""Takes names of arguments of `compile`, and gives what a model was compiled with."""


@dataclass(frozen=True)
class Scoring:
    """A loss and metrics, as `model.compile` takes them.

    Attributes:
        loss: a Keras loss or its name, or a structure of them as the model's outputs.
        metrics: the same, or None. Their state is this scoring's own.
        loss_name: for people.
        notes: what was decided on the way, for people.
        loss_weights: of several outputs' losses, or None.
        weighted_metrics: as `metrics`; without sample weights they are no different.
    """

    loss: Any
    metrics: Any
    loss_name: str
    notes: tuple[str, ...] = ()
    loss_weights: Any = None
    weighted_metrics: Any = None

    def compile_arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `model.compile`, with metrics of their own state each time."""
        fresh = {name: keras.tree.map_structure(_fresh, getattr(self, name)) for name in _METRICS}
        return {**{name: getattr(self, name) for name in _LOSS}, **fresh}


@dataclass(frozen=True)
class Compiled:
    """What is taken from how a model was compiled: the arguments of its `compile`, and what to tell about them."""

    parts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def scoring(model: Any, path: Path | None, loss: str | None, metrics: Sequence[str]) -> Scoring:
    """Choose the loss and the metrics.

    Args:
        model: the Keras model.
        path: the file it came from, whose compiled loss and metrics count; None for a model's own.
        loss: the name of a Keras loss; None for the compiled one.
        metrics: names of Keras metrics; without any, the compiled ones, if there are any.

    Raises:
        UsageError: as `compiled`; names are given for a model with several outputs, or the last layer of a model does
            not tell whether its outputs are logits.
        ModelLoadError: the file cannot be read.
    """
    found = compiled(model if path is None else path, loss, metrics)
    if (loss is not None or metrics) and len(getattr(model, "outputs", None) or [None]) > 1:
        raise UsageError(
            f"Expected a model with one output for --loss and --metric. Received: {len(model.outputs)} outputs. "
            "Compile the model with a loss for each, save it as .keras, and leave both out."
        )
    notes = list(found.notes)
    parts = dict(found.parts)
    if loss is not None:
        parts["loss"] = named_scores.loss(loss, model, notes)
    if metrics:
        logits = named_scores.takes_logits(parts["loss"])
        parts["metrics"] = [named_scores.metric(name, model, logits, notes) for name in metrics]
    return Scoring(**parts, loss_name=_name(parts["loss"]), notes=tuple(dict.fromkeys(notes)))


def compiled(source: Any, loss: str | None, metrics: Sequence[str]) -> Compiled:
    """Check names, and take what they leave open from how a model was compiled. Needs no model for a file.

    Args:
        source: the model's file, or a Keras model.
        loss: as for `scoring`.
        metrics: as for `scoring`.

    Returns:
        The arguments of `compile` that are needed, all of them present; None where there is nothing.

    Raises:
        UsageError: a name is no Keras loss or metric, there is no loss, or what is compiled names code that is not
            trusted or cannot be built.
        ModelLoadError: the file cannot be read.
    """
    if loss is not None:
        named_scores.find(loss, "loss")
    for name in metrics:
        named_scores.find(name, "metric")
    take = _in_file(source) if isinstance(source, Path) else _of_model(source)
    parts: dict[str, Any] = dict.fromkeys((*_LOSS, *_METRICS))
    if loss is None:
        parts |= take(_LOSS)
        _require_loss(parts["loss"], source)
    if metrics:
        return Compiled(parts)
    try:
        return Compiled({**parts, **take(_METRICS)})
    except UsageError as error:
        if loss is None:
            raise
        return Compiled(parts, (f"The compiled metrics are left out. {error}",))


def _of_model(model: Any) -> _Take:
    """Return what gives a model's own arguments of `compile`, as they were passed."""
    own = getattr(model, "_compile_config", None) if getattr(model, "compiled", False) else None
    arguments: Mapping[str, Any] = own.config if own else {}
    return lambda names: {name: keras.tree.map_structure(_fresh, arguments.get(name)) for name in names}


def _in_file(path: Path) -> _Take:
    """Return what builds a file's arguments of `compile`."""
    config = loading.compile_config(path)
    return lambda names: _build(path, {name: config.get(name) for name in names})


def _build(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Build some arguments of `compile` from what a file says of them."""
    what = next(iter(parts))
    if untrusted := loading.untrusted_compiled(parts):
        raise UsageError(
            f"Expected {what} of Keras's own. Received: {path.name}, which was compiled with {untrusted[0]}. No code "
            "that a file names is imported or run: name Keras's with --loss and --metric, or register yours with "
            "keras.saving.register_keras_serializable and call from Python."
        )
    try:
        built = {name: keras.saving.deserialize_keras_object(part, safe_mode=True) for name, part in parts.items()}
        _require_known(built.get("loss"), keras.losses.get)
        _require_known([built.get(name) for name in _METRICS], keras.metrics.get)
        return built
    except Exception as error:  # whatever a damaged or foreign part provokes in Keras
        raise UsageError(
            f"Expected {what} that Keras can build. Received: {path.name}, where that failed: "
            f"{str(error)[:200]}. Name Keras's with --loss and --metric."
        ) from error


def _require_known(part: Any, get: Callable[[Any], Any]) -> None:
    """Let Keras look up what a file gives by its name alone."""
    for each in keras.tree.flatten(part):
        if str(each).lower() not in _BY_SHAPE:
            get(each)


def _require_loss(loss: Any, source: Any) -> None:
    if not any(each is not None for each in keras.tree.flatten(loss)):
        name = source.name if isinstance(source, Path | keras.Model) else repr(source)
        raise UsageError(
            f"Expected a model with a compiled loss, saved as .keras, or --loss. Received: {name}, which has none. "
            "Name a Keras loss, such as --loss sparse_categorical_crossentropy."
        )


def _fresh(metric: Any) -> Any:
    """Return a metric that shares no state with `metric`; a name or a function has none."""
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        return type(metric).from_config(metric.get_config())
    except Exception as error:  # whatever a metric that was not made for saving provokes in Keras
        raise UsageError(
            f"Expected metrics that Keras can copy. Received: {metric.name!r}, where that failed: {error}. Give it a "
            "get_config(), and register what is your own with keras.saving.register_keras_serializable."
        ) from error


def _name(loss: Any) -> str:
    """Return a loss's name, or several."""
    if isinstance(loss, Mapping):
        return ", ".join(f"{key}: {_name(each)}" for key, each in loss.items() if each is not None)
    if isinstance(loss, list | tuple):
        return ", ".join(_name(each) for each in loss if each is not None)
    return loss if isinstance(loss, str) else str(getattr(loss, "name", None) or getattr(loss, "__name__", loss))
