"""A law: whatever graph chance puts together, nothing that is claimed of any of its tensors is seen to be untrue."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.random_graphs import build, draw
from support.row_probe import contradictions, observe, states

from bln_serve.export.coupling.states import Dependence

SETTINGS = settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def disproved(seed: int, length: int) -> list[str]:
    b = build(seed, length)
    model = b.model()
    made = {name for node in b.nodes for name in node.output}
    claims = {name: claim for name, claim in states(model).items() if name in made}
    rows, found = observe(model, b.inputs, draw(b.random))
    return list(contradictions(claims, rows, found))


@SETTINGS
@given(seed=st.integers(0, 10**9), length=st.integers(2, 9))
def test_no_claim_is_seen_to_be_untrue(seed: int, length: int) -> None:
    assert not disproved(seed, length)


def test_the_law_is_no_empty_one() -> None:
    """Among the random graphs there are enough tensors of each kind, and enough operators that keep rows apart."""
    kinds: dict[tuple[Dependence, bool], int] = {}
    operators = set()
    for seed in range(150):
        b = build(seed, 6)
        makers = {name: node.op_type for node in b.nodes for name in node.output}
        for name, claim in states(b.model()).items():
            if name in makers and not claim.is_lost:
                key = (claim.dependence, claim.axis is not None)
                kinds[key] = kinds.get(key, 0) + 1
                if claim.axis is not None and claim.dependence is Dependence.NOTHING:
                    operators.add(makers[name])
    assert kinds[Dependence.NOTHING, True] > 200
    assert kinds[Dependence.SLOT, True] > 20
    assert kinds[Dependence.ROW_COUNT, False] > 20
    assert kinds[Dependence.OTHER_ROWS, True] > 20
    assert len(operators) > 40


@pytest.mark.parametrize("op_type", ["ReduceMean", "Softmax"])
def test_the_law_can_be_broken(monkeypatch: pytest.MonkeyPatch, op_type: str) -> None:
    """A rule that lets anything pass is caught."""
    from bln_serve.export.coupling import operators
    from bln_serve.export.coupling.elementwise import of_one

    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy")
    node = onnx.helper.make_node(op_type, ["x"], ["y"], **({"axis": 0} if op_type == "Softmax" else {"axes": [0]}))
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )
    inputs, others = (draw(np.random.default_rng(seed)) for seed in (1, 2))
    rows, found = observe(model, {"x": inputs["y"]}, {"x": others["y"]})
    assert not list(contradictions({"y": states(model)["y"]}, rows, found))
    monkeypatch.setitem(operators._STANDARD_RULES, op_type, of_one)
    assert list(contradictions({"y": states(model)["y"]}, rows, found))
