"""The rows of the paper's two experiments: read, take a fraction, hold validation rows back, put into mini-batches.

Fractions and validation rows are the same number of each class wherever the data has that, and depend on nothing but
the data: a fraction is the first rows of each class, its last rows are for validation. So runs with other seeds are
compared on the same rows.
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
ORDERS = ("same", "reshuffled")
VALIDATION_SEED = 2209


@dataclass(frozen=True)
class Rows:
    """Inputs `(rows, ...)` as the data has them, and labels `(rows,)` from 0."""

    x: NDArray[Any]
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: NDArray[np.int64]) -> "Rows":
        """Return some of the rows."""
        return Rows(self.x[indices], self.y[indices])


@dataclass(frozen=True)
class Kind:
    """What a recipe's data looks like: a row's shape, its largest value (the smallest is 0), the number of classes."""

    shape: tuple[int, ...]
    largest: int
    classes: int
    load: Callable[[], tuple[Rows, Rows]]


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose by, and to report on; and where they came from."""

    train: Rows
    validation: Rows
    test: Rows
    source: str
    available: int

    def sha256(self) -> str:
        """Return the hash of the arrays: their dtypes, shapes and bytes, part after part."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation, self.test):
            for array in (rows.x, rows.y):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Return how many rows there are: of the data's training rows in all, and of each part."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {"available": self.available, **{name: len(rows) for name, rows in parts.items()}}


def parts(kind: Kind, path: Path | None, fraction: float, validation: float) -> Parts:
    """Read the data and divide it.

    Args:
        kind: what the data must look like.
        path: a file that `read` can read; None is the data set of that name in keras.datasets, which Keras downloads.
        fraction: how much of each class in the training rows is used.
        validation: how much of that is held back.

    Raises:
        UsageError: the file is not what `read` expects, or a class would have no row to train on or to hold back.
    """
    everything, test = read(path, kind) if path else kind.load()
    used = everything.take(first_of_each_class(everything.y, fraction)[0])
    trained, held_back = first_of_each_class(used.y, 1 - validation)
    if len(held_back) == 0 or len(np.unique(used.y[trained])) < kind.classes:
        raise UsageError(
            f"Expected rows of all {kind.classes} classes to train on, and rows to hold back. Received: "
            f"{len(everything)} rows, of which fraction {fraction:g} leaves {len(trained)} and {len(held_back)}. Take "
            "a larger fraction."
        )
    # In the data's order the last of each class would come class after class where one class was fuller sooner, and a
    # mini-batch of few classes has statistics of its own.
    mixed = np.random.default_rng(VALIDATION_SEED).permutation(held_back)
    source = path.name if path else "keras.datasets"
    return Parts(used.take(trained), used.take(mixed), test, source, len(everything))


def first_of_each_class(labels: NDArray[Any], share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the first `share` of each class's rows, and those of the others, both ascending."""
    first = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        first[of_class[: round(share * len(of_class))]] = True
    return np.flatnonzero(first), np.flatnonzero(~first)


def read(path: Path, kind: Kind) -> tuple[Rows, Rows]:
    """Read training and test rows from an .npz file with the arrays x_train, y_train, x_test and y_test.

    Raises:
        UsageError: no such file, or it is no .npz file; an array is missing, has another shape or other values.
    """
    arrays = _arrays(path)
    if not set(ARRAYS) <= set(arrays):
        raise UsageError(
            f"Expected the arrays {', '.join(ARRAYS)} in {path}. Received: {', '.join(arrays)}. Write it with "
            "numpy.savez(file, x_train=..., y_train=..., x_test=..., y_test=...)."
        )
    train, test = (_checked(Rows(arrays[f"x_{part}"], arrays[f"y_{part}"]), kind, part) for part in ("train", "test"))
    return train, test


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("one array")
        with loaded:
            return dict(loaded)
    except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:
        raise UsageError(
            f"Expected an .npz file at {path}. Received: {error}. Leave --data out to let Keras download the data."
        ) from error


def _checked(rows: Rows, kind: Kind, part: str) -> Rows:
    """Return the rows, labels as `(rows,)`, if they are what the recipe is for."""
    x, y = rows.x, rows.y
    if y.shape == (len(y), 1):  # as keras.datasets has CIFAR-10's
        y = y[:, 0]
    if x.shape[1:] != kind.shape or x.ndim == 0 or y.shape != (len(x),):
        wanted = ", ".join(map(str, kind.shape))
        raise UsageError(
            f"Expected x_{part} of shape (rows, {wanted}) and y_{part} of shape (rows,). Received: {x.shape} and "
            f"{rows.y.shape}. Cut or pad the rows to that shape, and give each one label."
        )
    for name, array, largest in ((f"x_{part}", x, kind.largest), (f"y_{part}", y, kind.classes - 1)):
        if not np.issubdtype(array.dtype, np.integer) or (
            array.size and not 0 <= array.min() <= array.max() <= largest
        ):
            received = f"{array.dtype} from {array.min()} to {array.max()}" if array.size else f"no {array.dtype}"
            raise UsageError(
                f"Expected whole numbers from 0 to {largest} in {name}. Received: {received}. Give the raw values: the "
                "model scales them itself."
            )
    return Rows(x, y)


def order_of(epoch: int, rows: int, size: int, order: str, seed: int) -> NDArray[np.int64]:
    """Return an epoch's mini-batches as indices `(steps, size)`; what is left over after whole ones is dropped.

    Args:
        epoch: from 0.
        rows: how many there are to train on.
        size: rows of a mini-batch.
        order: `same` for one seeded order for all epochs, `reshuffled` for another each epoch, beginning with that one.
        seed: of the run.
    """
    key = (seed, 0 if order == "same" else epoch)
    steps = rows // size
    return np.random.default_rng(key).permutation(rows)[: steps * size].reshape(steps, size)
