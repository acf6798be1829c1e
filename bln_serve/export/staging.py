"""A version on its way to its place: written beside it, renamed into it, and cleared away if the export is killed.

.V.RANDOM         the version being written
.V.RANDOM.old     the version that it replaces, between the two renames
.V.RANDOM.lock    held by the process that writes; the kernel lets go of it when that ends, however it ends
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bln_serve.errors import ArtifactError, ArtifactExistsError, BlnServeError

# By the system's own sentence, which TensorFlow's and NumPy's errors quote alike.
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))

# A version being written (.V.RANDOM), its lock, and the version it replaces. Triton takes a folder for a version if its
# name begins with a number, so these begin with a dot.
_STAGE = re.compile(r"(?P<stage>\.(?P<version>[1-9][0-9]*)\.[0-9a-z_]{8})(\.lock|\.old)?")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to write a version into; whatever is left of it vanishes at the end.

    Args:
        target: NAME/VERSION as it will be.

    Yields:
        A folder whose name no server takes for a version. `put_in_place` makes it one.

    Raises:
        ArtifactError: the disk is full, in whosever words the block says so.
    """
    with reserved(target) as folder:
        try:
            folder.mkdir()
            folder.chmod(0o755)  # servers run as other users
            yield folder
        except Exception as error:
            if isinstance(error, BlnServeError) or not any(sentence in str(error) for sentence in _NO_ROOM):
                raise
            raise ArtifactError(
                f"Expected room on the disk for {target}. Received: {error}. Nothing was kept: free some space and "
                "export again."
            ) from error


@contextmanager
def reserved(target: Path) -> Iterator[Path]:
    """Reserve a name beside `target`; what bears it at the end vanishes, and the model's folder too if it is empty.

    A lock file beside it is held meanwhile. The kernel lets go of it however this process ends, which is how
    `clear_abandoned` tells a folder that is being written from what a killed export left.
    """
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_if_empty, target.parent)
        _hold(folder, stack)
        yield folder


def put_in_place(folder: Path, target: Path, *, replace: bool) -> None:
    """Rename a written version to its place.

    Args:
        folder: from `staging`.
        target: NAME/VERSION.
        replace: put it in the place of an existing version, which comes back if the renaming fails.

    Raises:
        ArtifactExistsError: `target` is there and `replace` is False; also if it appears meanwhile.
    """
    try:
        if replace and target.exists():
            target.rename(_retired(folder))
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise exists(target) from error
    finally:
        _settle(folder, target)


def clear_abandoned(model_folder: Path) -> None:
    """Clear away what killed exports left in a model's folder, and nothing of an export that still runs.

    A version that was about to be replaced comes back if its place is empty. Whoever calls this keeps others from
    putting versions in place meanwhile: `export.deployment` does.
    """
    for folder, target in staging_folders(model_folder):
        with contextlib.suppress(Timeout, PermissionError), contextlib.ExitStack() as stack:
            _hold(folder, stack, timeout_s=0)
            _settle(folder, target)


def staging_folders(model_folder: Path) -> list[tuple[Path, Path]]:
    """Return the staging folders in a model's folder, each with the version's folder it is for."""
    found = {match for path in model_folder.glob(".*") if (match := _STAGE.fullmatch(path.name))}
    return sorted({(model_folder / match["stage"], model_folder / match["version"]) for match in found})


def retired_versions(model_folder: Path) -> list[Path]:
    """Return the folders of versions that were taken away to be replaced, and neither came back nor went."""
    return sorted(retired for folder, _ in staging_folders(model_folder) if (retired := _retired(folder)).exists())


def _hold(folder: Path, stack: contextlib.ExitStack, timeout_s: float = -1) -> None:
    """Hold a staging folder's lock until the stack is unwound; then the folder goes, and the lock file after it.

    Raises:
        filelock.Timeout: another holds it.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # An export that fails takes the model's folder away if it is empty, at this moment too.
        with contextlib.suppress(FileNotFoundError):
            stack.enter_context(FileLock(lock, timeout=timeout_s))
            break
    # Unlinked while it is held: whoever waits for it finds that it has no name any more, and makes it anew.
    stack.callback(lock.unlink, missing_ok=True)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _retired(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _settle(folder: Path, target: Path) -> None:
    """Bring the version that was being replaced back if its place is empty; else let it go with the staging folder."""
    retired = _retired(folder)
    if not retired.exists():
        return
    if target.exists():
        shutil.rmtree(folder, ignore_errors=True)
        retired.rename(folder)
    else:
        retired.rename(target)


def exists(target: Path) -> ArtifactExistsError:
    """Return the error that says that a version is already there."""
    return ArtifactExistsError(
        f"Expected no version at {target}. Received: one that is already there. "
        "Give another --version, leave it out to take the next, or replace it with --force."
    )
