"""Train models/digits_cnn.keras: the paper's CNN made small, policy PPMM, so that single rows may be sent.

Run it with `make train`, or: python models/train_digits_cnn.py [--output FILE] [--seed N]
"""

import argparse
from pathlib import Path

import keras
from digits import BATCH_SIZE, HERE, SEED, save, train
from keras import layers

from bln_serve.layers import BatchLayerNormalization, PopulationStatistics


def build(seed: int) -> keras.Model:
    """Return the untrained model: float32 (rows, 8, 8) in, 10 logits out."""
    glorot = keras.initializers.GlorotUniform(seed)
    orthogonal = keras.initializers.Orthogonal(seed=seed)
    image = keras.Input((8, 8), name="image")
    x = layers.Rescaling(1 / 16)(image)
    x = layers.Reshape((8, 8, 1))(x)
    x = layers.Conv2D(6, 5, padding="same", activation="tanh", kernel_initializer=glorot)(x)
    x = layers.AveragePooling2D(2)(x)
    x = BatchLayerNormalization(BATCH_SIZE, name="bln1")(x)
    x = layers.Conv2D(16, 3, padding="same", activation="tanh", kernel_initializer=glorot)(x)
    x = layers.AveragePooling2D(2)(x)
    x = BatchLayerNormalization(BATCH_SIZE, name="bln2")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="tanh", kernel_initializer=orthogonal)(x)
    x = BatchLayerNormalization(BATCH_SIZE, name="bln3")(x)
    x = layers.Dense(84, activation="tanh", kernel_initializer=orthogonal)(x)
    x = BatchLayerNormalization(BATCH_SIZE, name="bln4")(x)
    logits = layers.Dense(10, name="logits", kernel_initializer=orthogonal)(x)
    return keras.Model(image, logits, name="digits_cnn")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE / "digits_cnn.keras")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)
    model = build(arguments.seed)
    accuracy = train(model, epochs=40, learning_rate=0.002, callbacks=[PopulationStatistics()])
    save(model, arguments.output, accuracy)


if __name__ == "__main__":
    main()
