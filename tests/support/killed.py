"""Kill an operation with SIGKILL at each of its steps in the filesystem, and leave what each leaves to be looked at.

    python -m support.killed OPERATION OUT      makes OUT/1/tiny, OUT/2/tiny, ... for the first step, the second, ...

The last is what is there when the operation comes to its end.
"""

import os
import signal
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The package without its __init__, which imports TensorFlow: that costs seconds, and starts threads that forbid a fork.
sys.modules["bln_serve.export"] = package = types.ModuleType("bln_serve.export")
package.__path__ = [str(ROOT / "bln_serve" / "export")]

from bln_serve.export import deployment  # noqa: E402 - as above
from support.versions import INDEPENDENT, MINI_BATCH, killed_between_the_renames, publish  # noqa: E402 - the package has to be there first

STEPS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"})
OPERATIONS = {
    "export": lambda folder: publish(folder, MINI_BATCH, 2),
    "replace": lambda folder: publish(folder, INDEPENDENT, 1, force=True),
    "replace by a coupled one": lambda folder: publish(folder, MINI_BATCH, 1, force=True),
    "remove": lambda folder: deployment.remove(folder / "1"),
    "sweep": deployment.sweep,
    "first export": lambda folder: publish(folder, MINI_BATCH, 1),
}
THERE = {"replace": MINI_BATCH, "sweep": MINI_BATCH, "first export": None}


def main(operation: str, out: Path) -> None:
    """Run the operation from the same start until it comes to its end."""
    at, code = 0, -1
    while code:
        at += 1
        folder = out / str(at) / "tiny"
        folder.mkdir(parents=True)
        if there := THERE.get(operation, INDEPENDENT):
            publish(folder, there, 1)
        if operation == "sweep":
            killed_between_the_renames(folder, INDEPENDENT, 1)
        code = _run(operation, folder, at)
        assert code in (0, -signal.SIGKILL), f"step {at} of {operation} ended with {code}"


def _run(operation: str, folder: Path, at: int) -> int:
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = at

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    OPERATIONS[operation](folder)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
