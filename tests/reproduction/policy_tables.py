"""The tables of README.md on policies, each a function from what was measured to lines of Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .measured import POLICIES, Results, differs, lowest, mean, score, scores, spearman
from .writing import CALIBRATED, NOTHING, ORDERS, REFERENCE, TRAINED, Rows, figure, over_seeds, signed, table


def policies(results: Results, experiment: str) -> list[str]:
    """The 16 policies' test losses and accuracies as trained, beside the paper's."""
    paper = results.paper["policies"][experiment]
    groups = {order: results.evaluated(experiment, order) for order in ORDERS}
    shown = {order: each for order, each in groups.items() if each}
    by_paper = sorted(POLICIES, key=lambda policy: (paper[policy][0] is None, paper[policy][0], POLICIES.index(policy)))

    def rows() -> Rows:
        for policy in by_paper:
            loss, accuracy = paper[policy]
            published = f"{figure(float('nan') if loss is None else loss)} / {accuracy:.4f}"
            cells = [_losses_and_accuracies(each, policy) for each in shown.values()]
            yield [policy, published, *cells, _differing(groups["same"], policy, paper[policy])]

    heads = [f"{ORDERS[order]} ({len(each)})" for order, each in shown.items()]
    return table(["", "the paper", *heads, "differs, in the paper's order"], rows())


def _differing(group: Sequence[Mapping[str, Any]], policy: str, paper: Sequence[float | None]) -> str:
    """Say which of loss and accuracy are farther from the paper's than the spread allows."""
    both = {what: [score(one, TRAINED, policy, "test", what) for one in group] for what in ("loss", "accuracy")}
    if len(group) < 2 or paper[0] is None or not np.isfinite(both["loss"]).all():
        return NOTHING
    beyond = [what for (what, values), one in zip(both.items(), paper, strict=True) if differs(values, one)]
    return ", ".join(beyond) or "no"


def _losses_and_accuracies(group: Sequence[Mapping[str, Any]], policy: str) -> str:
    both = [[score(one, TRAINED, policy, "test", what) for one in group] for what in ("loss", "accuracy")]
    return "unusable" if np.isnan(both[0]).all() else " / ".join(map(over_seeds, both))


def _evaluated(
    results: Results, experiments: Sequence[tuple[str, str, str]]
) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """Yield each experiment whose policies were evaluated, in words too, with its runs."""
    for experiment, order, words in experiments:
        if group := results.evaluated(experiment, order):
            yield experiment, words, group


def correlations(results: Results, experiments: Sequence[tuple[str, str, str]]) -> list[str]:
    """Spearman's rho of the policies' test losses with the paper's: of each seed, of the mean, and among seeds."""

    def rows() -> Rows:
        for experiment, words, group in _evaluated(results, experiments):
            paper = {p: np.nan if v[0] is None else v[0] for p, v in results.paper["policies"][experiment].items()}
            each = [scores(one, TRAINED, "test") for one in group]
            of_mean = {policy: mean([one[policy] for one in each]) for policy in POLICIES}
            seeds = ", ".join(figure(spearman(one, paper), 2) for one in each)
            among = [spearman(a, b) for place, a in enumerate(each) for b in each[:place]]
            compared = sum(np.isfinite(of_mean[policy]) and np.isfinite(paper[policy]) for policy in POLICIES)
            yield [words, str(compared), seeds, figure(spearman(of_mean, paper), 2), over_seeds(among, 2)]

    return table(
        ["", "policies", "each seed with the paper", "their mean with the paper", "seeds among themselves"], rows()
    )


def flattery(results: Results, experiments: Sequence[tuple[str, str, str]]) -> list[str]:
    """The best of the 16 chosen on validation rows beside the best chosen on the test rows themselves."""

    def rows() -> Rows:
        for _, words, group in _evaluated(results, experiments):
            test = [scores(one, TRAINED, "test") for one in group]
            chosen = [lowest(scores(one, TRAINED, "validation")) for one in group]
            on_test = [min(v for v in one.values() if np.isfinite(v)) for one in test]
            on_validation = [one[policy] for one, policy in zip(test, chosen, strict=True)]
            gained = [a - b for a, b in zip(on_validation, on_test, strict=True)]
            live = [one["MMMM"] for one in test]
            cells = [over_seeds(each) for each in (live, on_validation, on_test)]
            yield [words, str(len(group)), *cells, signed(gained), ", ".join(chosen)]

    heads = [
        "",
        "runs",
        "MMMM, not chosen",
        "chosen on validation",
        "chosen on test",
        "what that flatters",
        "chosen on validation: by seed",
    ]
    return table(heads, rows())


ALL = (TRAINED, REFERENCE, CALIBRATED)
WAYS: Mapping[str, tuple[Sequence[str], Callable[[Mapping[str, Any]], tuple[str, str]]]] = {
    "live: MMMM, whole mini-batches of m": ((TRAINED,), lambda one: (TRAINED, "MMMM")),
    "stored as trained: PPMM": ((TRAINED,), lambda one: (TRAINED, "PPMM")),
    "stored, calibrated: PPMM": ((CALIBRATED,), lambda one: (CALIBRATED, "PPMM")),
    "a reference mini-batch: MMMM frozen": ((REFERENCE,), lambda one: (REFERENCE, "MMMM")),
    "chosen on validation among independent rows": (ALL, lambda one: _chosen(one, single=True)),
    "chosen on validation among all": (ALL, lambda one: _chosen(one, single=False)),
}
"""Ways to serve: which origins it takes to know, and what each takes of a run: origin and policy."""


def _chosen(one: Mapping[str, Any], single: bool) -> tuple[str, str]:
    """Return the origin and policy of the lowest validation loss, of all or of those whose rows are independent."""
    found = {}
    for origin in ALL:
        for entry in one["origins"][origin]["entries"]:
            if not single or entry["row_coupling"] == "independent":
                found[f"{origin}/{entry['policy']}"] = score(one, origin, entry["policy"], "validation")
    origin, policy = lowest(found).split("/")
    return origin, policy


def serving(results: Results, experiment: str, order: str) -> list[str]:
    """What it costs to serve single rows: test loss and accuracy of several ways, and the loss beside MMMM's."""
    group = results.evaluated(experiment, order)

    def rows() -> Rows:
        for words, (needed, way) in WAYS.items():
            known = [one for one in group if set(needed) <= set(one["origins"])]
            yield [words, *_served([(one, *way(one)) for one in known]), str(len(known))]

    return table([ORDERS[order], "rows independent", "loss", "accuracy", "loss beside MMMM", "runs"], rows())


def _served(taken: Sequence[tuple[Mapping[str, Any], str, str]]) -> list[str]:
    """Return the cells of a way, for runs with what it takes of each."""
    losses, accuracies = ([score(*each, "test", what) for each in taken] for what in ("loss", "accuracy"))
    alone = {"yes" if _entry(*each)["row_coupling"] == "independent" else "no" for each in taken}
    words = " or ".join(sorted(alone)) or NOTHING
    if not np.isfinite(losses).all():
        return [words, "unusable", NOTHING, NOTHING]
    added = [loss - score(one, TRAINED, "MMMM", "test") for loss, (one, *_) in zip(losses, taken, strict=True)]
    return [words, over_seeds(losses), over_seeds(accuracies), signed(added)]


def _entry(one: Mapping[str, Any], origin: str, policy: str) -> Mapping[str, Any]:
    return next(entry for entry in one["origins"][origin]["entries"] if entry["policy"] == policy)


def served(results: Results) -> list[str]:
    """The whole test set over HTTP, beside Keras."""

    def rows() -> Rows:
        for one in results.served:
            accuracies = [f"{one['accuracy'][where]:.4f}" for where in ("keras", "http")]
            off = f"{one['largest_logit_difference']:.1e}"
            others = ", ".join(f"{row} ({gap:.1e})" for row, gap in one["differing"]) or "none"
            yield [one["policy"], str(one["rows"]), *accuracies, others, off, f"{one['of_the_tolerance']:.2f}"]

    heads = ["", "rows", "accuracy in Keras", "over HTTP", "rows with another prediction", "largest logit difference"]
    return table([*heads, "of what is allowed"], rows())
