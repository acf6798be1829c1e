"""Train the paper's RNN on IMDB reviews, with Batch Layer Normalization, BatchNormalization or LayerNormalization.

    python models/imdb_rnn.py --output runs/bln
    python models/imdb_rnn.py --output runs/ln --normalization ln --data imdb.npz --fraction 0.2

The model takes the last 80 words of a review as numbers below 20,000, 0 where there is none: keras.datasets.imdb,
num_words=20000, and keras.utils.pad_sequences, maxlen=80.
"""

import sys
from typing import Any

import keras
import numpy as np
from keras import layers
from paper_data import Kind, Rows
from paper_protocol import Normalize, Recipe, main

WORDS = 20_000
LENGTH = 80


def load() -> tuple[Rows, Rows]:
    """Return the 25,000 and 25,000 reviews of keras.datasets."""
    train, test = keras.datasets.imdb.load_data(num_words=WORDS)
    return _padded(*train), _padded(*test)


def _padded(reviews: Any, labels: Any) -> Rows:
    return Rows(keras.utils.pad_sequences(reviews, maxlen=LENGTH).astype(np.uint16), labels)


def build(normalize: Normalize, train: Rows, seed: int, size: int = 512, units: int = 128) -> Any:  # noqa: ARG001
    """Return the compiled model: int32 (rows, 80) in, one logit out, positive for a positive review.

    Args:
        normalize: makes the normalisation layers.
        train: not needed here.
        seed: of the dropouts; the initial weights have Keras's global one.
        size: of a word's vector.
        units: of the first LSTM; the second has half of them.
    """
    dropout = {"dropout": 0.2, "recurrent_dropout": 0.2}
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32", name="words"),
            layers.Embedding(WORDS, size),
            layers.LSTM(units, return_sequences=True, seed=seed, **dropout),
            normalize(1),
            layers.LSTM(units // 2, seed=seed + 1, **dropout),
            normalize(2),
            layers.Dense(32, activation="tanh"),
            normalize(3),
            layers.Dense(1, name="logit"),
        ],
        name="imdb_rnn",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(0.003),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)],  # of logits
        jit_compile=False,
    )
    return model


RECIPE = Recipe(
    name="imdb_rnn",
    purpose="Train the paper's RNN on IMDB reviews.",
    data=Kind(shape=(LENGTH,), largest=WORDS - 1, classes=2, load=load),
    validation=0.2,
    epochs=10,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
