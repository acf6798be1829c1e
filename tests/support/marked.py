"""Marked BLN calls written by hand, with what the float64 oracle answers to them: no Keras, no converter."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bln_serve import reference
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, DOMAIN, TABLES
from bln_serve.manifest import MINI_BATCHES
from bln_serve.runtime import OnnxSession

SHAPES = {2: (6,), 3: (5, 4), 4: (3, 4, 6), 5: (2, 3, 2, 4)}
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]

# float32 arithmetic: a handful of roundings, each half a unit in the last place (6e-8).
RTOL = 2e-6


def random_tables(shape: Sequence[int], slots: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    by_slot = (slots, *shape[:-1], 1)
    return {
        "gamma": generator.uniform(0.5, 1.5, shape[-1:]),
        "beta": generator.normal(0, 0.3, shape[-1:]),
        "batch_mean": generator.normal(0, 0.5, (1, *shape)),
        "batch_var": generator.uniform(0.2, 2, (1, *shape)),
        "feature_mean": generator.normal(0, 0.5, by_slot),
        "feature_var": generator.uniform(0.2, 2, by_slot),
    }


@dataclass(frozen=True)
class MarkedLayer:
    """One BLN layer.

    Attributes:
        shape: of one of its rows.
        axes: where in the node's x the axes of the layer's own input lie; rows first, features last unless given.
        changed: tables that are not to be random.
        pooled: whether its feature tables have one row for every slot.
    """

    shape: tuple[int, ...]
    m: int
    policy: str
    dtype: str = "float32"
    axes: tuple[int, ...] | None = None
    rows_per_row: int = 1
    name: str = "bln"
    changed: dict[str, np.ndarray] = field(default_factory=dict)
    pooled: bool = False

    @property
    def tables(self) -> dict[str, np.ndarray]:
        slots = 1 if self.pooled else self.m
        return random_tables(self.shape, slots, seed=len(self.shape) * 100 + self.m) | self.changed

    def node(self, x: str = "x", y: str = "y") -> onnx.NodeProto:
        w_b, w_f = reference.branch_weights(self.m)
        facts = {"m": self.m, "epsilon": "1e-3", "w_b": repr(w_b), "w_f": repr(w_f), "policy": self.policy}
        facts |= {"dtype": self.dtype, "rows_per_row": self.rows_per_row, "layer": self.name}
        if self.axes is not None:
            facts["axes"] = self.axes
        inputs = [x, *(item.name for item in self.initializers())]
        return helper.make_node(BATCH_LAYER_NORMALIZATION, inputs, [y], name=self.name, domain=DOMAIN, **facts)

    def initializers(self) -> list[onnx.TensorProto]:
        return [numpy_helper.from_array(self.tables[name], f"{self.name}/{name}") for name in TABLES]

    def answer(self, x: np.ndarray) -> np.ndarray:
        """Return what the oracle makes of one mini-batch."""
        t = self.tables
        return reference.normalize(x, t["gamma"], t["beta"], m=self.m, policy=self.policy, population=t)

    def model(self) -> onnx.ModelProto:
        """Return a model of this layer alone; with `axes`, between Transposes that undo each other."""
        shape = ("rows", *self.shape)
        if self.axes is None:
            return model([self.node()], [self], shape, self.dtype)
        nodes = [
            helper.make_node("Transpose", ["x"], ["moved"], perm=np.argsort(self.axes)),
            self.node("moved", "normalized"),
            helper.make_node("Transpose", ["normalized"], ["y"], perm=self.axes),
        ]
        return model(nodes, [self], shape, self.dtype)


def model(
    nodes: Sequence[onnx.NodeProto],
    layers: Sequence[MarkedLayer],
    shape: Sequence[int | str],
    dtype: str = "float32",
) -> onnx.ModelProto:
    """Return a model from x to y, both of one shape and dtype."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x, y = (helper.make_tensor_value_info(name, element, shape) for name in "xy")
    tables = {item.name: item for layer in layers for item in layer.initializers()}
    graph = helper.make_graph(nodes, "marked", [x], [y], list(tables.values()))
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def inputs_of(x: np.ndarray, mini_batches: int | None) -> dict[str, np.ndarray]:
    return {"x": x} if mini_batches is None else {"x": x, MINI_BATCHES: np.array([mini_batches], np.int64)}


def run(lowered: onnx.ModelProto, x: np.ndarray, mini_batches: int | None = None) -> np.ndarray:
    """Run a valid model from x to y; `mini_batches` goes in unchecked, as any client may send it."""
    onnx.checker.check_model(lowered, full_check=True)
    return OnnxSession(lowered.SerializeToString(), threads=1).run(inputs_of(x, mini_batches))["y"]


def off_by(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest expected number."""
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())
