"""The same model under another statistics policy: a transformation that returns a new model and changes nothing.

The copy goes through Keras's own `.keras` format, so it holds all that a saved model would, vocabularies included, and
then takes over what that format leaves out: the state of random generators. The optimizer is built from its own config
and takes over its variables, so that training goes on with the same numbers.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from bln_serve.errors import UnsupportedModelError, UsageError
from bln_serve.layers.population import bln_layers
from bln_serve.statistics import StatisticsPolicy


def with_statistics(model: Any, policy: StatisticsPolicy | str) -> Any:
    """Return a copy of a model whose BLN layers have another statistics policy.

    Args:
        model: a built Keras model with BLN layers at any depth: functional, Sequential, or a subclass that Keras can
            save, which is one with `get_config` or with a constructor of plain arguments. It is not changed.
        policy: for every layer; a text as `StatisticsPolicy.parse` reads it, where what it does not name stays as each
            layer has it.

    Returns:
        A new model with the same weights, population estimates and `trainable` flags. If `model` is compiled, so is
        the copy, with the optimizer's state: it trains on with the same numbers. Training itself uses the mini-batch's
        statistics under every policy; a policy acts in evaluate, predict, validation, and in layers that are frozen.

    Raises:
        UsageError: `model` is no Keras model, is not built or holds no BLN layer, or `policy` cannot be read.
        UnsupportedModelError: Keras cannot copy the model, or its custom `compile` cannot be repeated.
    """
    policies = _policies(model, policy)
    own_compile = _has_own_compile(model)
    copied = _copy(model, with_compile=own_compile)
    for layer, chosen in zip(bln_layers(copied), policies, strict=True):
        layer.policy = chosen
    if model.compiled and not own_compile:
        _compile_like(copied, model)
    return copied


def _policies(model: Any, policy: StatisticsPolicy | str) -> list[StatisticsPolicy]:
    """Return the policy of each BLN layer, in the order of `bln_layers`."""
    if not isinstance(model, keras.Model):
        raise UsageError(f"Expected a Keras model. Received: {model!r}. Load a file with keras.saving.load_model.")
    layers = bln_layers(model)
    if not layers:
        raise UsageError(
            f"Expected a model with Batch Layer Normalization layers. Received: {model.name!r}, which holds none."
        )
    if not model.built or not all(layer.built for layer in layers):
        raise UsageError(
            f"Expected a built model, which has weights to keep. Received: {model.name!r}, which is not built. Call it "
            "once, or give it an Input."
        )
    if isinstance(policy, StatisticsPolicy):
        return [policy] * len(layers)
    return [StatisticsPolicy.parse(policy, layer.policy) for layer in layers]


def _copy(model: Any, with_compile: bool) -> Any:
    """Return a copy by way of a `.keras` file."""
    # Classes that nobody registered are named to Keras here: this model holds them, so no module need be looked up.
    classes = {type(layer).__name__: type(layer) for layer in model._flatten_layers()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        try:
            with warnings.catch_warnings():
                # That a lambda is unsafe in a file: this file ends with the block.
                warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`", UserWarning)
                model.save(file)
            # Not in safe mode: what would run is a function of this very model, which the caller already holds.
            copied = keras.saving.load_model(file, custom_objects=classes, compile=with_compile, safe_mode=False)
        except Exception as error:  # whatever an object that was not made for saving provokes in Keras
            raise _not_copied(model.name, error) from error
    pairs = list(zip(model._flatten_layers(), copied._flatten_layers(), strict=False))
    if any(type(original) is not type(layer) for original, layer in pairs) or len(pairs) != _layer_count(model):
        raise _not_copied(model.name, "the copy has other layers")
    for original, layer in pairs:  # a subclass may lose on the way what it sets outside of its constructor
        layer.trainable = original.trainable
    for one, other in zip(model.variables, copied.variables, strict=True):  # also the state of random generators
        other.assign(one)
    return copied


def _layer_count(model: Any) -> int:
    return len(list(model._flatten_layers()))


def _not_copied(what: str, why: object) -> UnsupportedModelError:
    kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
    return UnsupportedModelError(
        f"Expected a model that Keras can save and load again. Received: {what!r}, where that failed: {kind}{why}. A "
        "subclass needs get_config and from_config; register what is your own with "
        "keras.saving.register_keras_serializable."
    )


def _has_own_compile(model: Any) -> bool:
    """Whether compiling is the model's own, and so for Keras to repeat."""
    if not model.compiled or type(model).compile is keras.Model.compile:
        return False
    if type(model).compile_from_config is keras.Model.compile_from_config:
        raise UnsupportedModelError(
            f"Expected {type(model).__name__}, which has its own compile(), to have its own get_compile_config() and "
            "compile_from_config() as well. Received: a model without. Add them, or copy the model before compiling it."
        )
    return True


def _compile_like(copied: Any, model: Any) -> None:
    # The arguments themselves, not their serialised form, which a loss that nobody registered does not have.
    arguments: Mapping[str, Any] = model._compile_config.config
    changed = {
        "optimizer": _same_kind(model.optimizer),
        "metrics": keras.tree.map_structure(_fresh_metric, arguments["metrics"]),
        "weighted_metrics": keras.tree.map_structure(_fresh_metric, arguments["weighted_metrics"]),
        **{name: getattr(model, name) for name in ("run_eagerly", "steps_per_execution", "jit_compile")},
    }
    # A LossScaleOptimizer is there already where one is wanted.
    copied.compile(**{**arguments, **changed}, auto_scale_loss=False)
    _take_over_state(copied, model)


def _same_kind(item: Any) -> Any:
    try:
        return type(item).from_config(item.get_config())
    except Exception as error:  # as in _copy
        raise _not_copied(item.name, error) from error


def _fresh_metric(metric: Any) -> Any:
    """Return a metric that shares no state with `metric`; a name or a function has none."""
    return _same_kind(metric) if isinstance(metric, keras.metrics.Metric) else metric


def _take_over_state(copied: Any, model: Any) -> None:
    """Copy the optimizer's variables, which belong to the weights that were trainable when it was built."""
    before, after = model.optimizer, copied.optimizer
    if before.built:
        twins = {id(one): other for one, other in zip(model.weights, copied.weights, strict=True)}
        after.build([twins[id(variable)] for variable in before._trainable_variables])
        for one, other in zip(before.variables, after.variables, strict=True):
            other.assign(one)
