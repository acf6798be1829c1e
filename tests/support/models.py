"""Small Keras models whose statistics look trained: all different, in every slot, from each other and from 0 and 1."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from bln_serve.layers import BatchLayerNormalization, bln_layers
from bln_serve.statistics import StatisticsPolicy


def with_random_statistics(model: Any, seed: int = 0) -> Any:
    """Give each BLN layer random weights and estimates, and say that they rest on four steps, as training would."""
    generator = np.random.default_rng(seed)
    for layer in bln_layers(model):
        layer.gamma.assign(generator.uniform(0.5, 1.5, layer.gamma.shape))
        layer.beta.assign(generator.normal(0, 0.2, layer.beta.shape))
        for name, variable in layer.population.items():
            values = (
                generator.normal(0, 0.5, variable.shape)
                if "mean" in name
                else generator.uniform(0.2, 2, variable.shape)
            )
            variable.assign(values)
        for steps in (layer.mean_steps, layer.variance_steps, layer.slot_steps):
            steps.assign(np.full(steps.shape, 4.0))
        if layer.batch_size == 1:  # no step says anything of a variance
            layer.variance_steps.assign(0.0)
    return model


def bln(m: int, policy: str, name: str | None = None) -> BatchLayerNormalization:
    """Return a layer under a policy's code."""
    layer = BatchLayerNormalization(m, name=name)
    layer.policy = StatisticsPolicy.from_code(policy)
    return layer


class RecurrentCell(keras.layers.Layer):
    """A recurrent cell of 4 units that is a BLN layer: its rows pass inside a loop of the graph."""

    def __init__(self, m: int, name: str) -> None:
        super().__init__()
        self.bln = bln(m, "PPMM", name)
        self.state_size = self.output_size = 4

    def build(self, _: Any) -> None:
        self.bln.build((None, 4))
        self.built = True

    def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
        y = self.bln(inputs + states[0], training=training)
        return y, [y]


def one_layer(shape: Sequence[int], m: int, policy: str, seed: int = 0) -> Any:
    """Return a model that is one BLN layer."""
    x = keras.Input(tuple(shape), name="x")
    return with_random_statistics(keras.Model(x, bln(m, policy, "bln")(x), name="one_layer"), seed)


def tiny(policy: str, m: int, name: str) -> Any:
    """Return a model of ranks 3 and 2: float32 (rows, 6, 4) in, (rows, 3) out."""
    keras.utils.set_random_seed(7)
    x = keras.Input((6, 4), name="x")
    y = bln(m, policy, "bln1")(layers.Dense(5, activation="tanh")(x))
    y = bln(m, policy, "bln2")(layers.Dense(4, activation="tanh")(layers.Flatten()(y)))
    return with_random_statistics(keras.Model(x, layers.Dense(3, name="score")(y), name=name))


def two_inputs(policy: str = "PPMM", m: int = 5) -> Any:
    """Return a model with a float and a token input and two outputs, `score` (rows, 1) and `classes` (rows, 3)."""
    keras.utils.set_random_seed(8)
    numbers = keras.Input((3,), name="numbers")
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    words = bln(m, policy, "bln1")(layers.Embedding(20, 4)(tokens))
    joined = layers.Concatenate()([layers.Flatten()(words), numbers])
    joined = bln(m, policy, "bln2")(layers.Dense(6, activation="tanh")(joined))
    outputs = {"score": layers.Dense(1)(joined), "classes": layers.Dense(3)(joined)}
    return with_random_statistics(keras.Model([numbers, tokens], outputs, name="tiny_two_inputs"))
