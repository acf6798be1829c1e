"""A selection as a picture, selection.png: losses in the order of the ranking, coloured by row coupling.

The chosen entry lies on a band and has a star. A loss has the standard error of its paired difference to the lowest as
error bar: what matters is whether that reaches the line of the lowest loss.
"""

from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from bln_serve.errors import MissingExtraError
from bln_serve.export.selection.record import Selection, figure, number, short_name, within
from bln_serve.statistics import RowCoupling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_NAME = "selection.png"
WIDTH_PX = 1200
_DPI = 100
_LINE_PX, _TEXT_PX, _FOOT_PX = 25, 19, 88
_PANEL_PX = (232, 632)
# They differ in lightness too, for whoever sees no colours.
_COLORS = {RowCoupling.INDEPENDENT: "#004488", RowCoupling.POSITIONAL: "#DDAA33", RowCoupling.MINI_BATCH: "#BB5566"}
_MARKERS = {RowCoupling.INDEPENDENT: "o", RowCoupling.POSITIONAL: "s", RowCoupling.MINI_BATCH: "D"}
_GREY, _BAND = "#808080", "#e3ecf7"
# A loss farther from the lowest than this many times the upper quartile is drawn at the edge.
_FAR = 3.0
# Where the columns are, in pixels: their right edges, but for the policy and the origin their left ones.
_STAR, _RANK, _POLICY, _ORIGIN = 28, 56, 66, 112
_LOSS, _DIFFERENCE, _SINGLE, _METRICS = 702, 890, 986, (1086, 1186)
# A dollar sign in a name begins no formula.
_PLAIN: Mapping[str, Any] = {"size": 9.5, "parse_math": False}


def write(selection: Selection, path: Path) -> None:
    """Draw a selection as a PNG, 1200 pixels wide. The same selection makes the same bytes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import style  # noqa: PLC0415 - of the extra alone
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - of the extra alone
    except ModuleNotFoundError as error:
        raise MissingExtraError(FILE_NAME, "export") from error
    with style.context("default"):  # whatever a program that calls this has set for its own pictures
        picture = draw(selection)
        FigureCanvasAgg(picture)
        # The version of what drew it would change the bytes.
        picture.savefig(path, format="png", metadata={"Software": None})


def draw(selection: Selection) -> "Figure":
    """Return the picture as matplotlib has it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra alone

    said = _said(selection)
    lines_px = _LINE_PX * len(selection.entries)
    height = 84 + _TEXT_PX * len(said) + lines_px + _FOOT_PX
    picture = Figure(figsize=(WIDTH_PX / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    left, right = _PANEL_PX
    panel = picture.add_axes((left / WIDTH_PX, _FOOT_PX / height, (right - left) / WIDTH_PX, lines_px / height))
    panel.set_xlim(*_range(selection))
    panel.set_ylim(len(selection.entries) - 0.5, -0.5)
    _headings(panel, selection)
    for place, entry in enumerate(selection.entries):
        _names(panel, selection, place)
        if entry.loss is None:
            why = shorten(f"unusable: {entry.unusable}", 150, placeholder=" ...")
            _text(panel, _PANEL_PX[0] + 8, place, why, color=_GREY, size=8.5)
            continue
        _figures(panel, selection, place)
        if entry.finite:
            _point(panel, selection, place)
    _frame(panel, selection)
    _legend(picture, selection, panel.get_xlim()[1])
    _titles(picture, height, f"{selection.entries[selection.chosen].name} is chosen", said)
    return picture


def _titles(picture: "Figure", height: int, title: str, said: Sequence[str]) -> None:
    left = 16 / WIDTH_PX
    picture.text(left, 1 - 14 / height, title, size=15, weight="bold", va="top", parse_math=False)
    for count, line in enumerate(said):
        picture.text(left, 1 - (44 + _TEXT_PX * count) / height, line, va="top", **_PLAIN)


def _said(selection: Selection) -> list[str]:
    dropped = f"; the last {selection.dropped_rows} dropped" if selection.dropped_rows else ""
    return [*wrap(selection.reason, 165), *wrap(f"{selection.data}: {selection.evaluated}{dropped}", 165)]


def _range(selection: Selection) -> tuple[float, float]:
    """Return the losses that the panel's edges stand for."""
    finite = [entry for entry in selection.entries if entry.finite]
    losses = np.array([entry.loss for entry in finite], np.float64)
    errors = np.nan_to_num(np.array([entry.standard_error for entry in finite], np.float64))
    low, quartile = losses.min(), np.quantile(losses, 0.75)
    far = low + _FAR * (quartile - low) if quartile > low else np.inf
    far = max(far, *(number(selection.entries[index].loss) for index in (selection.reference, selection.chosen)))
    shown = losses <= far
    low, high = (losses - errors)[shown].min(), (losses + errors)[shown].max()
    margin = 0.03 * (high - low) or 0.05 * abs(low) or 1.0
    return float(low - margin), float(high + margin)


def _text(panel: "Axes", x_px: float, place: float, text: str, **style: Any) -> None:
    """Write beside or into the panel: `x_px` from the picture's left edge, on the line of an entry."""
    left, right = _PANEL_PX
    x = (x_px - left) / (right - left)
    panel.text(x, place, text, transform=panel.get_yaxis_transform(), **{**_PLAIN, "va": "center", **style})


def _headings(panel: "Axes", selection: Selection) -> None:
    columns = {_LOSS: "loss", _DIFFERENCE: "difference", _SINGLE: "single rows"}
    columns |= {right: short_name(name, 12) for right, name in zip(_METRICS, selection.metrics, strict=False)}
    _text(panel, _POLICY, -1, "policy", color=_GREY)
    _text(panel, _ORIGIN, -1, "statistics", color=_GREY)
    for right, heading in columns.items():
        _text(panel, right, -1, heading, color=_GREY, ha="right")


def _names(panel: "Axes", selection: Selection, place: int) -> None:
    """Write an entry's rank and name; the chosen one's bold, with a star and a band across the picture."""
    entry = selection.entries[place]
    weight, color = "normal", "black" if entry.finite else _GREY
    if place == selection.chosen:
        weight = "bold"
        _text(panel, _STAR, place, "\N{BLACK STAR}", color=_COLORS[entry.row_coupling], ha="right", size=13)
        _band(panel, place)
    if entry.finite:
        _text(panel, _RANK, place, str(place + 1), ha="right", weight=weight)
    _text(panel, _POLICY, place, entry.policy, color=color, weight=weight, family="monospace")
    _text(panel, _ORIGIN, place, entry.origin, color=color, weight=weight)


def _band(panel: "Axes", place: int) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415 - of the extra alone

    left, right = ((x - _PANEL_PX[0]) / (_PANEL_PX[1] - _PANEL_PX[0]) for x in (8, WIDTH_PX - 8))
    band = Rectangle((left, place - 0.5), right - left, 1, clip_on=False, facecolor=_BAND, zorder=-1)
    band.set_transform(panel.get_yaxis_transform())
    panel.add_patch(band)


def _point(panel: "Axes", selection: Selection, place: int) -> None:
    """Draw a loss with its error bar: hollow where beyond the limit, an arrow at the edge where far away."""
    entry = selection.entries[place]
    color, edge = _COLORS[entry.row_coupling], panel.get_xlim()[1]
    loss = number(entry.loss)
    if loss > edge:
        panel.plot(edge, place, ">", color=color, markersize=9, clip_on=False)
        return
    error = 0.0 if isnan(number(entry.standard_error)) else entry.standard_error
    panel.errorbar(
        loss,
        place,
        xerr=error or None,
        fmt=_MARKERS[entry.row_coupling],
        color=color,
        markersize=8,
        markerfacecolor=color if selection.allows(entry) else "white",
        elinewidth=1.6,
        capsize=3,
    )


def _figures(panel: "Axes", selection: Selection, place: int) -> None:
    """Write an entry's figures beside the panel."""
    entry = selection.entries[place]
    columns = {_LOSS: figure(number(entry.loss)), _SINGLE: "yes" if entry.single_rows else "no"}
    if place == selection.reference:
        columns[_DIFFERENCE] = "lowest" if selection.coupling == "any" else "lowest allowed"
    elif entry.finite:
        error = number(entry.standard_error)
        known = "" if isnan(error) else f" \N{PLUS-MINUS SIGN} {figure(error)}"
        columns[_DIFFERENCE] = f"{figure(selection.difference(entry))}{known}"
    for right, name in zip(_METRICS, selection.metrics, strict=False):
        columns[right] = figure(entry.metrics.get(name, nan))
    weight, color = "bold" if place == selection.chosen else "normal", "black" if entry.finite else _GREY
    for right, text in columns.items():
        _text(panel, right, place, text, ha="right", weight=weight, color=color)


def _frame(panel: "Axes", selection: Selection) -> None:
    """Draw the axis, and down to the last point its lines and that of the lowest loss."""
    low, high = panel.get_xlim()
    ends = -0.5, sum(entry.finite for entry in selection.entries) - 0.5
    panel.locator_params(axis="x", nbins=6)
    ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
    panel.vlines(ticks, *ends, color="#dddddd", linewidth=0.8, zorder=0)
    panel.vlines(number(selection.entries[selection.reference].loss), *ends, color=_GREY, linewidth=1, zorder=0)
    panel.set_yticks([])
    panel.set_xlabel(f"{selection.loss} on {selection.data}", **_PLAIN)
    panel.tick_params(axis="x", labelsize=9)
    panel.patch.set_visible(False)
    for side in ("left", "top", "right"):
        panel.spines[side].set_visible(False)


def _legend(picture: "Figure", selection: Selection, edge: float) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - of the extra alone

    signs = []
    for coupling in RowCoupling:
        allowed = within(selection.coupling, coupling)
        color, label = _COLORS[coupling], f"{coupling} rows{'' if allowed else ', not allowed'}"
        sign = Line2D([], [], linestyle="none", marker=_MARKERS[coupling], markersize=8, color=color, label=label)
        sign.set_markerfacecolor(color if allowed else "white")
        signs.append(sign)
    if selection.mini_batches > 1:
        bar = "standard error of the paired difference to the lowest"
        signs.append(Line2D([], [], color="black", marker="|", linewidth=1.6, label=bar))
    if any(entry.finite and number(entry.loss) > edge for entry in selection.entries):
        signs.append(Line2D([], [], linestyle="none", marker=">", markersize=9, color="black", label="farther"))
    picture.legend(
        handles=signs,
        loc="lower left",
        ncols=len(signs),
        frameon=False,
        fontsize=_PLAIN["size"],
        bbox_to_anchor=(0.005, 0.0),
    )
