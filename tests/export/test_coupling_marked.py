"""Row coupling of our own nodes: marked BLN layers, recurrent layers and embeddings."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support.coupling_nodes import (
    INDEPENDENT,
    MINI_BATCH,
    POSITIONAL,
    bln_node,
    coupling_of,
    f32,
    int64,
    model_of,
    node,
)

from bln_serve.export.coupling import analyse
from bln_serve.export.custom_ops import DOMAIN, EMBEDDING, RECURRENT
from bln_serve.statistics import RowCoupling


@pytest.mark.parametrize(
    ("policy", "m", "coupling", "reason"),
    [
        ("PPMM", 4, INDEPENDENT, "every operation treats each row alone"),
        ("PPPP", 1, INDEPENDENT, "every operation treats each row alone"),
        ("PPPM", 4, POSITIONAL, "bln1: feature mean is stored by slot"),
        ("PPPP", 4, POSITIONAL, "bln1: feature mean and feature variance are stored by slot"),
        ("PMMM", 4, MINI_BATCH, "bln1: batch variance is live"),
        ("MMPP", 4, MINI_BATCH, "bln1: batch mean and batch variance are live"),
    ],
)
def test_a_marked_layer_couples_as_its_policy_says(policy: str, m: int, coupling: RowCoupling, reason: str) -> None:
    found = analyse(model_of([node("Relu", "x", "r"), bln_node(policy, m, "r")]))
    assert (found.row_coupling, found.reason) == (coupling, reason)
    assert found.layer_rows == {"batchlayernormalization_a": 1}
    assert found.outputs_without_rows == ()
    assert found.path == (() if coupling is INDEPENDENT else ("x", "relu_r", "batchlayernormalization_a"))


def feature_tables(mean: int, var: int) -> dict[str, np.ndarray]:
    """Return the tables of a layer of rank 3 whose feature tables have so many slots."""
    kept = {name: f32(4) for name in ("gamma", "beta")} | {name: f32(1, 3, 4) for name in ("bm", "bv")}
    return {**kept, "fm": f32(mean, 3, 1), "fv": f32(var, 3, 1)}


WITH_TABLES = "x gamma beta bm bv fm fv"


@pytest.mark.parametrize(
    ("policy", "slots", "coupling"),
    [
        ("PPPP", (1, 1), INDEPENDENT),
        ("PPPM", (1, 1), INDEPENDENT),
        ("MMPP", (1, 1), MINI_BATCH),
        ("PPPP", (25, 25), POSITIONAL),
        ("PPPP", (25, 1), POSITIONAL),
        ("PPPP", (1, 25), POSITIONAL),
    ],
)
def test_slots_are_pooled_where_the_tables_show_it(policy: str, slots: tuple[int, int], coupling: RowCoupling) -> None:
    found = analyse(model_of([bln_node(policy, 25, WITH_TABLES)], tables=feature_tables(*slots)))
    assert found.row_coupling is coupling
    assert found.layer_rows == {"batchlayernormalization_a": 1}


def test_a_pooled_table_that_anyone_may_send_with_the_rows_proves_nothing() -> None:
    tables = feature_tables(1, 1)
    del tables["fm"]
    nodes = [bln_node("PPPP", 25, WITH_TABLES)]
    assert coupling_of(*nodes, tables=tables, more_inputs={"fm": ("n", 3, 1)}) is MINI_BATCH


def test_a_pooled_table_that_comes_from_the_rows_couples_them() -> None:
    tables = feature_tables(1, 1)
    del tables["fm"]
    mean = node("ReduceMean", "x axes", "fm", keepdims=1)
    assert coupling_of(mean, bln_node("PPPP", 25, WITH_TABLES), tables=tables | {"axes": int64(0, 2)}) is MINI_BATCH


def test_the_strongest_of_several_outputs_decides_and_the_first_cause_is_named() -> None:
    nodes = [bln_node("PPPP", 4, "x", "b"), node("Tanh", "b", "t"), bln_node("MMMM", 4, "t", "c", "bln2")]
    model = model_of([*nodes, bln_node("MMMM", 4, "c", "a", "bln3")])
    assert analyse(model).reason == "bln2: batch mean and batch variance are live"
    assert analyse(model).path == ("x", "batchlayernormalization_b", "tanh_t", "batchlayernormalization_c")
    model.graph.output.insert(0, onnx.ValueInfoProto(name="b"))
    assert analyse(model).row_coupling is MINI_BATCH
    del model.graph.output[1:]
    assert analyse(model).row_coupling is POSITIONAL


FOLD, UNFOLD = {"fold": int64(-1, 4)}, {"fold": int64(-1, 4), "back": int64(-1, 3, 4)}


@pytest.mark.parametrize(
    ("nodes", "tables", "rows"),
    [
        ([node("Reshape", "x fold", "f"), bln_node("MMMM", 4, "f", "b"), node("Reshape", "b back")], UNFOLD, 3),
        ([node("Identity", "x", "f"), bln_node("MMMM", 4, "f", "b"), node("Reshape", "b back")], UNFOLD, 1),
        ([node("Transpose", "x", "f", perm=[1, 0, 2]), bln_node("MMMM", 4, "f")], {}, None),
        ([node("Reshape", "x torn", "f"), bln_node("MMMM", 4, "f")], {"torn": int64(-1, 8)}, None),
        (
            [node("Transpose", "x", "t", perm=[1, 0, 2]), node("Reshape", "t fold", "f"), bln_node("MMMM", 4, "f")],
            FOLD,
            None,
        ),
    ],
    ids=["time folded", "plain", "time first", "torn", "folded the other way"],
)
def test_how_many_rows_of_a_layer_one_row_makes_is_proved(nodes: Any, tables: Any, rows: int | None) -> None:
    (found,) = analyse(model_of(nodes, tables=tables)).layer_rows.values()
    assert found == rows


def test_a_layers_rows_are_proved_behind_one_that_couples() -> None:
    nodes = [bln_node("MMMM", 4, "x", "b"), node("Reshape", "b fold", "f"), bln_node("MMMM", 12, "f", "c", "bln2")]
    found = analyse(model_of([*nodes, node("Reshape", "c back")], tables=UNFOLD))
    assert found.layer_rows == {"batchlayernormalization_b": 1, "batchlayernormalization_c": 3}
    assert found.outputs_without_rows == ()


def test_slots_of_folded_rows_couple_by_place() -> None:
    nodes = [node("Reshape", "x fold", "f"), bln_node("PPPP", 12, "f", "b"), node("Reshape", "b back")]
    assert coupling_of(*nodes, tables=UNFOLD) is POSITIONAL


RECURRENT_TABLES = {"W": f32(1, 8, 4), "R": f32(1, 8, 2), "B": f32(1, 16), "h": f32(4, 2)}


@pytest.mark.parametrize(
    ("inputs", "coupling"), [("x W R B", INDEPENDENT), ("x s W R B", INDEPENDENT), ("x h W R B", POSITIONAL)]
)
def test_a_marked_recurrent_layer_keeps_rows_apart(inputs: str, coupling: RowCoupling) -> None:
    nodes = [node("ReduceMax", "x i1", "r", keepdims=0), node("MatMul", "r V", "s")]
    nodes += [node(RECURRENT, inputs, "a c d", domain=DOMAIN)]
    model = model_of(nodes, tables={**RECURRENT_TABLES, "i1": int64(1), "V": f32(4, 2)})
    model.graph.output.append(onnx.ValueInfoProto(name="c"))
    found = analyse(model)
    assert (found.row_coupling, found.outputs_without_rows) == (coupling, ())


def test_a_marked_recurrent_layer_takes_no_other_tensors_rows() -> None:
    assert (
        coupling_of(
            node("Transpose", "x", "t", perm=[1, 0, 2]),
            node(RECURRENT, "t W R B", domain=DOMAIN),
            tables=RECURRENT_TABLES,
        )
        is MINI_BATCH
    )


@pytest.mark.parametrize("tables", [{}, {"table": f32(20, 5)}], ids=["table still missing", "table in place"])
def test_a_marked_embedding_keeps_rows_apart(tables: Any) -> None:
    nodes = [node(EMBEDDING, "x table", "e", domain=DOMAIN), bln_node("PPMM", 4, "e")]
    found = analyse(model_of(nodes, tables=tables, shape=("n", 3), dtype=TensorProto.INT32))
    assert (found.row_coupling, found.layer_rows) == (INDEPENDENT, {"batchlayernormalization_a": 1})
