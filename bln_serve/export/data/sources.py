"""Where labelled or unlabelled rows come from: a file, a function of the caller's, a tf.data.Dataset, arrays.

Whatever it is, in the end there is an array for each input and each target, by the signature's names, nothing of it
checked but the names: see names. Nothing is unpickled. A dataset's elements are batches or single rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from bln_serve.artifact import sha256
from bln_serve.errors import UsageError
from bln_serve.export import loading
from bln_serve.export.data import names
from bln_serve.export.data.names import Wanted
from bln_serve.signature import Arrays, ModelSignature, TensorSpec

_FORMS = "data.npz, data.npy or module:function"
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Found:
    """Arrays as they are, not yet held against the signature.

    Attributes:
        inputs: by name, in the signature's order.
        targets: by the outputs' names, in the signature's order; empty where none were asked for.
        source: for people.
        file_sha256: of the file they came from, if they did.
    """

    inputs: Arrays
    targets: Arrays
    source: str
    file_sha256: str | None


def find(source: Any, signature: ModelSignature, *, targets: bool) -> Found:
    """Get the arrays.

    Args:
        source: a file's path, "module:function", the function itself, a tf.data.Dataset, or arrays.
        signature: whose names are looked for.
        targets: whether targets are needed; otherwise they are left where they are.

    Raises:
        UsageError: there is nothing to be had, or not what the signature asks for.
    """
    if isinstance(source, str | Path) and Path(source).suffix in (".npz", ".npy"):
        return _in_file(Path(source), signature, targets)
    name = str(source) if isinstance(source, str | Path) else "arrays"
    if name != "arrays":
        source = loading.imported(name, "data", _FORMS)
    elif callable(source):
        name = f"{source.__module__}:{getattr(source, '__qualname__', type(source).__name__)}"
    value = _called(source, name) if callable(source) else source
    return Found(*_read(value, Wanted(signature, targets, name)), name, None)


def _in_file(path: Path, signature: ModelSignature, targets: bool) -> Found:
    if not path.is_file():
        raise UsageError(f"Expected data in {path}. Received: no such file. Give {_FORMS}.")
    with path.open("rb") as file:
        return Found(*_read(_opened(file, path.name), Wanted(signature, targets, path.name)), path.name, sha256(path))


def _opened(file: BinaryIO, name: str) -> Any:
    """Return a file's array, or its arrays by name, which are read as they are taken."""
    try:
        return np.load(file, allow_pickle=False)
    except names.UNREADABLE as error:
        raise UsageError(
            f"Expected {name} to be a file of NumPy's. Received: {names.sentence(error)}. Write it with "
            "np.savez('data.npz', x=x, y=y)."
        ) from error


def _called(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:
        raise UsageError(f"Expected {name} to return data. It raised: {error!r}.") from error


def _read(value: Any, wanted: Wanted) -> tuple[Arrays, Arrays]:
    """Return the inputs and the targets of anything that holds them."""
    if isinstance(value, tf.data.Dataset):
        return _gathered(value, wanted)
    inputs, targets = names.arranged(value, wanted)
    return _as_arrays(inputs), _as_arrays(targets)


def _as_arrays(leaves: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _gathered(dataset: Any, wanted: Wanted) -> tuple[Arrays, Arrays]:
    """Return all rows of a dataset."""
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise UsageError(
            f"Expected a dataset with an end in {wanted.source}. Received: one that repeats. Leave that out."
        )
    if not _is_batched(dataset, wanted):
        dataset = dataset.batch(_ROWS_AT_ONCE)
    rows: tuple[dict[str, _Rows], dict[str, _Rows]] = ({}, {})
    for element in _elements(dataset, wanted):
        for gathered, part in zip(rows, names.arranged(element, wanted), strict=True):
            for name, more in part.items():
                gathered.setdefault(name, _Rows(more)).append(more, name, wanted)
    if not rows[0]:
        raise UsageError(f"Expected rows in {wanted.source}. Received: a dataset without any.")
    inputs, targets = ({name: each.all() for name, each in part.items()} for part in rows)
    return inputs, targets


def _is_batched(dataset: Any, wanted: Wanted) -> bool:
    """Whether a dataset's elements are several rows, by their rank."""
    inputs, targets = names.arranged(dataset.element_spec, wanted)
    if odd := [name for name, leaf in {**targets, **inputs}.items() if not isinstance(leaf, tf.TensorSpec)]:
        raise UsageError(
            f"Expected a dataset of dense tensors in {wanted.source}. Received: {odd[0]!r}, which is ragged or sparse. "
            "Pad it, as the model needs a fixed shape."
        )
    more = {inputs[spec.name].shape.rank - len(spec.shape) for spec in wanted.signature.inputs if _ranked(inputs, spec)}
    if more not in ({0}, {-1}):
        shapes = {name: str(leaf.shape) for name, leaf in inputs.items()}
        raise names.missing(wanted, f"a dataset of elements {shapes}, neither rows nor batches of them")
    return more == {0}


def _ranked(inputs: Mapping[str, Any], spec: TensorSpec) -> bool:
    return inputs[spec.name].shape.rank is not None


def _elements(dataset: Any, wanted: Wanted) -> Iterator[Any]:
    iterator = dataset.as_numpy_iterator()
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # whatever the caller's own code in the dataset raises
            raise UsageError(
                f"Expected the dataset of {wanted.source} to give rows. It raised {type(error).__name__}: "
                f"{names.sentence(error)}."
            ) from error
        yield element


class _Rows:
    """An array that grows at its end by an eighth at a time, mostly in place: the rows are never held twice."""

    def __init__(self, first: NDArray[Any]) -> None:
        self._array = np.empty((0, *first.shape[1:]), first.dtype)
        self._count = 0

    def append(self, rows: NDArray[Any], name: str, wanted: Wanted) -> None:
        """Add rows."""
        if rows.shape[1:] != self._array.shape[1:]:
            raise UsageError(
                f"Expected rows of one shape for {name!r} in {wanted.source}. Received: {self._array.shape[1:]} and "
                f"{rows.shape[1:]}."
            )
        count = self._count + len(rows)
        if count > len(self._array):
            self._resize(max(count, len(self._array) * 9 // 8))
        self._array[self._count : count] = rows
        self._count = count

    def all(self) -> NDArray[Any]:
        """Return them."""
        self._resize(self._count)
        return self._array

    def _resize(self, count: int) -> None:
        self._array.resize((count, *self._array.shape[1:]), refcheck=False)
