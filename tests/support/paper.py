"""The paper's CNN and RNN, with any normalisation, and with BLN under any policy with random statistics."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from .models import bln, with_random_statistics

M = 25


def cnn(normalization: Callable[[], Any]) -> Any:
    """Return the paper's CNN on 32 x 32 x 3 images, 10 logits."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3), name="image"),
            layers.Conv2D(6, 5, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            normalization(),
            layers.Conv2D(16, 5, activation="tanh"),
            layers.AveragePooling2D(2),
            normalization(),
            layers.Flatten(),
            layers.Dense(120, activation="tanh"),
            normalization(),
            layers.Dense(84, activation="tanh"),
            normalization(),
            layers.Dense(10, name="logits"),
        ],
        name="paper_cnn",
    )


def rnn(normalization: Callable[[], Any], *, words: int = 20_000, size: int = 512, units: int = 128) -> Any:
    """Return the paper's RNN on 80 word ids, 1 logit: two LSTMs with dropout inside and outside of the recurrence."""
    dropout = {"dropout": 0.2, "recurrent_dropout": 0.2}
    return keras.Sequential(
        [
            keras.Input((80,), dtype="int32", name="words"),
            layers.Embedding(words, size),
            layers.LSTM(units, return_sequences=True, **dropout),
            normalization(),
            layers.LSTM(units // 2, **dropout),
            normalization(),
            layers.Dense(32, activation="tanh"),
            normalization(),
            layers.Dense(1, name="logit"),
        ],
        name="paper_rnn",
    )


def under(build: Callable[..., Any], policy: str, **sizes: int) -> Any:
    """Return one of the models with BLN layers, m = 25, under a policy, with random weights and statistics."""
    keras.utils.set_random_seed(2209)
    return with_random_statistics(build(lambda: bln(M, policy), **sizes))
