"""The paper's training protocol, for models/cifar10_cnn.py and models/imdb_rnn.py: one run from data to a chosen model.

As in https://arxiv.org/abs/2209.08898: mini-batches of one size, all live statistics (policy MMMM) in training and
validation, the weights of the epoch with the lowest validation loss. Unlike there, a policy is then chosen on
validation data (`bln-export --select`), and never on the test set, which is read once, at the end.
"""

import argparse
import datetime
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from paper_data import ORDERS, Kind, Parts, Rows, order_of, parts
from paper_training import (
    History,
    KeepState,
    ValidateBySteps,
    WriteScalars,
    restore,
    training_set,
    whole_mini_batches,
    write_json,
)

import bln_serve
from bln_serve.errors import BlnServeError, UsageError
from bln_serve.layers import BatchLayerNormalization, PopulationStatistics

NORMALIZATIONS = ("bln", "bn", "ln")
DOWNLOADED_FRACTION = 0.2
Normalize = Callable[[int], Any]
"""Makes the normalisation layer with that number in the model."""


@dataclass(frozen=True)
class Recipe:
    """One of the paper's experiments.

    `validation` is the share of the training rows that is held back. `build` takes what makes a normalisation layer,
    the rows to train on (to standardise by) and the seed, and returns the compiled model.
    """

    name: str
    purpose: str
    data: Kind
    validation: float
    epochs: int
    build: Callable[[Normalize, Rows, int], Any]


def normalization(kind: str, batch_size: int) -> Normalize:
    """Return what makes layers of a kind: BLN with four live statistics (MMMM), or Keras's own with its defaults."""
    if kind == "bln":
        return lambda number: BatchLayerNormalization(batch_size, False, False, False, False, name=f"bln{number}")
    layer = {"bn": keras.layers.BatchNormalization, "ln": keras.layers.LayerNormalization}[kind]
    return lambda number: layer(name=f"{kind}{number}")


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Run a recipe's command line and return the exit code."""
    parser = command_line(recipe)
    arguments = parser.parse_args(argv)
    if arguments.fraction is None:
        arguments.fraction = 1.0 if arguments.data else DOWNLOADED_FRACTION
    try:
        run(recipe, arguments)
    except BlnServeError as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def command_line(recipe: Recipe) -> argparse.ArgumentParser:
    """Return the recipe's command line."""
    parser = argparse.ArgumentParser(description=recipe.purpose)
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="bln")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the run is kept")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="x_train, y_train, x_test, y_test; default: keras.datasets, which downloads them",
    )
    parser.add_argument(
        "--fraction",
        type=_fraction,
        help="how much of the training rows there are, the first of each class (default: all of a --data file, which "
        f"may itself be a part; {DOWNLOADED_FRACTION} of keras.datasets). Of these, "
        f"{100 * recipe.validation:.0f} %% are held back for validation",
    )
    parser.add_argument("--batch-size", type=_at_least(1), default=25, metavar="M", help="default: 25")
    parser.add_argument("--order", choices=ORDERS, default="same", help="of mini-batches, epoch after epoch")
    parser.add_argument("--epochs", type=_at_least(1), default=recipe.epochs, help=f"default: {recipe.epochs}")
    parser.add_argument("--seed", type=_at_least(0), default=100, help="default: 100, the paper's")
    parser.add_argument("--validate-every-steps", type=_at_least(1), metavar="N", help="also measure between epochs")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole epoch in DIR, if there is one")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write each epoch's numbers for TensorBoard")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"Expected a fraction above 0, at most 1. Received: {text}")
    return value


def _at_least(smallest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"Expected a whole number of at least {smallest}. Received: {text}")
        return value

    return whole_number


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Train, keep the best epoch's model, and write what was measured.

    In the output folder: NAME.keras, validation.npz (x, y), history.json, and last.npz to resume from.

    Raises:
        UsageError: the data is not what the recipe expects or too small, or the folder holds another run.
    """
    data = parts(recipe.data, arguments.data, arguments.fraction, recipe.validation)
    smallest = min(len(data.train), len(data.validation), len(data.test))
    if smallest < arguments.batch_size:
        raise UsageError(
            f"Expected whole mini-batches of {arguments.batch_size} rows in each part. Received: {data.counts()}. "
            "Take a smaller --batch-size or more data."
        )
    keras.utils.set_random_seed(arguments.seed)
    model = recipe.build(normalization(arguments.normalization, arguments.batch_size), data.train, arguments.seed)
    history = _train(recipe, arguments, model, data)
    _finish(recipe, arguments, data, history)


def _train(recipe: Recipe, arguments: argparse.Namespace, model: Any, data: Parts) -> History:
    """Train what is still to be trained, and return the whole history."""
    state, config = arguments.output / "last.npz", _config(recipe, arguments) | {"data": data.sha256()}
    if state.exists() and not arguments.resume:
        raise UsageError(
            f"Expected a folder without a run. Received: {arguments.output}, which holds one. Go on with it "
            "(--resume), or choose another --output."
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    history = restore(model, state, config) if state.exists() else History()
    if len(history.epochs) < arguments.epochs:
        best = _keep_best(model_file(recipe, arguments.output), history)
        _fit(arguments, model, data, history, [best, KeepState(state, config, history)])
    return history


def _fit(arguments: argparse.Namespace, model: Any, data: Parts, history: History, keep: list[Any]) -> None:
    """Train the epochs that the history lacks."""
    size, dtype, done = arguments.batch_size, model.inputs[0].dtype, len(history.epochs)
    plan = [
        order_of(epoch, len(data.train), size, arguments.order, arguments.seed)
        for epoch in range(done, arguments.epochs)
    ]
    steps = len(plan[0])
    validation = whole_mini_batches(data.validation, size, dtype)
    callbacks = [PopulationStatistics(), *keep]
    if arguments.validate_every_steps:
        callbacks.append(ValidateBySteps(validation, arguments.validate_every_steps, done * steps, history))
    if arguments.tensorboard:
        callbacks.append(WriteScalars(arguments.tensorboard))
    model.fit(
        training_set(data.train, np.concatenate(plan), dtype),
        steps_per_epoch=steps,
        epochs=arguments.epochs,
        initial_epoch=done,
        shuffle=False,  # the data comes in the order asked for
        validation_data=validation,
        callbacks=[*callbacks, *_progress(model.name)],
        verbose=0 if sys.stderr.isatty() else 2,
    )


def _keep_best(path: Path, history: History) -> Any:
    best = history.best()
    return keras.callbacks.ModelCheckpoint(
        str(path), save_best_only=True, initial_value_threshold=best["val_loss"] if best else math.inf
    )


def _progress(name: str) -> list[Any]:
    from tqdm.keras import TqdmCallback

    return [TqdmCallback(verbose=1, desc=name)] if sys.stderr.isatty() else []


def model_file(recipe: Recipe, folder: Path) -> Path:
    """Return where a run keeps the model of its best epoch."""
    return folder / f"{recipe.name}.keras"


def _config(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what decides a run's numbers, besides its data and the number of epochs."""
    names = ("normalization", "fraction", "batch_size", "order", "seed", "validate_every_steps")
    return {"recipe": recipe.name, **{name: getattr(arguments, name) for name in names}}


def _finish(recipe: Recipe, arguments: argparse.Namespace, data: Parts, history: History) -> None:
    """Report on the test set, once, and leave all that `bln-export --select` needs."""
    best, path = history.best(), model_file(recipe, arguments.output)
    if best is None:
        raise UsageError(
            f"Expected an epoch with a finite validation loss. Received: none in {len(history.epochs)}. No model was "
            "kept; take another --batch-size or --seed."
        )
    model = keras.saving.load_model(path)
    test = whole_mini_batches(data.test, arguments.batch_size, model.inputs[0].dtype)
    loss, accuracy = model.evaluate(test, verbose=0)
    kept = arguments.output / "validation.npz"
    np.savez_compressed(kept, x=data.validation.x, y=data.validation.y)
    write_json(
        arguments.output / "history.json",
        {
            **_config(recipe, arguments),
            "epochs": arguments.epochs,
            "policy": "MMMM" if arguments.normalization == "bln" else None,
            "data": {"source": data.source, "sha256": data.sha256(), "rows": data.counts()},
            "steps_per_epoch": len(data.train) // arguments.batch_size,
            "parameters": model.count_params(),
            "versions": {
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (bln_serve, keras, np, tf)},
            },
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "history": history.epochs,
            "validation_by_step": history.validation_by_step,
            "best": {name: best[name] for name in ("epoch", "val_loss", "val_accuracy")},
            "test": {"loss": loss, "accuracy": accuracy},
        },
    )
    print(
        f"{path}: the best of {len(history.epochs)} epochs is {best['epoch']}, validation loss {best['val_loss']:.4f}, "
        f"accuracy {best['val_accuracy']:.4f}; on {len(data.test)} test rows {loss:.4f}, {accuracy:.4f}"
    )
    if arguments.normalization == "bln":
        print(f"Next, choose its statistics on validation data:\n  bln-export {path} --select {kept}")
