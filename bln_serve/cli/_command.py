"""What the commands share: errors become one sentence on stderr and an exit code; TensorFlow is imported quietly.

Exit codes: 0 done, 1 the thing itself failed (parity, verification, an unreadable model), 2 wrong usage.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from bln_serve.errors import BlnServeError, UsageError

FAILED = 1
WRONG_USAGE = 2


def run(command: Callable[[], int]) -> int:
    """Run a command's body and return its exit code."""
    try:
        return command()
    except UsageError as error:
        return _say(error, WRONG_USAGE)
    except PermissionError as error:
        return _say(
            f"Expected permission for {error.filename}. Received: {error.strerror}. Let this user in, or run as its "
            "owner (in a container: --user).",
            FAILED,
        )
    except (BlnServeError, OSError) as error:  # a full disk: the sentence says it
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return 130  # as a shell counts a program that SIGINT ended


def _say(error: Exception | str, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Keep what TensorFlow's libraries write to stderr while they load, and show it only if they fail to.

    They write before any setting of theirs is in force, and straight to the file descriptor.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
