"""The tables of README.md on training, each a function from what was measured to lines of Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from .measured import METHODS, Results, best_by_step, by_chance, differs, mean, spread, steps_to
from .writing import CALIBRATED, NOTHING, ORDERS, REFERENCE, TRAINED, Rows, figure, over_seeds, table


def missing(results: Results) -> list[str]:
    """Say what was planned and is not there."""
    runs = [name for name in results.planned if name not in results.runs]
    ours = [name for name in results.planned if "-bln-" in name]
    origins = {
        origin: [name for name in ours if origin not in results.policies.get(name, {"origins": {}})["origins"]]
        for origin in (TRAINED, REFERENCE, CALIBRATED)
    }
    if not runs and not any(origins.values()):
        return [
            f"Nothing is missing: {len(results.planned)} runs, and {len(ours)} of them evaluated under each policy."
        ]
    lines = [_listed(f"{len(runs)} of {len(results.planned)} runs are missing", runs)]
    for origin, names in origins.items():
        lines.append(_listed(f"{len(names)} of {len(ours)} are not evaluated with statistics {origin}", names))
    return [line for line in lines if line]


def _listed(what: str, names: Sequence[str]) -> str:
    return f"- {what}: {', '.join(f'`{name}`' for name in names)}." if names else ""


def training(results: Results, experiment: str) -> list[str]:
    """Test loss and accuracy of each method beside the paper's."""
    orders = [order for order in ORDERS if any(results.of(experiment, order, method) for method in METHODS)]

    def rows() -> Rows:
        for method, words in METHODS.items():
            paper = results.published(experiment, method)
            cells = [words, f"{paper['test_loss']:.4f} / {paper['test_accuracy']:.4f}" if paper else NOTHING]
            for order in orders:
                cells += _trained(results.of(experiment, order, method), paper if order == "same" else None, order)
            yield cells

    heads = ["", "the paper"]
    for order in orders:
        heads += [f"{ORDERS[order]}: loss", "accuracy", "best epoch", "runs"]
        heads += ["differs"] if order == "same" else []
    return table(heads, rows())


def _trained(runs: Sequence[Mapping[str, Any]], paper: Mapping[str, Any] | None, order: str) -> list[str]:
    values = {what: [run["test"][what] for run in runs] for what in ("loss", "accuracy")}
    epochs = [run["best"]["epoch"] for run in runs]
    cells = [over_seeds(values["loss"]), over_seeds(values["accuracy"]), _range(epochs), str(len(runs))]
    if order == "same":
        cells.append(_differences(values, paper))
    return cells


def _range(numbers: Sequence[int]) -> str:
    if not numbers:
        return NOTHING
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _differences(values: Mapping[str, Sequence[float]], paper: Mapping[str, Any] | None) -> str:
    if paper is None or not values["loss"]:
        return NOTHING
    found = {what: differs(each, paper[f"test_{what}"]) for what, each in values.items()}
    if None in found.values():
        return "one seed"
    return ", ".join(what for what, beyond in found.items() if beyond) or "no"


def places(results: Results, experiment: str) -> list[str]:
    """Say for how many seeds BLN has the lowest test loss of the three."""
    lines = []
    for order, words in ORDERS.items():
        seeds = results.seeds(experiment, order)
        losses = [
            [_of_seed(results.of(experiment, order, one), seed)["test"]["loss"] for one in METHODS] for seed in seeds
        ]
        if seeds:
            first = sum(loss[0] == min(loss) for loss in losses)
            lines.append(f"- {words}: BLN has the lowest test loss of the three for {first} of {len(seeds)} seeds.")
    return lines


def differences(results: Results, experiments: Sequence[tuple[str, str, str]], causes: Mapping[str, str]) -> list[str]:
    """Name each test loss and accuracy farther from the paper's than twice the spread, and what is known of why.

    Args:
        results: what was measured.
        experiments: their names, orders and words; the order is the paper's.
        causes: by `EXPERIMENT/METHOD`.
    """
    lines = []
    for experiment, order, words in experiments:
        for method, name in METHODS.items():
            runs, paper = results.of(experiment, order, method), results.published(experiment, method)
            for what in ("loss", "accuracy") if paper else ():
                values = [run["test"][what] for run in runs]
                if differs(values, paper[f"test_{what}"]):
                    away = abs(mean(values) - paper[f"test_{what}"]) / spread(values)
                    cause = causes.get(f"{experiment}/{method}", "The cause is not known.")
                    chance = by_chance(values, paper[f"test_{what}"])
                    found = f"{over_seeds(values)} and not {paper[f'test_{what}']:.4f}, {away:.1f} spreads away"
                    often = f"one more seed would lie as far off by chance in {chance:.1%} of cases"
                    lines.append(f"- {words}, {name}, {what}: {found} ({often}). {cause}")
    return lines or ["None that more than one seed tells."]


def epochs(results: Results, experiment: str, order: str) -> list[str]:
    """Validation loss and accuracy by epoch."""
    runs = {method: results.of(experiment, order, method) for method in METHODS}
    last = min((len(run["history"]) for each in runs.values() for run in each), default=0)

    def rows() -> Rows:
        for epoch in (number for number in (1, 2, 3, 4, 5, 6, 8, 10, 15) if number <= last):
            yield [str(epoch), *(_epoch(each, epoch) for each in runs.values())]

    return table(["epoch", *METHODS.values()], rows())


def _epoch(runs: Sequence[Mapping[str, Any]], epoch: int) -> str:
    at = [run["history"][epoch - 1] for run in runs]
    return f"{over_seeds([one['val_loss'] for one in at])} / {over_seeds([one['val_accuracy'] for one in at])}"


def convergence(results: Results, experiments: Sequence[tuple[str, str, str]]) -> list[str]:
    """Steps until a validation loss that all three methods of a seed reach."""

    def rows() -> Rows:
        for experiment, order, words in experiments:
            if not (seeds := results.seeds(experiment, order)):
                continue
            steps: dict[str, list[int]] = {method: [] for method in METHODS}
            targets = []
            for seed in seeds:
                three = {method: _of_seed(results.of(experiment, order, method), seed) for method in METHODS}
                targets.append(max(map(best_by_step, three.values())))
                for method, run in three.items():
                    steps[method].append(steps_to(run, targets[-1]))
            yield [words, str(len(seeds)), over_seeds(targets), *(over_seeds(each, 0) for each in steps.values())] + [
                over_seeds([other / ours for other, ours in zip(steps[method], steps["bln"], strict=True)], 1)
                for method in ("bn", "ln")
            ]

    return table(
        ["", "seeds", "target", *(f"{word}, steps" for word in METHODS.values()), "BN / BLN", "LN / BLN"], rows()
    )


def _of_seed(runs: Sequence[Mapping[str, Any]], seed: int) -> Mapping[str, Any]:
    return next(run for run in runs if run["seed"] == seed)


def fifths(results: Results, experiment: str) -> list[str]:
    """The test loss and accuracy of BLN on other fifths of the rows, seed 100, and of all fifths beside the paper's."""
    first = [run for run in results.of(experiment, "same") if run["seed"] == 100]
    runs = [*first, *sorted(results.fifths, key=lambda run: run["first_training_row"])]
    published = results.published(experiment, "bln")

    values = {what: [run["test"][what] for run in runs] for what in ("loss", "accuracy")}

    def rows() -> Rows:
        for run, *figures in zip(runs, *values.values(), strict=True):
            yield [str(run.get("first_training_row", 0)), *map(figure, figures)]
        yield ["all of them", *map(over_seeds, values.values())]
        deviations = [spread(each) for each in values.values()]
        if published and all(deviations):
            off = [abs(mean(each) - published[f"test_{what}"]) for what, each in values.items()]
            away = [figure(one / (by or 1), 1) for one, by in zip(off, deviations, strict=True)]
            yield ["the paper's, in spreads away", *away]

    return table(["first training row", "loss", "accuracy"], rows())
