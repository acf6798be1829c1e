"""What is found out of a model's rows before anything takes time, and what is chosen knowing it."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.models import RecurrentCell, bln, tiny, with_random_statistics

from bln_serve import reference
from bln_serve.errors import UnsupportedModelError, UnusableStatisticsError, UsageError
from bln_serve.export import calibration, freezing, saved_model
from bln_serve.export.choosing import Choice, Chooser, Wish
from bln_serve.export.selection.record import Entry
from bln_serve.layers import bln_layers
from bln_serve.statistics import RowCoupling

M, TIME = 5, 4
GENERATOR = np.random.default_rng(41)
X = GENERATOR.normal(0.5, 1.5, size=(43, 6, 4)).astype(np.float32)
Y = GENERATOR.integers(0, 3, 43)
FLAT = X[:, 0]
# Float32 in another order of sums: some units in the seventh digit.
RTOL, ATOL = 2e-5, 2e-6


class Told(list[tuple[int, int]]):
    """What was told of the progress."""

    def __call__(self, done: int, total: int) -> None:
        self.append((done, total))


def choose(model: keras.Model, told: Told | None = None, rows: int | None = None, **wish: Any) -> Choice:
    callee = saved_model.describe(model)
    return Chooser(callee, model, None, rows, lambda _: None, Told() if told is None else told).choose(Wish(**wish))


def compiled(inputs: Any, outputs: Any) -> keras.Model:
    model = with_random_statistics(keras.Model(inputs, outputs))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    return model


def entries(choice: Choice, origin: str = "as trained") -> dict[str, Entry]:
    assert choice.selection
    return {each.policy: each for each in choice.selection.entries if each.origin == origin}


# Time folded into the rows: 6 rows of a request make the 24 rows that the layer was trained with.


def folded(policy: str = "PPMM", m: int = 6 * TIME) -> keras.Model:
    keras.utils.set_random_seed(3)
    x = keras.Input((TIME, 5))
    y = bln(m, policy, "bln")(layers.Dense(5)(keras.ops.reshape(x, (-1, 5))))
    return compiled(x, layers.Dense(3)(keras.ops.reshape(y, (-1, TIME * 5))))


STEPS = GENERATOR.normal(1.0, 2.0, size=(25, TIME, 5)).astype(np.float32)


@pytest.mark.parametrize("policy", ["PPPP", "PPMM"])
def test_folded_rows_are_calibrated_in_mini_batches_of_the_request_s_rows(policy: str) -> None:
    model = folded(policy)
    (item,) = choose(model, calibrate=STEPS).frozen
    dense = next(layer for layer in model.layers if isinstance(layer, layers.Dense))
    reached = STEPS[:24].astype(np.float64).reshape(-1, 5) @ dense.kernel.numpy() + dense.bias.numpy()
    batches = reached.reshape(4, 6 * TIME, 5)
    assert item.stored is not None
    mean, var = reference.batch_statistics(reached)
    np.testing.assert_allclose(item.stored["population_batch_mean"], mean, rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(item.stored["population_batch_var"], var, rtol=RTOL, atol=ATOL)
    feature_means = np.mean([reference.feature_statistics(each)[0] for each in batches], axis=0)
    np.testing.assert_allclose(item.stored["population_feature_mean"], feature_means, rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(item.stored["slot_steps"], np.full(24, 4.0))
    assert item.statistics.rows_per_row == TIME


def test_folded_rows_are_selected_on_in_mini_batches_of_the_request_s_rows() -> None:
    model = folded()
    found = choose(model, select=(STEPS, Y[:25]), calibrate=STEPS)
    assert found.selection
    assert found.selection.mini_batch_rows == 6
    by_policy = entries(found)
    assert all(entry.loss is not None for entry in by_policy.values())
    assert by_policy["PPPP"].row_coupling is RowCoupling.POSITIONAL
    assert by_policy["MMMM"].single_rows  # its 4 steps are a mini-batch
    with freezing.applied(model, freezing.with_policies(model, "MMPP")):
        model.make_test_function(force=True)
        expected = model.evaluate(STEPS[:24], Y[:24], batch_size=6, verbose=0)
    assert by_policy["MMPP"].loss == pytest.approx(expected, rel=RTOL)


def test_a_reference_of_more_folded_rows_than_slots_is_refused() -> None:
    with pytest.raises(UsageError, match="with 1 to 6 rows, all of one mini-batch .* Received: 12"):
        choose(folded("MMPP"), reference_batch=STEPS[:12])


def test_m_that_no_whole_number_of_rows_makes_needs_a_number() -> None:
    with pytest.raises(UsageError, match="no whole number of a request's rows makes .* \\(22, 4 for each row\\)"):
        choose(folded(m=22), calibrate=STEPS)


def test_mini_batches_that_the_slots_cannot_hold() -> None:
    with pytest.raises(UsageError, match="Expected mini-batches that the layers take for --calibrate. .* from 1 to 5"):
        choose(tiny("PPPP", M, "tiny"), rows=8, calibrate=X)
    found = choose(
        compiled(x := keras.Input((4,)), layers.Dense(3)(bln(M, "PPMM", "bln")(x))),
        rows=8, select=(FLAT, Y), calibrate=FLAT,
    )  # fmt: skip
    for origin in ("as trained", "calibrated"):
        assert entries(found, origin)["PPPP"].unusable == "mini-batches of 8 rows, and the policy takes from 1 to 5"
        assert entries(found, origin)["PPMM"].loss is not None


# Something else than a BLN layer couples the rows.


def centred(m: int = M) -> keras.Model:
    x = keras.Input((4,))
    y = bln(m, "PPMM", "bln")(x - keras.ops.mean(x, axis=0, keepdims=True))
    return compiled(x, layers.Dense(3)(y))


def test_rows_that_meet_elsewhere_are_beyond_every_limit() -> None:
    told = Told()
    with pytest.raises(UsageError, match=r"whose rows --coupling independent allows. Received: mini-batch rows under"):
        choose(centred(), told, select=(FLAT, Y), coupling="independent")
    assert not told
    found = choose(centred(), select=(FLAT, Y))
    assert {each.row_coupling for each in entries(found).values()} == {RowCoupling.MINI_BATCH}


def test_at_m_1_rows_share_a_run_only_where_they_are_independent() -> None:
    coupled, alone = Told(), Told()
    (item,) = choose(centred(1), coupled, calibrate=FLAT).frozen
    assert item.stored is not None
    # A row's own mean is taken from it, and nothing is left.
    np.testing.assert_array_equal(item.stored["population_batch_var"], np.zeros((1, 4)))
    x = keras.Input((4,))
    choose(compiled(x, layers.Dense(3)(bln(1, "PPMM", "bln")(x))), alone, calibrate=FLAT)
    assert (coupled[-1], alone[-1]) == ((43, 43), (1, 1))


# Refusals, before anything takes time.


def test_a_layer_called_twice_has_no_reference_and_all_else() -> None:
    x, shared = keras.Input((4,)), bln(M, "MMMM", "bln")
    model = compiled(x, layers.Dense(3)(layers.Add()([shared(x), shared(x * 2.0)])))
    found = choose(model, select=(FLAT, Y), calibrate=FLAT, reference_batch=FLAT[:M])
    reasons = {entry.unusable for entry in entries(found, "reference batch").values()}
    assert len(reasons) == 1
    assert "Received: 'bln', called 2 times" in str(reasons)
    assert all(entry.loss is not None for entry in entries(found, "calibrated").values())


@pytest.mark.parametrize(("rows", "fitting"), [(2 * M, {"MMMM", "MPMM", "PMMM"}), (1, set())])
def test_a_reference_of_too_many_rows_or_few_competes_where_it_fits(rows: int, fitting: set[str]) -> None:
    """Statistics by slot take no more than m rows, and live ones at least 2."""
    found = entries(choose(tiny_compiled(), select=(X, Y), reference_batch=X[:rows]), "reference batch")
    assert {policy for policy, entry in found.items() if entry.loss is not None} == fitting
    assert all(f"Received: {rows}." in str(entry.unusable) for policy, entry in found.items() if policy not in fitting)


@pytest.mark.parametrize(
    "wish",
    [
        {"select": (X[:, :3], Y)},
        {"select": (X, Y + 3)},
        {"select": (X, Y), "calibrate": X[:, :3]},
        {"select": (X, Y), "reference_batch": X[:, :3]},
    ],
)
def test_data_is_looked_at_before_the_model(wish: dict[str, Any]) -> None:
    stages: list[str] = []
    model = tiny_compiled()
    with pytest.raises(UsageError, match="Expected"):
        Chooser(saved_model.describe(model), model, None, None, stages.append, Told()).choose(Wish(**wish))
    assert all(stage.startswith("reading") for stage in stages), stages


def test_who_calibrated_with_too_few_rows_for_the_slots_is_told_what_fills_them() -> None:
    with pytest.raises(UnusableStatisticsError, match="Fill the slots, with --mini-batch-rows of all of them, or make"):
        choose(with_empty_slots(), rows=2, statistics="PPPP", calibrate=X)


def with_empty_slots() -> keras.Model:
    model = tiny("PPPP", M, "tiny")
    for layer in bln_layers(model):
        layer.slot_steps.assign(np.zeros(layer.slot_steps.shape))
    return model


def tiny_compiled() -> keras.Model:
    model = tiny("MMMM", M, "tiny")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    return model


def recurrent() -> keras.Model:
    x = keras.Input((6, 4))
    return compiled(x, layers.Dense(3)(bln(M, "PPMM", "after")(layers.RNN(RecurrentCell(M, "inside"))(x))))


@pytest.mark.parametrize("wish", [{"select": (X, Y)}, {"calibrate": X}, {"select": (X, Y), "calibrate": X}])
def test_a_layer_inside_a_loop_is_refused_before_any_run(wish: dict[str, Any]) -> None:
    told = Told()
    with pytest.raises(UnsupportedModelError, match="^Expected .* 'inside'") as refused:
        choose(recurrent(), told, **wish)
    assert "\x1b" not in str(refused.value)
    assert not told


def test_a_model_without_layers_is_refused() -> None:
    x = keras.Input((4,))
    with pytest.raises(UsageError, match="with Batch Layer Normalization layers for --reference-batch. Received: one"):
        choose(compiled(x, layers.Dense(3)(x)), reference_batch=FLAT)


# What is said of it, and what is done twice.


@pytest.mark.parametrize(("slots", "recorded"), [(("pool", "pool"), "pool"), (("keep", "pool"), "mixed")])
def test_slots_that_the_layers_pool_themselves_are_recorded(slots: tuple[str, str], recorded: str) -> None:
    model = tiny("MMMM", M, "tiny")
    for layer, each in zip(bln_layers(model), slots, strict=True):
        layer.feature_slots = each
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    found = choose(model, select=(X, Y))
    assert found.selection
    assert found.selection.feature_slots == recorded
    coupling = RowCoupling.INDEPENDENT if recorded == "pool" else RowCoupling.POSITIONAL
    assert entries(found)["PPPP"].row_coupling is coupling


def test_the_winner_is_what_was_evaluated_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    calibrate = calibration.calibrate

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(calibrate(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(calibration, "calibrate", noted)
    x = keras.Input((4,))
    model = compiled(x, layers.Dense(3)(bln(M, "MMMM", "bln")(x)))
    for layer in bln_layers(model):  # so that only the calibrated can win
        layer.population_batch_mean.assign(np.full(layer.population_batch_mean.shape, 1e3))
    told = Told()
    found = choose(model, told, select=(FLAT, Y), calibrate=FLAT, coupling="independent")
    assert found.stored
    assert found.stored.origin == "calibrated"
    assert len(made) == 15
    assert any(found.frozen is each for each in made)
    assert told[-1][0] == told[-1][1]
    assert any("--calibrate left out the last 3" in note for note in found.notes)


def test_rows_left_out_are_noted_where_they_would_have_mattered() -> None:
    x = keras.Input((4,))
    model = compiled(x, layers.Dense(3)(bln(M, "MMMM", "bln")(x)))
    found = choose(model, select=(FLAT, Y), calibrate=FLAT * 1e-3)  # of another scale, and so worse
    assert found.stored is None
    assert not any("--calibrate" in note for note in found.notes)


def test_one_reason_is_given_once_for_all_its_layers() -> None:
    model = tiny("MMMM", M, "tiny")
    for layer in bln_layers(model):
        layer.mean_steps.assign(0.0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    found = entries(choose(model, select=(X, Y)))
    assert found["PPMM"].unusable == "bln1, bln2: the stored batch mean was never updated"


class Unused(keras.layers.Layer):
    """Holds a BLN layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bln = bln(M, "PPMM", "unused")

    def build(self, shape: tuple[int | None, ...]) -> None:
        self.bln.build(shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return inputs * 2.0


def test_a_layer_that_is_never_called_costs_and_needs_nothing() -> None:
    x = keras.Input((4,))
    model = compiled(x, layers.Dense(3)(bln(M, "PPMM", "bln")(Unused()(x))))
    for layer in bln_layers(model):
        layer.mean_steps.assign(0.0)
    told = Told()
    called = {item.name: item.called for item in choose(model, told, calibrate=FLAT).frozen}
    assert called == {"bln": True, "unused": False}
    assert told[-1] == (8, 8)
