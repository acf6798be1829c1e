"""Print every table: PYTHONPATH=tests python -m benchmarks [NAME ...].

inference, export, selection, training, service, microseconds: all of them unless some are named.
`service` and `microseconds` need wrk and two processors. `container`, which needs a Docker engine, too, and ten
minutes, is printed where it is asked for.
"""

import contextlib
import os
import platform
import signal
import sys
from types import FrameType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from . import container, exporting, inference, microseconds, selecting, service, training

TABLES = {
    "inference": ("One run of a model, one thread", inference.rows),
    "export": ("The export of the paper's RNN (20,000 words), beyond importing TensorFlow", exporting.rows),
    "training": ("A training step of the paper's CNN, m = 25", training.rows),
    "selection": ("The search of the 16 policies: the paper's CNN, 5,000 rows, m = 25", selecting.rows),
    "service": ("The service on one processor, wrk on another: the paper's CNN, every check on", service.rows),
    "microseconds": ("Where each microsecond of a request goes: the paper's CNN, PPMM, v2 binary", microseconds.rows),
}
ON_REQUEST = {
    "container": ("The service in its container, on one core", container.rows),
}


def main() -> None:
    """Print the tables asked for, or all that need no Docker engine."""
    signal.signal(signal.SIGTERM, _end)
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors. Ratios are medians of turns side by side.")
    for name in sys.argv[1:] or TABLES:
        title, rows = (TABLES | ON_REQUEST)[name]
        print(f"\n{title}\n", flush=True)
        with contextlib.closing(rows()) as lines:
            for line in lines:
                print(line, flush=True)


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)  # as an exception, so that whoever started a process ends it


if __name__ == "__main__":
    main()
