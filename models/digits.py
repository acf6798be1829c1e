"""The data of the shipped models: 1,797 scanned digits of 8 x 8 pixels, each 0 to 16, bundled with scikit-learn.

The same seeded fifth of them is held out for every recipe. It travels as digits_samples.npz, so that trying the
models out needs no scikit-learn.
"""

from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from bln_serve.layers import BatchLayerNormalization

HERE = Path(__file__).parent
SAMPLES = HERE / "digits_samples.npz"
HELD_OUT = 360
SEED = 100  # the paper's
BATCH_SIZE = 25


class Digits(NamedTuple):
    """Images as float32 (rows, 8, 8) from 0 to 16, labels as int64 (rows,)."""

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]


def load() -> Digits:
    """Split the digits into training and held-out images, each class in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images.astype(np.float32), digits.target, test_size=HELD_OUT, stratify=digits.target, random_state=SEED
    )
    return Digits(x_train, y_train, x_test, y_test)


def held_out() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the held-out images and labels, for `bln-export MODEL --select models.digits:held_out`."""
    with np.load(SAMPLES, allow_pickle=False) as samples:
        return samples["images"].astype(np.float32), samples["labels"].astype(np.int64)


def train(model: keras.Model, epochs: int, learning_rate: float, callbacks: list[Any]) -> float:
    """Train a model on the digits, with a progress bar, and return its accuracy on the held-out images."""
    from tqdm.keras import TqdmCallback

    digits = load()
    steps = epochs * -(-len(digits.x_train) // BATCH_SIZE)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps), epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    bar = TqdmCallback(verbose=0, desc=model.name)
    model.fit(
        digits.x_train, digits.y_train, batch_size=BATCH_SIZE, epochs=epochs, callbacks=[*callbacks, bar], verbose=0
    )
    # The last of the 360 images would make a mini-batch of 10, as a user's data would too.
    return float(model.evaluate(digits.x_test, digits.y_test, batch_size=BATCH_SIZE, verbose=0)[1])


def save(model: keras.Model, path: Path, accuracy: float) -> None:
    """Write the model and the held-out images, and say what was reached."""
    digits = load()
    model.save(path)
    np.savez_compressed(SAMPLES, images=digits.x_test.astype(np.uint8), labels=digits.y_test.astype(np.uint8))
    policy = next(layer.policy for layer in model.layers if isinstance(layer, BatchLayerNormalization))
    size_kib = path.stat().st_size / 1024
    print(f"{path.name}: policy {policy}, accuracy {accuracy:.4f} on {HELD_OUT} held-out images, {size_kib:.0f} KiB")
