"""A model of make reproduce, exported and served, answers all of CIFAR-10's test images as Keras does.

The comparison needs a finished run (make reproduce) and its data (BLN_DATA). It takes a minute: make test-reproduction.
What was found last is in results/served, and holds in every lane.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from reproduction import measured, runs, served
from reproduction.tables import PAPER


@pytest.fixture(scope="module")
def model_file() -> Path:
    found = served.model_file()
    if found is None:
        pytest.skip("no finished run of cifar10_cnn with BLN in .reproduction: make reproduce")
    return found


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    found = served.test_set(Path(os.environ["BLN_DATA"]) if "BLN_DATA" in os.environ else None)
    if found is None:
        pytest.skip("no CIFAR-10: name a folder with cifar10_20pct.npz in BLN_DATA")
    return found


def check(served_logits: np.ndarray, expected: np.ndarray, limits: np.ndarray) -> None:
    """See that predictions are the same but where the two largest logits are nearer than both may be moved."""
    beyond = [(row, gap) for row, gap in served.differing(served_logits, expected) if not gap <= 2 * limits[row]]
    assert not beyond, f"rows with other predictions, and the distance of Keras's two largest logits: {beyond}"


@pytest.mark.reproduction
@pytest.mark.parametrize("policy", served.POLICIES)
def test_the_whole_test_set_over_http(policy: str, model_file: Path, rows: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = rows
    expected = served.keras_answers(model_file, policy, images)
    answers, tolerance = served.served_answers(model_file, policy, images)
    limits = served.allowed(tolerance, expected)
    found = served.compare(policy, answers, expected, labels, limits)
    assert answers.shape == expected.shape == (10_000, 10)
    check(answers, expected, limits)
    assert found["of_the_tolerance"] <= 1, found
    # Where predictions are all the same, accuracies are.
    assert found["differing"] or found["accuracy"]["http"] == found["accuracy"]["keras"], found


def test_what_was_found_last_is_the_same_accuracy() -> None:
    found = measured.read(runs.RESULTS, PAPER, []).served
    assert [one["policy"] for one in found] == sorted(served.POLICIES)
    for one in found:
        assert (one["rows"], one["differing"]) == (10_000, [])
        assert one["accuracy"]["http"] == one["accuracy"]["keras"]
        assert one["of_the_tolerance"] <= 1


def test_another_prediction_is_only_let_through_where_logits_are_as_near() -> None:
    expected = np.array([[1.0, 0.5, 0.0], [1.0, 1.0 - 1e-6, 0.0]])
    answers = expected[:, [1, 0, 2]]
    assert [row for row, _ in served.differing(answers, expected)] == [0, 1]
    check(answers[1:], expected[1:], np.full(1, 1e-5))
    with pytest.raises(AssertionError, match=r"\[\(0, 0\.5\)\]"):
        check(answers, expected, np.full(2, 1e-5))


def test_accuracy_and_distance_by_hand() -> None:
    expected = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    answers = np.array([[2.0, 1.5], [1.5, 1.0], [0.0, 3.0]])
    found = served.compare("PPMM", answers, expected, np.array([0, 1, 0]), np.full(3, 1.0))
    assert found["accuracy"] == {"keras": pytest.approx(2 / 3), "http": pytest.approx(1 / 3)}
    assert found["differing"] == [(1, 1.0)]
    assert (found["largest_logit_difference"], found["of_the_tolerance"]) == (1.5, 1.5)
