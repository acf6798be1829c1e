"""Train what the paper's tables are compared with. Takes about two hours: make reproduce.

Each run is one process of a recipe in models/, with one thread, so that it gives the same numbers whatever else the
machine does. It can be interrupted at any time: what is done is skipped, what was begun goes on from its last epoch.

    results/NAME.json           what was measured (tests/reproduction/results/), without any data
    .reproduction/NAME/         the model of the best epoch, validation.npz to choose a policy by, the recipe's output

The data comes from keras.datasets, which downloads it, or from a folder (--data, or BLN_DATA) with imdb_maxlen80.npz,
25,000 + 25,000 reviews as models/imdb_rnn.py describes them, and cifar10_20pct.npz, the first 1,000 training images of
each class and all 10,000 test images; each with x_train, y_train, x_test and y_test.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
KEPT = ROOT / ".reproduction"
FILES = {"cifar10_cnn": "cifar10_20pct.npz", "imdb_rnn": "imdb_maxlen80.npz"}
NORMALIZATIONS = ("bln", "bn", "ln")
ONE_THREAD = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Run:
    """One training run; `fraction` is of the whole data set's training rows."""

    recipe: str
    normalization: str
    fraction: float
    batch_size: int
    order: str
    epochs: int
    seed: int
    validate_every_steps: int

    @property
    def name(self) -> str:
        """Such as cifar10_cnn-20pct-m25-same-bln-s100."""
        parts = (f"{self.fraction:.0%}".replace("%", "pct"), f"m{self.batch_size}", self.order, self.normalization)
        return "-".join((self.recipe, *parts, f"s{self.seed}"))

    @property
    def result(self) -> Path:
        """Where its numbers go."""
        return RESULTS / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        """Where its model and its validation data are kept."""
        return KEPT / self.name

    @property
    def is_done(self) -> bool:
        """Whether its numbers and its model are there."""
        return self.result.exists() and (self.folder / f"{self.recipe}.keras").exists()

    def command(self, data: Path | None) -> list[str]:
        """Return the recipe's command line."""
        options = {
            "normalization": self.normalization,
            "batch-size": self.batch_size,
            "order": self.order,
            "epochs": self.epochs,
            "seed": self.seed,
            "validate-every-steps": self.validate_every_steps,
            "fraction": self.fraction,
            "output": self.folder,
        }
        if data:
            options["data"] = data / FILES[self.recipe]
            if self.recipe == "cifar10_cnn":  # the file is the fraction
                options["fraction"] = 1.0
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(ROOT / "models" / f"{self.recipe}.py"), *words, "--resume"]


def plan() -> Iterator[Run]:
    """Yield the runs, those that say most first."""

    def cifar10(seed: int) -> Iterator[Run]:
        for order, kind in product(("same", "reshuffled"), NORMALIZATIONS):
            yield Run("cifar10_cnn", kind, 0.2, 25, order, 15, seed, 40)

    def imdb(seed: int) -> Iterator[Run]:
        for kind in NORMALIZATIONS:
            yield Run("imdb_rnn", kind, 0.2, 25, "same", 2, seed, 40)

    yield from cifar10(100)
    yield from imdb(100)
    for kind in NORMALIZATIONS:
        yield Run("cifar10_cnn", kind, 0.2, 1, "same", 3, 100, 1000)
    for seed in (101, 102, 103, 104):
        yield from cifar10(seed)
    for kind in NORMALIZATIONS:
        yield Run("imdb_rnn", kind, 1.0, 25, "same", 1, 100, 200)
    for seed in (101, 102):
        yield from imdb(seed)


def carry_out(run: Run, data: Path | None) -> bool:
    """Train, and write what was measured; return whether that went well."""
    if run.is_done:
        return True
    began = time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    (KEPT / ".gitignore").write_text("*\n", encoding="utf-8")
    with (run.folder / "output.txt").open("a", encoding="utf-8") as output:
        ended = subprocess.run(
            run.command(data), stdout=output, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD, check=False
        )
    if ended.returncode:
        say(f"{run.name}: failed, see {run.folder / 'output.txt'}")
        return False
    measured = json.loads((run.folder / "history.json").read_text(encoding="utf-8"))
    # The recipe counts in what its file holds.
    RESULTS.mkdir(exist_ok=True)
    content = {"name": run.name, **measured, "fraction": run.fraction}
    run.result.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (run.folder / "last.npz").unlink(missing_ok=True)
    test = measured["test"]
    say(f"{run.name}: {test['loss']:.4f} / {test['accuracy']:.4f} in {time.monotonic() - began:.0f} s")
    return True


def say(line: str) -> None:
    """Print a line with the time, at once."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def missing(data: Path | None, runs: list[Run]) -> list[str]:
    """Return the names of the files that the runs need and the folder lacks."""
    return sorted({FILES[run.recipe] for run in runs if data and not (data / FILES[run.recipe]).is_file()})


def main() -> int:
    """Carry out the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("BLN_DATA"), metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a processor)")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs with this text in their names")
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do")
    arguments = parser.parse_args()
    runs = [run for run in plan() if arguments.only in run.name]
    if arguments.list:
        print("\n".join(f"{'done ' if run.is_done else 'to do'} {run.name}" for run in runs))
        return 0
    absent = missing(arguments.data, runs)
    if absent:
        parser.error(
            f"Expected {' and '.join(absent)} in {arguments.data}. Received: a folder without. Name another (--data, "
            "BLN_DATA), or none to let Keras download the data."
        )
    with ThreadPoolExecutor(arguments.jobs) as pool:
        went_well = list(pool.map(lambda run: carry_out(run, arguments.data), runs))
    say(f"{sum(went_well)} of {len(runs)} runs are done")
    return 0 if all(went_well) else 1


if __name__ == "__main__":
    sys.exit(main())
