"""What a model file says of its BLN layers, before anything is exported."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bln_serve.export import estimates, loading
from bln_serve.export.freezing import steps_of, unusable
from bln_serve.layers import BatchLayerNormalization, bln_layers
from bln_serve.statistics import STATISTICS, LayerStatistics, RowCoupling, strongest


@dataclass(frozen=True)
class StatisticState:
    """One stored statistic of a layer.

    Attributes:
        statistic: its name.
        source: the one that the layer's policy takes, `population` or `mini-batch`.
        problem: why the stored estimate cannot be used, or None if it can.
        min_steps: how many training steps the estimate rests on; by slot, in the slot with the fewest.
        max_steps: in the slot with the most.
    """

    statistic: str
    source: str
    problem: str | None
    min_steps: int
    max_steps: int


@dataclass(frozen=True)
class LayerState:
    """One BLN layer of a model.

    Attributes:
        layer: its name, policy and m.
        statistics: the four, in order.
    """

    layer: LayerStatistics
    statistics: tuple[StatisticState, ...]


@dataclass(frozen=True)
class ModelState:
    """What there is to know before an export.

    Attributes:
        layers: the BLN layers.
        row_coupling: what the BLN layers make an answer depend on, by their own policies. What else a model does with
            rows is proved at its export.
        row_coupling_reason: which layer couples the rows, and by which statistic.
    """

    layers: tuple[LayerState, ...]
    row_coupling: RowCoupling
    row_coupling_reason: str


def inspect(path: Path) -> ModelState:
    """Read a model file and describe its BLN layers.

    Raises:
        ModelLoadError: the file cannot be read, or not safely.
    """
    layers = tuple(_describe(layer) for layer in bln_layers(loading.load(path)))
    return ModelState(layers, *strongest(state.layer for state in layers))


def _describe(layer: BatchLayerNormalization) -> LayerState:
    stored, pooled = estimates.read(layer), layer.feature_slots == "pool"
    states = []
    for statistic in STATISTICS:
        steps = np.atleast_1d(steps_of(stored, statistic))
        problem = unusable(layer, statistic, stored, pooled=pooled)
        source = layer.policy.sources[statistic]
        states.append(StatisticState(statistic, source, problem, int(steps.min()), int(steps.max())))
    return LayerState(LayerStatistics(layer.name, layer.policy.code, layer.batch_size, pooled=pooled), tuple(states))
