"""The arrays and texts of an HDF5 file that somebody else wrote, read as data and nothing else.

HDF5 can point outside a file (external links, external storage, virtual datasets), claim far more than it holds
(shapes, chunks never written, compression) and load filters as plugins. Keras writes none of these for weights, so none
is read: every link is a hard one, every dataset plain numbers without filters, and no byte of the file is read twice,
so that what is read is never larger than the file. Sizes are compared before anything is allocated.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from bln_serve.errors import ModelLoadError

# The names on the way from a group to a dataset.
Way = tuple[str, ...]
Arrays = dict[Way, np.ndarray[Any, Any]]

_MAX_DEPTH = 16
_MAX_OBJECTS = 100_000
_MAX_TEXT_BYTES = 2**26
_NUMBERS = "fiu"
_WAY_OUT = "Write the file again with Keras's own model.save or model.save_weights."


class StoredFile:
    """An open HDF5 file.

    Attributes:
        root: its root group.
        size_bytes: its length, which bounds all that is read from it.
    """

    def __init__(self, root: Any, size_bytes: int) -> None:
        self.root = root
        self.size_bytes = size_bytes

    def group(self, name: str) -> Any | None:
        """Return a group of the root by its name, or None if there is none.

        Raises:
            ModelLoadError: the name is a link of another kind, or no group.
        """
        if name not in self.root:
            return None
        found = _follow(self.root, name)
        if not isinstance(found, h5py.Group):
            raise ModelLoadError(f"Expected {name} to be a group. Received: {type(found).__name__}. {_WAY_OUT}")
        return found

    def text(self, attribute: str) -> str | None:
        """Return a text attribute of the root, or None if there is none.

        Raises:
            ModelLoadError: it is no single text, or longer than 64 MiB or the file.
        """
        if attribute not in self.root.attrs:
            return None
        stored = h5py.h5a.open(self.root.id, attribute.encode())
        single = stored.get_space().get_simple_extent_npoints() == 1
        if not single or stored.get_type().get_class() != h5py.h5t.STRING:
            raise ModelLoadError(f"Expected attribute {attribute} to be one text. Received: {stored.dtype}. {_WAY_OUT}")
        limit = min(_MAX_TEXT_BYTES, self.size_bytes)
        # A text of variable length lies in the file as it is, so that the file's own length bounds it.
        is_short = stored.get_type().is_variable_str() or stored.get_storage_size() <= limit
        value = self.root.attrs[attribute] if is_short else None
        if value is None or len(value) > limit:
            raise ModelLoadError(
                f"Expected attribute {attribute} to have at most {limit} bytes. Received: a longer one. {_WAY_OUT}"
            )
        return value.decode() if isinstance(value, bytes) else str(value)

    def arrays(self, group: Any) -> Arrays:
        """Read every dataset below a group, by the names on the way to it.

        Raises:
            ModelLoadError: something in it is no plain array within the file.
        """
        found: Arrays = {}
        left_bytes = self.size_bytes
        pending: list[tuple[Any, Way]] = [(group, ())]
        objects = 0
        while pending:
            parent, way = pending.pop()
            objects += len(parent)
            if len(way) >= _MAX_DEPTH or objects > _MAX_OBJECTS:
                raise ModelLoadError(
                    f"Expected at most {_MAX_OBJECTS} objects, {_MAX_DEPTH} groups deep. Received: more, at "
                    f"{'/'.join(way)}. {_WAY_OUT}"
                )
            for name in parent:
                below = (*way, name)
                item = _follow(parent, name)
                if isinstance(item, h5py.Group):
                    pending.append((item, below))
                else:
                    found[below] = _read(item, "/".join(below), left_bytes)
                    left_bytes -= found[below].nbytes
        return found


@contextmanager
def opened(source: Path | IO[bytes]) -> Iterator[StoredFile]:
    """Open an HDF5 file for reading.

    Raises:
        ModelLoadError: it is no HDF5 file, or damaged, wherever inside the `with` block that shows.
    """
    try:
        size_bytes = source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)
        with h5py.File(source, "r") as root:
            yield StoredFile(root, size_bytes)
    except (
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        MemoryError,
    ) as error:  # h5py has no class of its own
        reason = (str(error).strip("'\" ") or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"Expected a whole HDF5 file. Received: {reason}. {_WAY_OUT}") from error


def _follow(parent: Any, name: str) -> Any:
    link = parent.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ModelLoadError(
            f"Expected no links to other places. Received: {name}, a {type(link).__name__}. {_WAY_OUT}"
        )
    return parent[name]


def _read(dataset: Any, where: str, left_bytes: int) -> np.ndarray[Any, Any]:
    if problem := _problem(dataset, left_bytes):
        raise ModelLoadError(f"Expected {where} to be plain numbers within the file. Received: {problem}. {_WAY_OUT}")
    return np.asarray(dataset[()])


def _problem(dataset: Any, left_bytes: int) -> str | None:
    """Return why a dataset is not read, or None; touches nothing but its description."""
    if not isinstance(dataset, h5py.Dataset):
        return f"a {type(dataset).__name__}"
    created = dataset.id.get_create_plist()
    for refused, what in (
        (created.get_layout() == h5py.h5d.VIRTUAL, "a virtual dataset"),
        (created.get_external_count() > 0, "a dataset stored outside the file"),
        (created.get_nfilters() > 0, "a compressed or filtered dataset"),
    ):
        if refused:
            return what
    if dataset.shape is None or dataset.dtype.kind not in _NUMBERS:
        return f"a dataset of {dataset.dtype}"
    stored_bytes = dataset.id.get_storage_size()
    if dataset.nbytes > min(stored_bytes, left_bytes):
        return f"shape {dataset.shape}, {dataset.nbytes} bytes, of which {min(stored_bytes, left_bytes)} can be stored"
    return None
