"""One `com.bln::BatchLayerNormalization` node as the lowering reads it: what it says, and where in x its axes lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bln_serve.statistics import StatisticsPolicy

Table = NDArray[np.float64]

# Computed in float32, as the layer does.
_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Layer:
    """One BLN call, and where in x its axes lie.

    Attributes:
        attributes: the node's.
        tables: the node's, shapes as the layer has them; pooled slots are one.
        may_split: whether x may be seen as several mini-batches.
    """

    attributes: Mapping[str, Any]
    tables: Mapping[str, Table]
    may_split: bool

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.attributes["layer"])

    @property
    def policy(self) -> StatisticsPolicy:
        """Where each statistic comes from."""
        return StatisticsPolicy.from_code(self.attributes["policy"])

    @property
    def epsilon(self) -> float:
        """What is added to each variance."""
        return float(self.attributes["epsilon"])

    @property
    def half(self) -> bool:
        """Whether x is narrower than what the statistics are computed in."""
        return self.attributes["dtype"] in _HALF

    @property
    def dtype(self) -> int:
        """The element type that the statistics are computed in."""
        return int(onnx.TensorProto.DOUBLE if self.attributes["dtype"] == "float64" else onnx.TensorProto.FLOAT)

    @property
    def m(self) -> int:
        """The batch size that the layer was trained with."""
        return int(self.attributes["m"])

    def scale(self, branch: str) -> Table:
        """Return s_b or s_f, shape (d,)."""
        gamma = self.tables["gamma"]
        return np.asarray(gamma * float(self.attributes[f"w_{branch[0]}"]) / np.sqrt(gamma.size))

    @property
    def rank(self) -> int:
        """How many axes x has."""
        return self.tables["batch_mean"].ndim

    @property
    def axes(self) -> Sequence[int]:
        """Where in x the axes of the layer's own input lie, rows first, features last."""
        return tuple(self.attributes.get("axes", range(self.rank)))

    @property
    def rows_per_row(self) -> int:
        """How many rows of the layer one row of a request makes."""
        return int(self.attributes.get("rows_per_row", 1))

    @property
    def split(self) -> bool:
        """Whether x is seen as several mini-batches."""
        return self.may_split and bool(self.policy.live_over_rows)

    @property
    def row_axis(self) -> int:
        """Where the rows of one mini-batch lie."""
        return self.axes[0] + self.split

    @property
    def feature_axis(self) -> int:
        """Where the features lie."""
        return self.axes[-1] + (self.split and self.axes[-1] > self.axes[0])

    @property
    def is_layer_normalization(self) -> bool:
        """Whether the feature branch is LayerNormalization."""
        live = not self.policy.stored_by_slot
        return live and self.axes[-1] == self.rank - 1 and self.dtype == onnx.TensorProto.FLOAT

    @property
    def bias(self) -> Table | None:
        """What LayerNormalization may add: beta, unless a table of the batch branch is to be added anyway."""
        return self.tables["beta"] if self.is_layer_normalization and self.policy.live_over_rows else None

    @property
    def offset(self) -> Table:
        """What is to be added beside the branches."""
        return self.tables["beta"] * (self.bias is None)

    def lengths(self) -> list[int]:
        """Return the lengths of x's axes, -1 for the rows."""
        shape = (-1, *self.tables["batch_mean"].shape[1:])
        return [shape[self.axes.index(axis)] for axis in range(self.rank)]

    def arrange(self, values: Table) -> Table:
        """Move a table's axes to where x has them, without the leading axes of length 1, which broadcasting adds."""
        full = values.reshape((1,) * (self.rank - values.ndim) + values.shape)
        moved = full.transpose([self.axes.index(axis) for axis in range(self.rank)])
        if self.split:
            moved = np.expand_dims(moved, self.axes[0])
        leading = next((axis for axis, length in enumerate(moved.shape) if length != 1), moved.ndim)
        return moved.reshape(moved.shape[leading:])
