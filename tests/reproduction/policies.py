"""Evaluate the 16 policies of the BLN models that runs.py trained, on validation and on test rows.

    BLN_DATA=... PYTHONPATH=tests python -m reproduction.policies

Each policy is taken as bln-export would freeze it, and by the parts that bln-export is made of:

    as trained          stored statistics are the estimates of the training (16 policies)
    reference batch     live batch statistics are frozen at those of the first m training rows (12 policies)
    calibrated          stored statistics are estimated anew from training rows, without their labels (15 policies)

    results/policies/NAME.json      losses and accuracies, and which policy the validation rows choose

What is done is skipped: one statistics' origin of one run at a time, those first that take the least time. Mini-batches
have the m rows of the training, in the order of the data. LIMITS says where not all rows are used, and the JSON too.
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import bln_serve
from bln_serve.artifact import sha256
from bln_serve.errors import BlnServeError, UsageError
from bln_serve.export import calibration, data, freezing, loading, reference_batch, saved_model
from bln_serve.export.selection import ranking, scoring
from bln_serve.export.selection.evaluation import Evaluator
from bln_serve.export.selection.record import Entry
from bln_serve.statistics import ALL_POLICIES, mini_batch_rule, strongest

from .runs import FILES, KEPT, RESULTS, ROOT

ORIGINS = ("as trained", "reference batch", "calibrated")


@dataclass(frozen=True)
class Limit:
    """How many rows are used at most, the first ones."""

    calibration: int
    test: int


# Precise statistics need some thousand rows (arXiv 2105.07576, section 3). At m = 1 a run is one row, and the RNN
# takes a hundred times as long as the CNN.
LIMITS = {
    ("cifar10_cnn", False): Limit(2_500, 10_000),
    ("cifar10_cnn", True): Limit(500, 2_500),
    ("imdb_rnn", False): Limit(1_000, 25_000),
}
"""By recipe, and whether m is 1."""


@dataclass(frozen=True)
class Subject:
    """A trained model with its rows: `rows` has Data by part (validation, test, calibration, reference)."""

    callee: Any
    scoring: Any
    m: int
    rows: Mapping[str, Any]


def subject(measured: Mapping[str, Any], data_folder: Path | None) -> Subject:
    """Load a run's model and its rows.

    Raises:
        UsageError: the data is not what the run was trained on.
    """
    folder, m = KEPT / measured["name"], measured["batch_size"]
    limit = LIMITS[measured["recipe"], m == 1]
    path = model_file(measured)
    parts = read_parts(measured, data_folder)
    callee = saved_model.describe(saved_model.functional(loading.load(path)))
    labelled = {
        "validation": folder / "validation.npz",
        "test": (parts.test.x[: limit.test], parts.test.y[: limit.test]),
    }
    unlabelled = {"calibration": parts.train.x[: limit.calibration], "reference": parts.train.x[:m]}
    rows = {name: data.read(rows, callee.signature, targets=True) for name, rows in labelled.items()}
    rows |= {name: data.read(rows, callee.signature, targets=False) for name, rows in unlabelled.items()}
    return Subject(callee, scoring.scoring(callee.model, path, None, []), m, rows)


def read_parts(measured: Mapping[str, Any], data_folder: Path | None) -> Any:
    """Read and divide the data as the run's recipe did."""
    if str(ROOT / "models") not in sys.path:
        sys.path.insert(0, str(ROOT / "models"))  # the recipes import each other as scripts do
    recipe = import_module(measured["recipe"]).RECIPE
    file = data_folder / FILES[measured["recipe"]] if data_folder else None
    # cifar10_20pct.npz is that fifth.
    fraction = 1.0 if file and measured["recipe"] == "cifar10_cnn" else measured["fraction"]
    parts = import_module("paper_data").parts(recipe.data, file, fraction, recipe.validation)
    if parts.sha256() != measured["data"]["sha256"]:
        raise UsageError(
            f"Expected the data that {measured['name']} was trained on. Received: other rows from {parts.source}. Name "
            "the folder that runs.py was given (--data, BLN_DATA)."
        )
    return parts


def evaluate(subject: Subject, origin: str) -> dict[str, Any]:
    """Evaluate the policies that store something of that origin.

    Returns:
        `entries`, a policy each, in the library's order, and `chosen` by row coupling's limit: what the validation rows
        choose by the rule of bln-export --select, among this origin's.
    """
    made = list(_candidates(subject, origin))
    usable = [frozen for _, frozen, problem in made if problem is None]
    found = {}
    for part in ("validation", "test"):
        evaluator = Evaluator(subject.callee, subject.scoring, subject.rows[part], subject.m)
        found[part] = iter(evaluator(usable))
    entries, records, losses = [], [], []
    for policy, frozen, problem in made:
        records.append(_record(policy, origin, frozen, problem))
        results = {part: None if problem else next(of_part) for part, of_part in found.items()}
        losses.append(None if problem else results["validation"].losses)
        entries.append({**_facts(records[-1]), **{part: _numbers(one) for part, one in results.items()}})
    return {"entries": entries, "chosen": _chosen(records, losses, subject)}


def _candidates(subject: Subject, origin: str) -> Iterator[tuple[str, Any, str | None]]:
    """Yield each policy with its frozen layers, and why they cannot be used, or None."""
    callee = subject.callee
    for policy in ALL_POLICIES:
        frozen = freezing.with_policies(callee.model, policy.code)
        if origin == "calibrated":
            if not policy.stored:
                continue
            frozen = calibration.calibrate(callee, frozen, subject.rows["calibration"], subject.m)
        elif origin == "reference batch":
            if not policy.live_over_rows:
                continue
            frozen = reference_batch.freeze_at(callee, frozen, subject.rows["reference"])
        problems = [f"{layer}: {problem}" for layer, problem in freezing.problems_of(frozen)]
        yield policy.code, frozen, "; ".join(problems) or None


def _record(policy: str, origin: str, frozen: Sequence[Any], problem: str | None) -> Any:
    layers = [item.statistics for item in frozen]
    rule = mini_batch_rule(layers, 1)
    single = rule is None or rule.min_rows == 1
    return Entry(policy, origin, strongest(layers)[0], single, None, {}, None, problem)


def _facts(entry: Any) -> dict[str, Any]:
    return {
        "policy": entry.policy,
        "row_coupling": entry.row_coupling.value,
        "single_rows": entry.single_rows,
        "unusable": entry.unusable,
    }


def _numbers(evaluation: Any) -> dict[str, float | None] | None:
    """Return loss and accuracy; what is not a finite number is null."""
    if evaluation is None:
        return None
    values = {"loss": float(evaluation.losses.mean()), "accuracy": evaluation.metrics["accuracy"]}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _chosen(records: Sequence[Any], losses: Sequence[Any], subject: Subject) -> dict[str, str | None]:
    data, found = subject.rows["validation"], {}
    for limit in ("any", "independent"):
        finite = [loss is not None and math.isfinite(loss.mean()) for loss in losses]
        allowed = [limit in ("any", record.row_coupling.value) for record in records]
        if not any(map(all, zip(finite, allowed, strict=True))):
            found[limit] = None
            continue
        facts = {"data": data.source, "data_sha256": data.sha256, "rows": data.rows, "mini_batch_rows": subject.m}
        selection = ranking.rank(records, losses, **facts, loss=subject.scoring.loss_name, coupling=limit)
        found[limit] = selection.entries[selection.chosen].policy
    return found


def record(measured: Mapping[str, Any], subject: Subject, before: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """Return a run's JSON with one more origin."""
    facts = ("name", "recipe", "fraction", "batch_size", "order", "seed")
    whole = {part: subject.rows[part].rows // subject.m * subject.m for part in ("validation", "test", "calibration")}
    return {
        **{name: measured[name] for name in facts},
        "model_sha256": sha256(model_file(measured)),
        "rows": {**whole, "reference": subject.m, "test_available": measured["data"]["rows"]["test"]},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (bln_serve, keras, np, tf)},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "origins": {**before, **made},
    }


def done(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is there of a run, by origin; nothing where it is of another model, such as one trained since."""
    path = RESULTS / "policies" / f"{measured['name']}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return dict(found["origins"]) if found["model_sha256"] == sha256(model_file(measured)) else {}


def model_file(measured: Mapping[str, Any]) -> Path:
    """Return where a run keeps its model."""
    return KEPT / measured["name"] / f"{measured['recipe']}.keras"


def trained(only: str) -> list[dict[str, Any]]:
    """Return the finished runs of BLN models whose files are there, those of m = 25 and of the CNN first."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if only in path.stem]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    with_model = [run for run in found if model_file(run).exists()]
    ours = [run for run in with_model if run["normalization"] == "bln"]
    return sorted(ours, key=lambda run: (run["recipe"], run["batch_size"] == 1, run["seed"], run["order"]))


def carry_out(measured: Mapping[str, Any], origin: str, data_folder: Path | None) -> None:
    """Evaluate one origin of one run, and write it."""
    began, name = time.monotonic(), measured["name"]
    one = subject(measured, data_folder)
    found = {**evaluate(one, origin)}
    found["seconds"] = round(time.monotonic() - began, 1)
    path = RESULTS / "policies" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(record(measured, one, done(measured), {origin: found}), indent=1, allow_nan=False)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content + "\n", encoding="utf-8")
    temporary.replace(path)
    chosen = ", ".join(f"{limit}: {policy}" for limit, policy in found["chosen"].items())
    print(time.strftime("%H:%M:%S"), f"{name}, {origin}: {chosen} in {found['seconds']} s", flush=True)


def main() -> int:
    """Evaluate what is not evaluated yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("BLN_DATA"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs with this text in their names")
    parser.add_argument("--origin", action="append", choices=ORIGINS, help="default: all three")
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do")
    arguments = parser.parse_args()
    folder = Path(arguments.data) if arguments.data else None
    for origin in arguments.origin or ORIGINS:
        for measured in trained(arguments.only):
            is_done = origin in done(measured)
            if arguments.list:
                print(f"{'done ' if is_done else 'to do'} {measured['name']}, {origin}")
            elif not is_done:
                try:
                    carry_out(measured, origin, folder)
                except BlnServeError as error:
                    parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
