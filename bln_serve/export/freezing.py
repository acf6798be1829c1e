"""Choosing the statistics policy of each BLN layer, and making sure that what it asks for was ever estimated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import numpy as np

from bln_serve.errors import UnsupportedModelError, UnusableStatisticsError, UsageError
from bln_serve.layers import BatchLayerNormalization, bln_layers
from bln_serve.statistics import LayerStatistics, StatisticsPolicy, in_words


@dataclass(frozen=True)
class FrozenLayer:
    """A BLN layer with the policy it is exported under.

    Attributes:
        layer: the Keras layer; it is not changed.
        policy: from the command line, or the layer's own flags.
        name: the layer's; numbered where layers of different nested models have the same.
    """

    layer: BatchLayerNormalization
    policy: StatisticsPolicy
    name: str

    @property
    def statistics(self) -> LayerStatistics:
        """What the layer contributes to the model's row coupling."""
        return LayerStatistics(self.name, self.policy.code, self.layer.batch_size)


def freeze(model: Any, statistics: str | None) -> tuple[FrozenLayer, ...]:
    """Choose the policy of every BLN layer of a model.

    Args:
        model: a built Keras model.
        statistics: as `StatisticsPolicy.parse` reads it, for every layer; None for each layer's own flags.

    Raises:
        UsageError: `statistics` cannot be read, or is given for a model without BLN layers.
        UnsupportedModelError: a layer is not built.
        UnusableStatisticsError: a layer has no usable estimate of a statistic that its policy stores.
    """
    layers = bln_layers(model)
    if statistics is not None and not layers:
        raise UsageError(
            "Expected a model with Batch Layer Normalization layers for --statistics. Received: one without."
        )
    for layer in layers:
        if not layer.built:
            raise UnsupportedModelError(
                f"Expected every layer to be built. Received: {layer.name!r}, which has no weights yet. Call the model "
                "on data once, or take the layer out."
            )
    frozen = tuple(
        FrozenLayer(
            layer, StatisticsPolicy.parse(statistics, layer.policy) if statistics is not None else layer.policy, name
        )
        for layer, name in zip(layers, _names(layers), strict=True)
    )
    problems = [
        f"  {item.name}: {problem}"
        for item in frozen
        for name in item.policy.stored
        if (problem := unusable(item.layer, name))
    ]
    if problems:
        more = "Train the model further, or take" if any(layer.batch_size > 1 for layer in layers) else "Take"
        raise UnusableStatisticsError(
            "Expected usable stored statistics where the policy asks for them. Received:\n"
            + "\n".join(problems)
            + f"\n{more} the statistics from the rows at hand: --statistics mini-batch."
        )
    return frozen


def _names(layers: Sequence[BatchLayerNormalization]) -> list[str]:
    names: list[str] = []
    for layer in layers:
        numbered = (f"{layer.name}_{number}" for number in count(2))
        names.append(next(name for name in chain([layer.name], numbered) if name not in names))
    return names


def unusable(layer: BatchLayerNormalization, statistic: str) -> str | None:
    """Return why a stored statistic cannot be used, or None if it can."""
    words = in_words(statistic)
    if not np.isfinite(layer.population[statistic].numpy()).all():
        return f"the stored {words} holds NaN or infinity"
    if statistic.endswith("var") and layer.batch_size == 1:
        return f"a {words} cannot be estimated at m = 1"
    steps = steps_of(layer, statistic)
    if not np.all(steps > 0):
        return f"the stored {words} was never updated" + _empty_slots(steps)
    return None


def steps_of(layer: BatchLayerNormalization, statistic: str) -> np.ndarray[Any, Any]:
    """Return how many training steps a stored statistic rests on: one number, or one for each slot."""
    counts = {"batch_mean": layer.mean_steps, "batch_var": layer.variance_steps}
    return np.asarray(counts.get(statistic, layer.slot_steps).numpy())


def _empty_slots(steps: np.ndarray[Any, Any]) -> str:
    empty = np.flatnonzero(steps == 0) if steps.ndim else np.array([], int)
    if empty.size in (0, steps.size):
        return ""
    return f" in {empty.size} of {steps.size} slots, the first of them slot {empty[0]}: no full batch was seen"


@contextmanager
def applied(model: Any, frozen: Sequence[FrozenLayer]) -> Iterator[None]:
    """Give each layer its policy inside the `with` block, and what it had before afterwards."""
    before = [item.layer.policy for item in frozen]
    try:
        _assign(model, [(item.layer, item.policy) for item in frozen])
        yield
    finally:
        _assign(model, [(item.layer, policy) for item, policy in zip(frozen, before, strict=True)])


def _assign(model: Any, policies: Sequence[tuple[BatchLayerNormalization, StatisticsPolicy]]) -> None:
    for layer, policy in policies:
        layer.policy = policy
    # Keras keeps its traced predict function, which has the policy of its first call built in.
    model.predict_function = None
