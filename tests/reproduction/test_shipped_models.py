"""The recipes still make the shipped models. Takes two minutes: make test-reproduction."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import bln_serve.layers  # noqa: F401 - registers the layer

pytestmark = pytest.mark.reproduction
MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", ["digits_cnn", "digits_rnn"])
def test_the_recipe_makes_a_model_as_good_as_the_shipped_one(name: str, tmp_path: Path) -> None:
    made = tmp_path / f"{name}.keras"
    subprocess.run([sys.executable, MODELS / f"train_{name}.py", "--output", made], check=True)
    with np.load(MODELS / "digits_samples.npz", allow_pickle=False) as samples:
        images, labels = samples["images"].astype(np.float32), samples["labels"]
    logits = {
        path: keras.saving.load_model(path).predict(images, batch_size=25, verbose=0)
        for path in (made, MODELS / f"{name}.keras")
    }
    accuracies = [(answer.argmax(axis=1) == labels).mean() for answer in logits.values()]
    assert min(accuracies) >= 0.97, accuracies
