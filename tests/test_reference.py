"""The oracle against the golden vectors of the reference implementation, which was written by other people."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bln_serve import reference

GOLDEN = Path(__file__).parent / "golden" / "reference"
FILES = sorted(GOLDEN.glob("*.npz"))
POLICIES = ["".join(letters) for letters in product("PM", repeat=4)]
POPULATION = {
    "batch_mean": "pop_Bmean",
    "batch_var": "pop_Bvar",
    "feature_mean": "pop_Fmean",
    "feature_var": "pop_Fvar",
}


def rtol(path: Path) -> float:
    """The golden vectors are float32: rounding of the reference's own sums, far larger under an offset of 1000."""
    if "offset1000" in path.name:
        return 5e-5
    return 1e-5 if path.stem.endswith("m1") else 2e-6


def assert_close(actual: np.ndarray, expected: np.ndarray, limit: float) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= limit * np.abs(expected).max()


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, np.ndarray], int, float]:
    with np.load(request.param, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return arrays, arrays["x_train"].shape[1], rtol(request.param)


def test_all_golden_files_are_there() -> None:
    assert len(FILES) == 7


def test_training_output_equals_the_reference(golden) -> None:
    arrays, m, limit = golden
    for x, y in zip(arrays["x_train"], arrays["y_train"], strict=True):
        assert_close(reference.normalize(x, arrays["gamma"], arrays["beta"], m=m), y, limit)


def test_inference_equals_the_reference_wherever_that_is_finite(golden) -> None:
    arrays, m, limit = golden
    population = {name: arrays[key] for name, key in POPULATION.items()}
    compared = 0
    for policy, y in zip(POLICIES, arrays["y_infer"], strict=True):
        if np.isfinite(y).all():
            compared += 1
            actual = reference.normalize(
                arrays["x_infer"], arrays["gamma"], arrays["beta"], m=m, policy=policy, population=population
            )
            assert_close(actual, y, limit)
    assert compared == (8 if m == 1 else 16)


def test_population_estimates_equal_the_reference(golden) -> None:
    arrays, m, limit = golden
    estimates = reference.population_estimates(arrays["x_train"], m)
    for name, key in POPULATION.items():
        if m == 1 and name.endswith("var"):
            assert np.isnan(estimates[name]).all()
        else:
            assert_close(estimates[name], arrays[key], limit)


def test_more_rows_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="5 rows, and only 4 slots"):
        reference.normalize(
            np.ones((5, 3)),
            np.ones(3),
            np.zeros(3),
            m=4,
            policy="MMPP",
            population={"feature_mean": np.zeros((4, 1)), "feature_var": np.ones((4, 1))},
        )


def test_a_table_of_one_slot_meets_every_row_and_says_what_as_many_equal_slots_say() -> None:
    generator = np.random.default_rng(0)
    x, stored = generator.normal(size=(4, 2, 3)), {"batch_mean": np.zeros((1, 2, 3)), "batch_var": np.ones((1, 2, 3))}
    one = {"feature_mean": generator.normal(size=(1, 2, 1)), "feature_var": generator.uniform(0.5, 2, (1, 2, 1))}
    many = {name: np.repeat(table, 4, axis=0) for name, table in one.items()}

    def answers(rows: np.ndarray, tables: dict[str, np.ndarray]) -> np.ndarray:
        return reference.normalize(rows, np.ones(3), np.zeros(3), m=4, policy="PPPP", population=stored | tables)

    np.testing.assert_array_equal(answers(x, one), answers(x, many))
    np.testing.assert_array_equal(answers(np.concatenate([x, x]), one), np.concatenate([answers(x, many)] * 2))


def test_branch_weights_are_those_of_the_reference() -> None:
    assert reference.branch_weights(25) == pytest.approx((0.9599, 0.0399), abs=1e-12)
    assert reference.branch_weights(1) == pytest.approx((-1e-4, 0.9999), abs=1e-12)
