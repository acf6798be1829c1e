"""A frozen reference mini-batch: its own rows keep their live answers, and no other row matters any more."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support.models import bln, tiny, with_random_statistics

import bln_serve
from bln_serve import reference
from bln_serve.errors import UnsupportedModelError, UsageError
from bln_serve.export import data, export, freezing, reference_batch, saved_model
from bln_serve.export.freezing import FrozenLayer
from bln_serve.layers import bln_layers
from bln_serve.statistics import RowCoupling, strongest

M = 5
GENERATOR = np.random.default_rng(12)
ROWS = GENERATOR.normal(1.0, 2.0, size=(M, 6, 4)).astype(np.float32)
OTHERS = GENERATOR.normal(0.0, 1.0, size=(20, 6, 4)).astype(np.float32)
RTOL = 1e-5  # float32, through two layers; as the export's own


def apart(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def frozen_at(model: keras.Model, rows: np.ndarray, feature_slots: str | None = None) -> tuple[FrozenLayer, ...]:
    callee = saved_model.describe(model)
    layers_as_they_are = freezing.with_policies(model, None, feature_slots)
    return reference_batch.freeze_at(callee, layers_as_they_are, data.read(rows, callee.signature, targets=False))


def answers(model: keras.Model, frozen: tuple[FrozenLayer, ...], rows: np.ndarray) -> np.ndarray:
    with freezing.applied(model, frozen):
        return model.predict(rows, batch_size=len(rows), verbose=0)


@pytest.mark.parametrize("policy", ["MMMM", "MPMM", "PMMM", "MMPP", "MPMP"])
def test_its_own_rows_keep_the_answers_that_live_statistics_give_them(policy: str) -> None:
    model = tiny(policy, M, "tiny")
    live = model.predict(ROWS, batch_size=M, verbose=0)
    assert apart(answers(model, frozen_at(model, ROWS), ROWS), live) <= RTOL
    assert apart(answers(model, frozen_at(model, OTHERS[:M]), ROWS), live) > 100 * RTOL  # another would show


def test_rows_become_independent(tmp_path: Path) -> None:
    model = tiny("MMMM", M, "tiny")
    live = model.predict(ROWS, batch_size=M, verbose=0)
    manifest = export(model, tmp_path, reference_batch=ROWS).manifest
    assert manifest.row_coupling is RowCoupling.INDEPENDENT
    assert manifest.statistics == "PPMM"
    exported = bln_serve.load(tmp_path / "tiny" / "1")
    assert apart(exported.predict(ROWS), live) <= RTOL
    together = exported.predict(OTHERS)
    alone = np.concatenate([exported.predict(row[None]) for row in OTHERS])
    assert apart(alone, together) <= RTOL
    assert manifest.stored_statistics.origin == "reference batch"
    assert manifest.stored_statistics.rows == M


@pytest.mark.parametrize(("slots", "coupling"), [("keep", RowCoupling.POSITIONAL), ("pool", RowCoupling.INDEPENDENT)])
def test_slots_stay_unless_they_are_pooled(slots: str, coupling: RowCoupling) -> None:
    frozen = frozen_at(tiny("MMPP", M, "tiny"), ROWS, slots)
    assert strongest(item.statistics for item in frozen)[0] is coupling


def test_what_is_stored_is_the_mini_batch_s_own_biased_statistics() -> None:
    inputs = keras.Input((3,))
    model = with_random_statistics(keras.Model(inputs, bln(M, "PMMM", "bln")(inputs)))
    x = ROWS[:, 0, :3]
    (frozen,) = frozen_at(model, x)
    mean, var = reference.batch_statistics(x)
    np.testing.assert_allclose(frozen.stored["population_batch_var"], var, rtol=1e-12)
    assert str(frozen.policy) == "PPMM"
    # The mean was stored before, and is not the mini-batch's.
    kept = bln_layers(model)[0].population_batch_mean.numpy()
    np.testing.assert_array_equal(frozen.stored["population_batch_mean"], kept)
    assert np.abs(kept - mean).max() > 0.01


def test_it_may_be_larger_than_m_where_nothing_is_stored_by_slot(tmp_path: Path) -> None:
    model = tiny("MMMM", M, "tiny")
    live = model.predict(OTHERS, batch_size=20, verbose=0)
    assert apart(answers(model, frozen_at(model, OTHERS), OTHERS), live) <= RTOL
    with pytest.raises(UsageError, match=r"with 2 to 5 rows, all of one .* Received: 20\. Statistics stored by slot"):
        export(tiny("MMPP", M, "tiny"), tmp_path, reference_batch=OTHERS)


def test_one_row_makes_no_mini_batch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="with at least 2 rows, all of one mini-batch .* Received: 1"):
        export(tiny("MMMM", M, "tiny"), tmp_path, reference_batch=ROWS[:1])


def test_nothing_live_is_nothing_to_freeze(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected a policy with a live batch mean or variance .* Received: PPMM"):
        export(tiny("PPMM", M, "tiny"), tmp_path, reference_batch=ROWS)


def test_a_layer_called_twice_has_two_statistics(tmp_path: Path) -> None:
    inputs = keras.Input((3,))
    shared = bln(M, "MMMM", "bln")
    model = keras.Model(inputs, layers.Add()([shared(inputs), shared(inputs * 2.0)]), name="twice")
    with pytest.raises(UnsupportedModelError, match="called once for --reference-batch. Received: 'bln', called 2"):
        export(with_random_statistics(model), tmp_path, reference_batch=ROWS[:, 0, :3])
