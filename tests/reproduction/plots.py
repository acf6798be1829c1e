"""The pictures of README.md, drawn from what was measured. The same numbers give the same bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from .measured import METHODS, Results, mean, scores
from .writing import CIFAR10, ORDERS, TRAINED

COLORS = {"bln": "#0b6e4f", "bn": "#c8553d", "ln": "#3d5a98"}
STYLE = {
    "svg.hashsalt": "bln_serve",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def write(results: Results, folder: Path) -> list[Path]:
    """Draw what there is data for, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with rc_context(STYLE):
        for name, draw in (("by_step", by_step), ("by_epoch", by_epoch), ("policies", policies)):
            figure = draw(results)
            path = folder / f"{name}.svg"
            FigureCanvasSVG(figure)
            figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
            # Matplotlib ends lines with blanks, which this repository does not have.
            text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
            path.write_text(text + "\n", encoding="utf-8")
            drawn.append(path)
    return drawn


def by_step(results: Results) -> Figure:
    """Draw the validation loss by step, in both orders: the mean over seeds, and from the lowest to the highest."""
    figure, axes = _panels("validation loss", 1.3, 2.4)
    for axis, order in zip(axes, ORDERS, strict=True):
        for method in METHODS:
            runs = results.of(CIFAR10, order, method)
            _band(axis, method, [dict(run["validation_by_step"]) for run in runs])
        axis.set(xlabel="steps of 25 rows", title=f"CIFAR-10, 20 %: {ORDERS[order]}")
    axes[0].legend()
    return figure


def by_epoch(results: Results) -> Figure:
    """Draw the validation accuracy by epoch, in both orders, and dashed that of the training rows."""
    figure, axes = _panels("accuracy", 0.25, 1.0)
    for axis, order in zip(axes, ORDERS, strict=True):
        for method in METHODS:
            runs = results.of(CIFAR10, order, method)
            _band(axis, method, [{one["epoch"]: one["val_accuracy"] for one in run["history"]} for run in runs])
            training = [{one["epoch"]: one["accuracy"] for one in run["history"]} for run in runs]
            _band(axis, method, training, dashed=True)
        axis.set(xlabel="epoch; dashed: training rows", title=f"CIFAR-10, 20 %: {ORDERS[order]}")
    axes[0].legend()
    return figure


def policies(results: Results) -> Figure:
    """Draw each policy's test loss, ours by seed beside the paper's, in the order of the paper's."""
    figure, axes = _panels("test loss", None, None)
    paper = {policy: loss for policy, (loss, _) in results.paper["policies"][CIFAR10].items() if loss is not None}
    ordered = sorted(paper, key=lambda policy: (paper[policy], policy))
    for axis, order in zip(axes, ORDERS, strict=True):
        for one in results.evaluated(CIFAR10, order):
            losses = scores(one, TRAINED, "test")
            axis.plot(
                ordered, [losses[policy] for policy in ordered], "o", color=COLORS["bln"], alpha=0.5, markersize=4
            )
        axis.plot(ordered, [paper[policy] for policy in ordered], "x", color="black", label="the paper")
        axis.plot([], [], "o", color=COLORS["bln"], label="a seed of ours, as trained")
        axis.set(title=f"CIFAR-10, 20 %, m = 25: {ORDERS[order]}")
        axis.tick_params("x", rotation=90)
    axes[0].legend()
    return figure


def _panels(label: str, low: float | None, high: float | None) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set_ylabel(label)
    if low is not None:
        axes[0].set_ylim(low, high)
    return figure, axes


def _band(axis: Axes, method: str, curves: Sequence[Mapping[int, Any]], *, dashed: bool = False) -> None:
    if not curves:
        return
    places = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[np.nan if curve[place] is None else curve[place] for curve in curves] for place in places]
    line = {"linestyle": "--", "linewidth": 0.9} if dashed else {"label": f"{METHODS[method]}, {len(curves)}"}
    axis.plot(places, [mean(each) for each in values], color=COLORS[method], **line)
    if not dashed:
        low, high = ([edge(each) for each in values] for edge in (min, max))
        axis.fill_between(places, low, high, color=COLORS[method], alpha=0.2, linewidth=0)
