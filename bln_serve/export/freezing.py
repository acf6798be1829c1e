"""Choosing the statistics policy of each BLN layer, and making sure that what it asks for was ever estimated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import numpy as np

from bln_serve.errors import UnsupportedModelError, UnusableStatisticsError, UsageError
from bln_serve.export import estimates
from bln_serve.export.estimates import Estimates
from bln_serve.layers import BatchLayerNormalization, bln_layers
from bln_serve.statistics import LayerStatistics, StatisticsPolicy, in_words, mini_batch_rule


@dataclass(frozen=True)
class FrozenLayer:
    """A BLN layer with the policy it is exported under.

    Attributes:
        layer: the Keras layer; it is not changed.
        policy: from the command line, or the layer's own flags.
        name: the layer's; numbered where layers of different nested models have the same.
        stored: what takes the place of the layer's own estimates, or None to keep them.
        pooled: whether the feature statistics stored by slot are averaged to one for every row.
        rows_per_row: how many rows of its own one row of a request makes, once that was found out.
        called: whether inference calls it, once that was found out. If not, it is not exported, and stores what it may.
    """

    layer: BatchLayerNormalization
    policy: StatisticsPolicy
    name: str
    stored: Estimates | None = None
    pooled: bool = False
    rows_per_row: int = 1
    called: bool = True

    @property
    def statistics(self) -> LayerStatistics:
        """What the layer contributes to the model's row coupling."""
        return LayerStatistics(self.name, self.policy.code, self.layer.batch_size, self.rows_per_row, self.pooled)


def freeze(model: Any, statistics: str | None, feature_slots: str | None = None) -> tuple[FrozenLayer, ...]:
    """Choose the policy of every BLN layer of a model, and see that what it stores can be used.

    Args:
        model: a built Keras model.
        statistics: as `StatisticsPolicy.parse` reads it, for every layer; None for each layer's own flags.
        feature_slots: "keep" or "pool" the feature statistics stored by slot; None for what each layer says.

    Raises:
        UsageError: `statistics` cannot be read, or is given for a model without BLN layers.
        UnsupportedModelError: a layer is not built.
        UnusableStatisticsError: a layer has no usable estimate of a statistic that its policy stores.
    """
    frozen = with_policies(model, statistics, feature_slots)
    require_usable(frozen)
    return frozen


def with_policies(model: Any, statistics: str | None, feature_slots: str | None = None) -> tuple[FrozenLayer, ...]:
    """Choose the policy of every BLN layer of a model, as `freeze`, whether what it stores can be used or not."""
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
    return tuple(
        FrozenLayer(
            layer,
            StatisticsPolicy.parse(statistics, layer.policy) if statistics is not None else layer.policy,
            name,
            pooled=(feature_slots or layer.feature_slots) == "pool",
        )
        for layer, name in zip(layers, _names(layers), strict=True)
    )


def require_usable(frozen: Sequence[FrozenLayer], *, estimated_anew: bool = False) -> None:
    """See that each layer can use what its policy stores.

    Args:
        frozen: the layers.
        estimated_anew: whether that is from data, and not from training.

    Raises:
        UnusableStatisticsError: one cannot; the message has a line for each such statistic.
    """
    problems = [f"  {name}: {problem}" for name, problem in problems_of(frozen)]
    if problems:
        if estimated_anew:
            way_out = "Fill the slots, with --mini-batch-rows of all of them, or make them one, --feature-slots pool"
        elif any(item.layer.batch_size > 1 for item in frozen):
            way_out = "Train the model further, estimate them from data, --calibrate DATA.npz"
        else:
            way_out = "Estimate them from data, --calibrate DATA.npz"
        raise UnusableStatisticsError(
            "Expected usable stored statistics where the policy asks for them. Received:\n"
            + "\n".join(problems)
            + f"\n{way_out}, or take the statistics from the rows at hand: --statistics mini-batch."
        )


def problems_of(frozen: Sequence[FrozenLayer]) -> list[tuple[str, str]]:
    """Return why layers cannot use what their policies store, by the layer's name, a statistic each."""
    return [
        (item.name, problem)
        for item in frozen
        if item.called
        for statistic in item.policy.stored
        if (problem := unusable(item.layer, statistic, item.stored, pooled=item.pooled))
    ]


def rows_problem(frozen: Sequence[FrozenLayer], rows: int) -> str | None:
    """Return why layers cannot answer mini-batches of `rows` rows of a request, or None if they can."""
    layers = [item.statistics for item in frozen if item.called]
    rule = mini_batch_rule(layers, rows)
    if rule is None or rule.allows(rows, rows):
        return None
    if rule.max_rows == 0:
        return "there are fewer slots than one row of a request takes"
    return f"mini-batches of {rows} rows, and the policy takes from {rule.min_rows} to {rule.max_rows or 'any number'}"


def _names(layers: Sequence[BatchLayerNormalization]) -> list[str]:
    names: list[str] = []
    for layer in layers:
        numbered = (f"{layer.name}_{number}" for number in count(2))
        names.append(next(name for name in chain([layer.name], numbered) if name not in names))
    return names


def unusable(
    layer: BatchLayerNormalization, statistic: str, stored: Estimates | None = None, *, pooled: bool = False
) -> str | None:
    """Return why a stored statistic cannot be used, or None if it can.

    Args:
        layer: the layer.
        statistic: one of the four.
        stored: what takes the place of the layer's own estimates.
        pooled: whether its slots are averaged: then those that were never updated weigh nothing.
    """
    stored = stored or estimates.read(layer)
    words = in_words(statistic)
    steps = steps_of(stored, statistic)
    values = stored[f"population_{statistic}"]
    if pooled and steps.ndim and np.any(steps > 0):
        values = values[steps > 0]
    if not np.isfinite(values).all():
        return f"the stored {words} holds NaN or infinity"
    if statistic.endswith("var") and layer.batch_size == 1 and not stored["variance_steps"]:
        return f"a {words} cannot be estimated at m = 1"
    if not (np.any(steps > 0) if pooled else np.all(steps > 0)):
        return f"the stored {words} was never updated" + _empty_slots(steps)
    return None


def steps_of(stored: Estimates, statistic: str) -> np.ndarray[Any, Any]:
    """Return how many training steps a stored statistic rests on: one number, or one for each slot."""
    return stored[{"batch_mean": "mean_steps", "batch_var": "variance_steps"}.get(statistic, "slot_steps")]


def _empty_slots(steps: np.ndarray[Any, Any]) -> str:
    empty = np.flatnonzero(steps == 0) if steps.ndim else np.array([], int)
    if empty.size in (0, steps.size):
        return ""
    return f" in {empty.size} of {steps.size} slots, the first of them slot {empty[0]}: no full batch was seen"


@contextmanager
def applied(model: Any, frozen: Sequence[FrozenLayer]) -> Iterator[None]:
    """Give each layer its policy and estimates inside the `with` block, and what it had before afterwards."""
    before = [
        replace(
            item,
            policy=item.layer.policy,
            stored=estimates.read(item.layer),
            pooled=item.layer.feature_slots == "pool",
        )
        for item in frozen
    ]
    try:
        _assign(model, frozen)
        yield
    finally:
        _assign(model, before)


def _assign(model: Any, frozen: Sequence[FrozenLayer]) -> None:
    for item in frozen:
        item.layer.policy = item.policy
        item.layer.feature_slots = "pool" if item.pooled else "keep"
        if item.stored is not None:
            estimates.write(item.layer, item.stored)
    # Keras keeps its traced predict function, which has the policy of its first call built in.
    model.predict_function = None
