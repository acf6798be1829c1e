"""The stored statistics of a BLN layer as arrays, so that others may take their place for a while."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.layers import BatchLayerNormalization
from bln_serve.statistics import STATISTICS

Estimates = Mapping[str, NDArray[np.float64]]
"""The values of the weights below, by name, with the shapes that the layer's docstring gives."""

WEIGHTS = (
    *(f"population_{statistic}" for statistic in STATISTICS),
    *("mean_steps", "variance_steps", "slot_steps", "start_new_estimate"),
)


def read(layer: BatchLayerNormalization) -> Estimates:
    """Return a copy of what a layer has stored."""
    return {name: np.array(getattr(layer, name).numpy()) for name in WEIGHTS}


def write(layer: BatchLayerNormalization, estimates: Mapping[str, Any]) -> None:
    """Store estimates in a layer, those that are named."""
    for name, value in estimates.items():
        getattr(layer, name).assign(value)
