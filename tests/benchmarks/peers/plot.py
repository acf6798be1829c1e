"""Draw what was measured: python plot.py results.json results.svg. Needs matplotlib alone."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "bln"  # the same figures make the same file
mpl.rcParams["svg.fonttype"] = "none"  # letters, where their outlines would be five times the file

_COLORS = {"bln_serve": "tab:blue", "tritonserver": "tab:green", "LitServe": "tab:orange"}
_STILL = 1e-2
"""Where answers that did not move are drawn, for a logarithm has no 0."""


def main(source: Path, target: Path) -> None:
    """Draw a panel a load, and one of the composition test."""
    results = json.loads(source.read_text())
    burdens = list(dict.fromkeys((each["rows"], each["clients"]) for each in results["loads"]))
    columns = math.ceil((len(burdens) + 1) / 2)
    figure, grid = plt.subplots(2, columns, figsize=(4.4 * columns, 6.4), layout="constrained")
    panels = list(grid.flat)
    for left_over in panels[len(burdens) + 1 :]:
        left_over.set_visible(False)
    for burden, panel in zip(burdens, panels, strict=False):
        entries = [each for each in results["loads"] if (each["rows"], each["clients"]) == burden]
        _loads(panel, entries, burden)
    _composition(panels[len(burdens)], results["composition"])
    machine = results["machine"]
    figure.suptitle(f"The paper's CNN on one core of {machine['processor']}, {results['date']}", fontsize=10)
    figure.savefig(target, metadata={"Date": None})


def _loads(panel: Any, entries: Sequence[Mapping[str, Any]], burden: tuple[int, int]) -> None:
    names = [f"{each['server']}\n{each['body']}" for each in entries]
    rates = [each["requests_per_s"] for each in entries]
    _bars(panel, entries, names, rates, [f"{rate:.0f}" for rate in rates])
    rows, clients = burden
    panel.set_title(f"{rows} row{'s' * (rows > 1)} x {clients} client{'s' * (clients > 1)}: requests/s", fontsize=9)


def _composition(panel: Any, composition: Sequence[Mapping[str, Any]]) -> None:
    moves = [each["tolerances"] for each in composition]
    names = [each["server"] for each in composition]
    _bars(panel, composition, names, [max(move, _STILL) for move in moves], [f"{move:.1g}" for move in moves])
    panel.set_xscale("log")
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_title("MMMM: how far others' traffic moves an answer,\ntimes the tolerance", fontsize=9)


def _bars(
    panel: Any, entries: Sequence[Mapping[str, Any]], names: Sequence[str], values: Sequence[float], said: Sequence[str]
) -> None:
    colors = [_COLORS[each["server"].split(",")[0]] for each in entries]
    drawn = panel.barh(range(len(names)), values, color=colors)
    panel.bar_label(drawn, said, padding=2, fontsize=7)
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
