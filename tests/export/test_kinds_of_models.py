"""Models of every kind against Keras: what they answer, how their rows are proved to meet, and what is said of them."""

import re
from typing import Any

import keras
import pytest
from keras import layers, ops
from support.conversions import Converted, converted, first, inputs_of, worst_error
from support.kinds import KINDS, TIME, WIDTH, M, with_random_weights
from support.models import bln, with_random_statistics

from bln_serve.errors import UnsupportedModelError
from bln_serve.export.graphs import all_nodes
from bln_serve.manifest import MINI_BATCHES
from bln_serve.statistics import RowCoupling

# Float32 rounds differently in each engine: up to 4.4e-7 of max|y| was measured.
RTOL = 1e-6
# Behind a live batch variance what was rounded is divided by the deviation of a few rows, which may be small: 1.2e-6.
RTOL_LIVE_VARIANCE = 5e-6

NOTED = {
    "behind_masking": "lstm runs as the plain conversion makes it: its input is masked",
    "subclassed_recurrent": "recurrent calls it itself, where it cannot be marked",
}


def check_mini_batches(model: Converted, rtol: float, *, together: bool) -> None:
    """Compare three mini-batches of m rows and one of 2 with Keras: one after the other, and the three in one run."""
    x = inputs_of(model, 3 * M + 2)
    expected = model.keras(x, M)
    assert worst_error(model.each_alone(x, M), expected) <= rtol
    if together:
        assert worst_error(model.in_one_run(first(x, 3 * M), 3), first(expected, 3 * M)) <= rtol


def check_notes(name: str, model: Converted) -> None:
    notes = " ".join(model.found.notes)
    assert (NOTED[name] in notes) if name in NOTED else not notes


@pytest.mark.parametrize("name", KINDS)
def test_rows_stay_apart_under_ppmm(name: str) -> None:
    model = converted(KINDS[name]("PPMM"))
    assert {node.domain for node in all_nodes(model.found.model.graph)} == {""}
    assert model.found.coupling.row_coupling is RowCoupling.INDEPENDENT, model.found.coupling.reason
    assert not model.takes(MINI_BATCHES)
    check_notes(name, model)
    x = inputs_of(model, 7)
    expected = model.keras(x, M)
    assert worst_error(model.in_one_run(x), expected) <= RTOL
    assert worst_error(model.each_alone(x, 1), expected) <= RTOL


@pytest.mark.parametrize("name", KINDS)
def test_each_mini_batch_gets_what_it_gets_alone_under_mmpp(name: str) -> None:
    model = converted(KINDS[name]("MMPP"))
    assert {node.domain for node in all_nodes(model.found.model.graph)} == {""}
    assert model.found.coupling.row_coupling is RowCoupling.MINI_BATCH
    assert model.found.coupling.reason.endswith(": batch mean and batch variance are live")
    assert model.takes(MINI_BATCHES)
    check_mini_batches(model, RTOL_LIVE_VARIANCE, together=True)


@pytest.mark.parametrize(
    "name",
    [
        *("nested", "shared_layer", "shared_model", "inputs_and_outputs_as_dicts", "subclassed", "residual"),
        *("inside_time_distributed", "between_recurrent_layers", "between_attention", "time_folded_into_rows"),
    ],
)
def test_each_row_gets_what_its_slot_holds_under_pppp(name: str) -> None:
    model = converted(KINDS[name]("PPPP"))
    assert model.found.coupling.row_coupling is RowCoupling.POSITIONAL
    assert model.found.coupling.reason.endswith(": feature mean and feature variance are stored by slot")
    check_mini_batches(model, RTOL, together=True)


def test_how_many_entries_a_row_makes_where_time_is_folded_into_them() -> None:
    model = converted(KINDS["time_folded_into_rows"]("MMPP"))
    folded, plain = model.found.layers
    assert (folded.rows_per_row, folded.slots, folded.default_rows, folded.min_mini_batch_rows) == (TIME, M, M, 1)
    assert (plain.rows_per_row, plain.slots, plain.default_rows, plain.min_mini_batch_rows) == (1, M, M, 2)


# Rows that something else than BLN couples


class Ranked(layers.Layer):
    """Says where each row comes among all."""

    def call(self, x):
        return ops.cast(ops.argsort(ops.argsort(x[:, 0, 0])), "float32")[:, None, None] + x


FOREIGN = {
    "ReduceMean .* reduces the row axis": lambda y: y - ops.mean(y, axis=0, keepdims=True),
    "ReduceMax .* reduces the row axis": lambda y: y / ops.max(ops.abs(y)),
    "CumSum .* accumulates along the row axis": lambda y: ops.cumsum(y, axis=0),
    "Softmax .* normalises along the row axis": layers.Softmax(axis=0),
    "TopK .* along the row axis": Ranked(),
    "MatMul .* every row with every other": lambda y: ops.matmul(
        ops.transpose(ops.matmul(y[:, 0], ops.transpose(y[:, 1]))), y[:, 2]
    ),
    "ReverseSequence .* reverses the row axis": lambda y: ops.flip(y, axis=0),
}


def foreign(couple: Any, policy: str) -> Any:
    keras.utils.set_random_seed(3)
    x = keras.Input((TIME, WIDTH), name="x")
    return with_random_statistics(keras.Model(x, layers.Dense(2)(couple(bln(M, policy, "a")(x))), name="foreign"))


@pytest.mark.parametrize("reason", FOREIGN)
@pytest.mark.parametrize("policy", ["PPMM", "PPPP"])
def test_what_else_couples_rows_is_found_and_named(policy: str, reason: str) -> None:
    model = converted(foreign(FOREIGN[reason], policy))
    assert model.found.coupling.row_coupling is RowCoupling.MINI_BATCH
    assert re.search(reason, model.found.coupling.reason)
    assert not model.takes(MINI_BATCHES)
    check_mini_batches(model, RTOL, together=False)


def test_a_model_without_bln_whose_rows_something_couples() -> None:
    x = keras.Input((WIDTH,), name="x")
    model = converted(keras.Model(x, layers.Dense(2)(x - ops.mean(x, axis=0, keepdims=True)), name="centered"))
    assert (model.found.layers, model.found.several_mini_batches) == ((), False)
    assert model.found.coupling.reason.startswith("ReduceMean")
    check_mini_batches(model, RTOL, together=False)


def test_a_model_without_bln() -> None:
    x = keras.Input((TIME, WIDTH), name="x")
    y = layers.BatchNormalization()(layers.MultiHeadAttention(2, 3)(x, x))
    y = layers.LSTM(4)(layers.Dropout(0.5)(layers.LayerNormalization()(y)))
    model = converted(with_random_weights(keras.Model(x, layers.Dense(2)(y), name="plain")))
    assert model.found.coupling.row_coupling is RowCoupling.INDEPENDENT
    x = inputs_of(model, 7)
    assert worst_error(model.in_one_run(x), model.keras(x, 7)) <= RTOL


# Time folded into the rows, step by step first


def time_first(policy: str) -> Any:
    keras.utils.set_random_seed(3)
    x = keras.Input((TIME, WIDTH), name="x")
    steps = ops.reshape(ops.transpose(x, (1, 0, 2)), (-1, WIDTH))
    y = ops.reshape(bln(TIME * M, policy, "folded")(steps), (TIME, -1, WIDTH))
    return with_random_statistics(keras.Model(x, ops.transpose(y, (1, 0, 2)), name="time_first"))


@pytest.mark.parametrize("policy", ["MMMM", "PPPP", "PMMM"])
def test_time_before_rows_is_refused_where_a_mini_batch_would_be_no_stretch_of_them(policy: str) -> None:
    words = "axis 0 of layer 'folded' to hold each row's own entries side by side.* Received: a model where that cannot"
    with pytest.raises(UnsupportedModelError, match=f"{words}.* --statistics PPMM"):
        converted(time_first(policy))


def test_time_before_rows_under_ppmm_is_right_and_taken_for_coupled() -> None:
    model = converted(time_first("PPMM"))
    assert model.found.coupling.row_coupling is RowCoupling.MINI_BATCH
    assert "need not keep the rows apart" in model.found.coupling.reason
    check_mini_batches(model, RTOL, together=False)


# That all of this can fail


def test_a_layer_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    keras_model = KINDS["nested"]("PPMM")
    model = converted(keras_model)
    inmost = keras_model.get_layer("inner").get_layer("inmost").get_layer("c")
    inmost.beta.assign(inmost.beta + 1e-4)
    x = inputs_of(model, 7)
    assert worst_error(model.in_one_run(x), model.keras(x, M)) > RTOL


def test_mini_batches_that_meet_are_seen() -> None:
    model = converted(KINDS["nested"]("MMPP"))
    x = inputs_of(model, M)
    assert worst_error(model.in_one_run(x, 1), model.keras(x, 2)) > 0.01
