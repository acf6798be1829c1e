"""Train the paper's CNN on CIFAR-10, with Batch Layer Normalization, BatchNormalization or LayerNormalization.

    python models/cifar10_cnn.py --output runs/bln
    python models/cifar10_cnn.py --output runs/bn --normalization bn --data cifar10.npz --order reshuffled

The model takes raw pixels, 0 to 255: it standardises each itself, by the rows it was trained on (validation rows have
no part in that; the paper's code takes them in).
"""

import sys
from typing import Any

import keras
import numpy as np
from keras import layers
from paper_data import Kind, Rows
from paper_protocol import Normalize, Recipe, main


def load() -> tuple[Rows, Rows]:
    """Return the 50,000 and 10,000 images of keras.datasets."""
    (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    return Rows(x_train, y_train.ravel()), Rows(x_test, y_test.ravel())


def build(normalize: Normalize, train: Rows, seed: int) -> Any:
    """Return the compiled model: float32 (rows, 32, 32, 3) of 0 to 255 in, 10 logits out."""
    glorot = keras.initializers.GlorotUniform(seed)
    orthogonal = keras.initializers.Orthogonal(seed=seed)
    dense = {"kernel_initializer": orthogonal}
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            layers.Normalization(
                axis=(1, 2, 3),
                mean=train.x.mean(axis=0, dtype=np.float64),
                # Line by line: all at once takes eight times the images' size for a while, and again.
                variance=np.array([train.x[:, line].var(axis=0, dtype=np.float64) for line in range(32)]),
                name="standardize",
            ),
            layers.Conv2D(6, 5, padding="same", activation="tanh", kernel_initializer=glorot),
            layers.AveragePooling2D(2),
            normalize(1),
            layers.Conv2D(16, 5, activation="tanh", kernel_initializer=glorot),
            layers.AveragePooling2D(2),
            normalize(2),
            layers.Flatten(),
            layers.Dense(120, activation="tanh", **dense),
            normalize(3),
            layers.Dense(84, activation="tanh", **dense),
            normalize(4),
            layers.Dense(10, name="logits", **dense),
        ],
        name="cifar10_cnn",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.002, 0.9, 0.999, 1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False,
    )
    return model


RECIPE = Recipe(
    name="cifar10_cnn",
    purpose="Train the paper's CNN on CIFAR-10.",
    data=Kind(shape=(32, 32, 3), largest=255, classes=10, load=load),
    validation=0.1,
    epochs=15,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
