"""Runs that wait until the test lets them go: what is to happen meanwhile then does, however slow the machine is."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

# Python reads it at the start of every process that finds its folder in PYTHONPATH, workers too.
SITE = """
import os, sys, time

if "bln" in str(sys.orig_argv):
    from bln_serve.serving import cost, merging

    run = merging.SharedRun.__call__

    def held(self, portions):
        while os.path.exists(os.environ["RUNS_HELD"]):
            time.sleep(0.002)
        return run(self, portions)

    merging.SharedRun.__call__ = held
    # In the event loop's own thread a run that waits would let nothing else happen.
    cost.CostCurve.loop_rows = 0
"""


def variables(folder: Path) -> dict[str, str]:
    """Return those of a process that sees the folder there."""
    return {"PYTHONPATH": str(folder), "RUNS_HELD": str(folder / "held")}


class Runs:
    """The runs of the services that are started with `variables`.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(SITE)
        self._file = folder / "held"
        self.variables = variables(folder)

    def hold(self) -> None:
        """Let no run begin from now on. Not before a service is ready: until then it times runs."""
        self._file.touch()

    def let_go(self) -> None:
        """Let all begin."""
        self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold them until the block ends, however it does."""
        self.hold()
        try:
            yield
        finally:
            self.let_go()
