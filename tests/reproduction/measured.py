"""What was measured, read from the JSON files alone, and the few statistics that the tables are made of.

spread          the standard deviation over seeds, ddof=1; none for one seed
differs         a mean is farther from the paper's figure, one run of one seed, than twice the spread
by chance       how likely one more seed is to lie that far from the mean, where only the seeds differ
Spearman's rho  the correlation of ranks, equal values sharing the mean of their ranks
steps to reach  the first measured step at which the validation loss is no higher than a target
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

HERE = Path(__file__).resolve().parent
METHODS = {"bln": "BLN (MMMM)", "bn": "BN", "ln": "LN"}
POLICIES = tuple(f"{a}{b}{c}{d}" for a in "PM" for b in "PM" for c in "PM" for d in "PM")
DIFFERS = 2.0


@dataclass(frozen=True)
class Results:
    """All that was measured: runs and their policies by name, what was compared over HTTP and what other fifths of IMDB
    gave, the paper's figures, and the names that were planned.
    """

    runs: Mapping[str, Mapping[str, Any]]
    policies: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, Any]
    planned: Sequence[str]
    served: Sequence[Mapping[str, Any]] = ()
    fifths: Sequence[Mapping[str, Any]] = ()

    def of(self, experiment: str, order: str, method: str = "bln") -> list[Mapping[str, Any]]:
        """Return the finished runs, by seed."""
        found = [run for run in self.runs.values() if is_of(run, experiment, order, method)]
        return sorted(found, key=lambda run: run["seed"])

    def seeds(self, experiment: str, order: str) -> list[int]:
        """Return the seeds for which all three methods are there."""
        each = [{run["seed"] for run in self.of(experiment, order, method)} for method in METHODS]
        return sorted(set.intersection(*each))

    def evaluated(self, experiment: str, order: str, origin: str = "as trained") -> list[Mapping[str, Any]]:
        """Return what was evaluated of the BLN runs, by seed, where that origin is there."""
        found = [self.policies[run["name"]] for run in self.of(experiment, order) if run["name"] in self.policies]
        return [one for one in found if origin in one["origins"]]

    def published(self, experiment: str, method: str) -> Mapping[str, Any] | None:
        """Return the paper's figures of one training, if there are any."""
        both = {"experiment": experiment, "normalization": method}
        return next((one for one in self.paper["training"] if both.items() <= one.items()), None)


def read(folder: Path, paper: Path, planned: Sequence[str]) -> Results:
    """Read results/*.json and those in its folders, and the paper's figures."""
    published = json.loads(paper.read_text(encoding="utf-8"))
    served, fifths = (tuple(_by_name(folder / part).values()) for part in ("served", "fifths"))
    return Results(_by_name(folder), _by_name(folder / "policies"), published, planned, served, fifths)


def _by_name(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def is_of(run: Mapping[str, Any], experiment: str, order: str, method: str) -> bool:
    """Whether a run belongs to an experiment, such as `cifar10_cnn-20pct-m25`, an order and a method."""
    return run["name"].startswith(f"{experiment}-{order}-{method}-s")


def score(evaluated: Mapping[str, Any], origin: str, policy: str, part: str, what: str = "loss") -> float:
    """Return a policy's loss or accuracy; NaN where it is not finite or the policy cannot be used."""
    for entry in evaluated["origins"][origin]["entries"]:
        if entry["policy"] == policy and entry[part] is not None and entry[part][what] is not None:
            return float(entry[part][what])
    return float("nan")


def scores(evaluated: Mapping[str, Any], origin: str, part: str, what: str = "loss") -> dict[str, float]:
    """Return all policies of an origin by code, NaN included."""
    entries = evaluated["origins"][origin]["entries"]
    return {one["policy"]: score(evaluated, origin, one["policy"], part, what) for one in entries}


def lowest(values: Mapping[str, float]) -> str:
    """Return the key of the lowest finite value."""
    return min((value, key) for key, value in values.items() if np.isfinite(value))[1]


def mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation over seeds, None for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def differs(values: Sequence[float], published: float) -> bool | None:
    """Whether the mean is farther from the paper's figure than twice the spread; None where there is no spread."""
    deviation = spread(values)
    return None if deviation is None else abs(mean(values) - published) > DIFFERS * deviation


def by_chance(values: Sequence[float], published: float) -> float:
    """Return how likely one more seed's figure is to lie this far from the mean of at least two (Student's t)."""
    away = abs(mean(values) - published) / (np.std(values, ddof=1) * np.sqrt(1 + 1 / len(values)))
    return float(2 * stats.t.sf(away, len(values) - 1))


def spearman(one: Mapping[str, float], other: Mapping[str, float]) -> float | None:
    """Return the rank correlation over the keys that are finite in both; None for fewer than three or without ranks."""
    keys = [key for key in one if np.isfinite(one[key]) and np.isfinite(other.get(key, np.nan))]
    both = [[each[key] for key in keys] for each in (one, other)]
    if len(keys) < 3 or any(np.ptp(each) == 0 for each in both):
        return None
    return float(stats.spearmanr(*both).statistic)


def steps_to(run: Mapping[str, Any], target: float) -> int | None:
    """Return the first measured step whose validation loss is no higher than the target, or None."""
    return next((int(step) for step, loss in run["validation_by_step"] if loss is not None and loss <= target), None)


def best_by_step(run: Mapping[str, Any]) -> float:
    """Return the lowest validation loss between epochs and after them."""
    return min(loss for _, loss in run["validation_by_step"] if loss is not None)
