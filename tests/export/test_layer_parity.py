"""Every BLN layer by itself, on rows that hardly differ: what a whole model's samples do not show."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from support.marked import SHAPES, MarkedLayer
from support.models import bln, one_layer, with_random_statistics

from bln_serve.export import conversion, freezing, layer_node, layer_parity, parity, saved_model
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.graphs import Emitter
from bln_serve.layers import BatchLayerNormalization
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import ALL_POLICIES
from bln_serve.verification import Check, Tolerance

CODES = [policy.code for policy in ALL_POLICIES]

Fault = Callable[[pytest.MonkeyPatch], None]


def layer_of(shape: tuple[int, ...], m: int, policy: str, dtype: str = "float32") -> BatchLayerNormalization:
    layer = bln(m, policy, "bln")
    layer.dtype_policy = dtype
    layer.build((None, *shape))
    return with_random_statistics(keras.Sequential([layer])).layers[0]


def marked(layer: BatchLayerNormalization) -> onnx.ModelProto:
    """Return what `marking` makes of a layer, without the converter."""
    values = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
    tables = {name: value.numpy().astype(np.float64) for name, value in values.items()}
    shape = tuple(layer.population["batch_mean"].shape[1:])
    return MarkedLayer(shape, layer.batch_size, layer.policy.code, layer.compute_dtype, changed=tables).model()


def checks_of(layer: BatchLayerNormalization, tolerance: Tolerance = Tolerance()) -> list[Check]:  # noqa: B008 - frozen
    return list(layer_parity.verify(marked(layer), [FrozenLayer(layer, layer.policy, "bln")], tolerance))


@pytest.mark.parametrize("m", [1, 2, 25])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("policy", CODES)
def test_every_layer_agrees_with_keras(policy: str, rank: int, m: int) -> None:
    (check,) = checks_of(layer_of(SHAPES[rank], m, policy))
    assert check.passed, check.line()
    assert check.name == "ONNX: bln alone, rows alike"


def other_epsilon(change: Callable[[float], float]) -> Fault:
    return lambda patch: patch.setattr(
        layer_node.Layer, "epsilon", property(lambda self: change(float(self.attributes["epsilon"])))
    )


def default_epsilon(patch: pytest.MonkeyPatch) -> None:
    """Leave LayerNormalization's epsilon at ONNX's own 1e-5."""
    whole = Emitter.__call__

    def emit(self: Any, op_type: str, *inputs: str, **attributes: Any) -> str:
        if op_type == "LayerNormalization":
            del attributes["epsilon"]
        return whole(self, op_type, *inputs, **attributes)

    patch.setattr(Emitter, "__call__", emit)


def one_pass(patch: pytest.MonkeyPatch) -> None:
    """Take a live variance as mean(x * x) - mean(x) * mean(x)."""
    whole = Emitter.__call__

    def emit(self: Any, op_type: str, *inputs: str, **attributes: Any) -> str:
        squares = {node.output[0]: node for node in self.nodes if node.op_type == "Mul" and len(set(node.input)) == 1}
        if op_type == "ReduceMean" and inputs[0] in squares:
            about = squares[inputs[0]].input[0]
            (sub,) = (node for node in self.nodes if node.output[0] == about)
            x, mean = sub.input
            of_squares = whole(self, "ReduceMean", whole(self, "Mul", x, x), *inputs[1:], **attributes)
            return whole(self, "Sub", of_squares, whole(self, "Mul", mean, mean))
        return whole(self, op_type, *inputs, **attributes)

    patch.setattr(Emitter, "__call__", emit)


@pytest.mark.parametrize(
    ("policy", "m", "fault"),
    [
        ("PPMM", 256, default_epsilon),
        ("MMMM", 256, default_epsilon),
        ("PPMM", 25, other_epsilon(lambda epsilon: epsilon * 1.01)),
        ("MMMM", 25, other_epsilon(lambda epsilon: epsilon * 1.01)),
        ("PPPP", 25, other_epsilon(lambda epsilon: epsilon * 1.01)),
        ("MMPP", 25, one_pass),
        ("MMMM", 25, one_pass),
        ("PMPP", 25, one_pass),
        ("PPPM", 2, one_pass),
    ],
)
def test_a_planted_fault_is_caught(policy: str, m: int, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((5, 4), m, policy)
    (intact,) = checks_of(layer)
    fault(monkeypatch)
    (check,) = checks_of(layer)
    assert intact.passed
    assert not check.passed


@pytest.mark.parametrize("policy", CODES)
def test_tables_of_another_layer_are_caught(policy: str) -> None:
    one, other = (layer_of((5, 4), 4, policy) for _ in range(2))
    with_random_statistics(keras.Sequential([other]), seed=1)
    (check,) = layer_parity.verify(marked(other), [FrozenLayer(one, one.policy, "bln")], Tolerance())
    assert not check.passed


def test_a_whole_models_samples_do_not_show_the_default_epsilon_at_m_256(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer((16,), 256, "PPMM")
    callee, frozen = saved_model.describe(model), freezing.freeze(model, None)
    default_epsilon(monkeypatch)
    made = conversion.convert(callee, frozen, 18)
    engine = parity.Engine("ONNX", OnnxSession(made.model.SerializeToString(), threads=1).run, takes_several=False)
    subject = parity.Subject(callee, made.layers, None, made.coupling.row_coupling, Tolerance())
    assert parity.verify(subject, [engine]).report.passed
    (check,) = layer_parity.verify(made.marked, frozen, Tolerance())
    assert not check.passed


def test_each_layer_is_checked_once_by_its_name_also_where_it_is_called_twice() -> None:
    x = keras.Input((6,))
    twice = bln(4, "PPMM", "twice")
    inner = [keras.Sequential([keras.Input((6,)), bln(4, policy, "same")]) for policy in ("PPPP", "MMMM")]
    model = with_random_statistics(keras.Model(x, inner[1](inner[0](twice(twice(x))))))
    callee, frozen = saved_model.describe(model), freezing.freeze(model, None)
    checks = list(layer_parity.verify(conversion.convert(callee, frozen, 18).marked, frozen, Tolerance()))
    assert [check.name.split()[1] for check in checks] == ["twice", "same", "same_2"]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("mixed_float16", 2e-3)])
def test_other_dtypes(dtype: str, rtol: float) -> None:
    # float16: both round the same float32 to 11 bits, now and then to neighbours.
    for policy in CODES:
        (check,) = checks_of(layer_of((5, 4), 4, policy, dtype), Tolerance(rtol=rtol))
        assert check.passed, check.line()
