"""Print every table: PYTHONPATH=tests python -m benchmarks [inference|export|training|service ...].

`container`, which needs a Docker engine, wrk and ten minutes, is printed where it is asked for.
"""

import os
import platform
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from . import container, exporting, inference, service, training

TABLES = {
    "inference": ("One run of a model, one thread", inference.rows),
    "export": ("The export of the paper's RNN (20,000 words), beyond importing TensorFlow", exporting.rows),
    "training": ("A training step of the paper's CNN, m = 25", training.rows),
    "service": ("The service on npy bodies, client on the same machine", service.rows),
}
ON_REQUEST = {
    "container": ("The service in its container, on one core", container.rows),
}


def main() -> None:
    """Print the tables asked for, or all that need nothing but this environment."""
    print(f"Python {platform.python_version()}, {os.cpu_count()} processors. Ratios are medians of turns side by side.")
    for name in sys.argv[1:] or TABLES:
        title, rows = (TABLES | ON_REQUEST)[name]
        print(f"\n{title}\n", flush=True)
        for row in rows():
            print(row, flush=True)


if __name__ == "__main__":
    main()
