"""What the commands share: errors become one sentence on stderr and an exit code.

Exit codes: 0 done, 1 the thing itself failed (parity, verification, an unreadable model), 2 wrong usage.
"""

import sys
from collections.abc import Callable

from bln_serve.errors import BlnServeError, UsageError

FAILED = 1
WRONG_USAGE = 2


def run(command: Callable[[], int]) -> int:
    """Run a command's body and return its exit code."""
    try:
        return command()
    except UsageError as error:
        return _say(error, WRONG_USAGE)
    except (BlnServeError, OSError) as error:  # a full disk, a missing permission: the sentence says it
        return _say(error, FAILED)
    except KeyboardInterrupt:
        return 130  # as a shell counts a program that SIGINT ended


def _say(error: Exception, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
