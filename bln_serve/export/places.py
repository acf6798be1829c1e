"""Where an export's files go: folders that are made for them, and a Keras file that takes its place last."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bln_serve.errors import ArtifactExistsError, UsageError


def keras_file(path: str | Path | None, source: Path | None, force: bool) -> Path | None:
    """Check where a Keras file is to be written.

    Args:
        path: NAME.keras, or None for none.
        source: of the model that is exported; None for a model from Python.
        force: whether what is there may be replaced.

    Raises:
        UsageError: it has another suffix, or is the file that the model is read from, or a folder.
        ArtifactExistsError: it is there already, and may not be replaced.
    """
    if path is None:
        return None
    path = Path(path)
    if path.suffix != ".keras" or path.is_dir():
        folder = ", a folder" if path.is_dir() else ""
        raise UsageError(f"Expected --save-model with a file NAME.keras. Received: {path}{folder}")
    if source is not None and path.exists() and source.exists() and os.path.samefile(path, source):
        raise UsageError(
            f"Expected --save-model with a file of its own. Received: {path}, from which the model is read. The "
            "artifact says which file it was made from, so that one stays as it is."
        )
    if path.exists() and not force:
        raise ArtifactExistsError(f"Expected no file at {path}. Received: one. Replace it with --force.")
    return path


@contextmanager
def coming(path: Path | None) -> Iterator[Path | None]:
    """Give a place beside a Keras file's to write it to; it is renamed to its own when all else has gone well.

    Args:
        path: as `keras_file` returns it. Its folder is made if need be, and goes again on an error.

    Yields:
        Where to write it; None for None.

    Raises:
        UsageError: nothing can be written there.
    """
    if path is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made(path.parent))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".bln-", dir=path.parent))
        except OSError as error:
            raise UsageError(
                f"Expected --save-model in a folder that can be written to. Received: {path}: {error}."
            ) from error
        written = Path(folder) / path.name
        yield written
        written.replace(path)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; what was made goes again if the block fails and has left it empty."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise
