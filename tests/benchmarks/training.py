"""A training step of the paper's CNN with BLN against the same with Keras BatchNormalization, m = 25."""

from collections.abc import Callable, Iterator

import keras
import numpy as np
from keras import layers
from support import paper

from bln_serve.layers import BatchLayerNormalization

from .timing import side_by_side

BATCH_SIZE = 25
BLN, BN = "BLN", "BatchNormalization"


def cnn(normalization: Callable[[], keras.layers.Layer], jit_compile: bool) -> keras.Model:
    """Return the paper's CNN on 32 x 32 x 3 images, compiled as in its protocol."""
    model = paper.cnn(normalization)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.002, epsilon=1e-8), loss, jit_compile=jit_compile)
    return model


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(BATCH_SIZE, 32, 32, 3)).astype(np.float32)
    y = generator.integers(0, 10, BATCH_SIZE)
    yield "| jit_compile | BatchNormalization, ms a step | BLN takes |"
    yield "|---|---|---|"
    for jit_compile in (False, True):
        models = {
            BLN: cnn(lambda: BatchLayerNormalization(BATCH_SIZE), jit_compile),
            BN: cnn(layers.BatchNormalization, jit_compile),
        }
        contestants = {name: lambda model=model: model.train_on_batch(x, y) for name, model in models.items()}
        timing = side_by_side(contestants, rounds=80, calls=5)
        yield f"| {jit_compile} | {timing.median(BN) * 1e3:.2f} | {timing.ratio(BLN, BN):.2f}x |"
