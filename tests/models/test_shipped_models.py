"""The models that travel with the project are real, small and what the README says of them."""

from pathlib import Path

import keras
import numpy as np
import pytest

from bln_serve.layers import bln_layer, bln_layers

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    with np.load(MODELS / "digits_samples.npz", allow_pickle=False) as samples:
        return samples["images"].astype(np.float32), samples["labels"]


@pytest.mark.parametrize(("name", "policy"), [("digits_cnn", "PPMM"), ("digits_rnn", "MMMM")])
def test_policy_size_and_accuracy_on_held_out_images(name: str, policy: str, digits) -> None:
    path = MODELS / f"{name}.keras"
    model = keras.saving.load_model(path)
    images, labels = digits
    assert path.stat().st_size < 1_000_000
    assert {layer.policy.code for layer in bln_layers(model)} == {policy}
    assert {layer.batch_size for layer in bln_layers(model)} == {25}
    assert len(images) == 360
    accuracy = (model.predict(images, batch_size=25, verbose=0).argmax(axis=1) == labels).mean()
    assert accuracy >= 0.97


def test_the_held_out_images_are_those_the_recipes_never_train_on(digits, monkeypatch) -> None:
    monkeypatch.syspath_prepend(MODELS)
    from digits import load

    data = load()
    np.testing.assert_array_equal(data.x_test, digits[0])
    np.testing.assert_array_equal(data.y_test, digits[1])
    assert len(data.x_train) + len(data.x_test) == 1797


def test_the_rnn_is_built_from_the_references_names_with_both_dropouts() -> None:
    model = keras.saving.load_model(MODELS / "digits_rnn.keras")
    assert all(isinstance(layer, bln_layer) for layer in bln_layers(model))
    cells = [layer.cell for layer in model.layers if isinstance(layer, keras.layers.LSTM)]
    assert [(cell.dropout, cell.recurrent_dropout) for cell in cells] == [(0.2, 0.2), (0.2, 0.2)]


@pytest.mark.parametrize("name", ["digits_cnn", "digits_rnn"])
def test_the_estimates_are_those_of_training_all_different_from_0_and_1_and_in_each_slot(name: str) -> None:
    for layer in bln_layers(keras.saving.load_model(MODELS / f"{name}.keras")):
        assert layer.mean_steps.numpy() == 58
        for statistic, variable in layer.population.items():
            values = variable.numpy()
            assert not np.isin(values, (0.0, 1.0)).all()
            if statistic.startswith("feature"):
                assert all(not np.allclose(values[0], slot) for slot in values[1:])
