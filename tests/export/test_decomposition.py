"""The lowered graph against the float64 oracle, on marked models written by hand: no Keras, no converter."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bln_serve import reference
from bln_serve.errors import RunError, UnsupportedModelError
from bln_serve.export.decomposition import decompose
from bln_serve.export.marking import DOMAIN, OP_TYPE, TABLES
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy

SHAPES = {2: (6,), 3: (5, 4), 4: (3, 4, 6), 5: (2, 3, 2, 4)}


def random_tables(shape: tuple[int, ...], m: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    by_slot = (m, *shape[:-1], 1)
    return {
        "gamma": generator.uniform(0.5, 1.5, shape[-1:]),
        "beta": generator.normal(0, 0.3, shape[-1:]),
        "batch_mean": generator.normal(0, 0.5, (1, *shape)),
        "batch_var": generator.uniform(0.2, 2, (1, *shape)),
        "feature_mean": generator.normal(0, 0.5, by_slot),
        "feature_var": generator.uniform(0.2, 2, by_slot),
    }


def marked_model(shape: tuple[int, ...], m: int, policy: str, tables: dict[str, np.ndarray], dtype: str = "float32"):
    w_b, w_f = reference.branch_weights(m)
    attributes = {"m": m, "epsilon": "1e-3", "w_b": repr(w_b), "w_f": repr(w_f)}
    node = helper.make_node(
        OP_TYPE, ["x", *TABLES], ["y"], domain=DOMAIN, policy=policy, layer="bln", dtype=dtype, **attributes
    )
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = [helper.make_tensor_value_info(name, element, ["rows", *shape]) for name in "xy"]
    constants = [numpy_helper.from_array(tables[name], name) for name in TABLES]
    graph = helper.make_graph([node], "marked", value[:1], value[1:], constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    return OnnxSession(model.SerializeToString(), threads=1).run({"x": x})["y"]


@pytest.mark.parametrize("m", [1, 2, 25])
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("policy", ALL_POLICIES, ids=str)
def test_lowered_equals_the_oracle(policy: StatisticsPolicy, rank: int, m: int) -> None:
    shape = SHAPES[rank]
    tables = random_tables(shape, m, seed=rank * 100 + m)
    lowered = decompose(marked_model(shape, m, policy.code, tables))
    generator = np.random.default_rng(m)
    for rows in {1, m - 1, m, m if policy.stored_by_slot and m > 1 else 3 * m} - {0}:
        x = generator.normal(0.5, 1.5, (rows, *shape)).astype(np.float32)
        gamma, beta = tables["gamma"], tables["beta"]
        y = reference.normalize(x, gamma, beta, m=m, policy=policy.code, population=tables)
        # float32 arithmetic: a handful of roundings, each half a unit in the last place (6e-8).
        assert np.abs(run(lowered, x) - y).max() <= 2e-6 * np.abs(y).max(), rows


def test_an_offset_of_1000_costs_no_more_than_its_own_rounding() -> None:
    tables = random_tables((5, 4), 25, 1)
    x = (np.random.default_rng(2).normal(0, 1, (25, 5, 4)) + 1000).astype(np.float32)
    y = reference.normalize(x, tables["gamma"], tables["beta"], m=25)
    lowered = decompose(marked_model((5, 4), 25, "MMMM", tables))
    # A float32 at 1000 is 3e-5 wide; the one-pass variance would be off by more than 0.1 here.
    assert np.abs(run(lowered, x) - y).max() <= 1e-4 * np.abs(y).max()


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float16", 2e-3)])
def test_other_dtypes_are_computed_as_the_layer_computes_them(dtype: str, limit: float) -> None:
    tables = random_tables((5, 4), 4, 3)
    x = np.random.default_rng(4).normal(0, 1, (4, 5, 4)).astype(dtype)
    y = reference.normalize(x, tables["gamma"], tables["beta"], m=4, policy="PMPM", population=tables)
    actual = run(decompose(marked_model((5, 4), 4, "PMPM", tables, dtype)), x)
    assert actual.dtype == dtype
    assert np.abs(actual - y).max() <= limit * np.abs(y).max()


@pytest.mark.parametrize("policy", [policy for policy in ALL_POLICIES if policy.stored_by_slot], ids=str)
def test_more_rows_than_slots_never_get_an_answer(policy: StatisticsPolicy) -> None:
    tables = random_tables((5, 4), 3, 5)
    lowered = decompose(marked_model((5, 4), 3, policy.code, tables))
    with pytest.raises(RunError, match="refused a run of 4 rows"):
        run(lowered, np.ones((4, 5, 4), np.float32))


def test_all_stored_is_one_multiplication_and_one_addition() -> None:
    lowered = decompose(marked_model((6,), 1, "PPPP", random_tables((6,), 1, 6)))
    assert [node.op_type for node in lowered.graph.node] == ["Mul", "Add"]


def test_no_custom_op_table_or_opset_is_left_and_the_marked_model_is_not_changed() -> None:
    marked = marked_model((6,), 4, "PPMM", random_tables((6,), 4, 7))
    before = marked.SerializeToString(deterministic=True)
    lowered = decompose(marked)
    assert {node.domain for node in lowered.graph.node} == {""}
    assert [item.domain for item in lowered.opset_import] == [""]
    used = {name for node in lowered.graph.node for name in node.input}
    assert {item.name for item in lowered.graph.initializer} <= used
    assert marked.SerializeToString(deterministic=True) == before


def test_a_foreign_operator_is_refused_by_name() -> None:
    marked = marked_model((6,), 4, "PPMM", random_tables((6,), 4, 8))
    marked.graph.node.append(helper.make_node("Mystery", ["y"], ["z"], domain="com.example"))
    with pytest.raises(UnsupportedModelError, match="standard ONNX operators only. Received: com.example::Mystery"):
        decompose(marked)
