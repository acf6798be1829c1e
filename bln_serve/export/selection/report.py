"""A selection as a table to read, and as selection.json to compute with. No TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import isnan, nan
from pathlib import Path
from textwrap import wrap
from typing import Any

import msgspec

from bln_serve.errors import ArtifactError
from bln_serve.export.selection.record import CALIBRATED, Comparison, Entry, Selection, figure, number, short_name

FILE_NAME = "selection.json"
WIDTH = 120
_GAP = "  "
_LONGEST_METRIC = 20


def table(selection: Selection, *, kept: bool = True) -> str:
    """Return the selection as text of at most 120 columns: the ranking, what weaker coupling costs, and the choice.

    Args:
        selection: to show.
        kept: whether a selection.json has the metrics that there is no room for.
    """
    parts = [
        *_heading(selection),
        "",
        *_ranking(selection, kept),
        "",
        *_unusable(selection),
        *_costs(selection),
        *_dropped(selection),
        *_wrapped("chosen: ", selection.reason),
    ]
    return "\n".join(parts)


def write(selection: Selection, path: Path) -> None:
    """Write a selection as indented JSON.

    JSON has no word for NaN and infinity: they are written as null. So the loss of an entry is null where it is NaN or
    infinite, and where there is none because the entry is unusable; `unusable` then says why.
    """
    path.write_bytes(msgspec.json.format(msgspec.json.encode(selection), indent=2) + b"\n")


def read_selection(path: Path) -> Selection:
    """Read what `write` wrote. What was NaN or infinite is NaN.

    Raises:
        ArtifactError: the file cannot be read, or holds something else.
    """
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        entries = [_with_nan(entry) for entry in fields["entries"]]
        best = [{**each, "standard_error": number(each["standard_error"])} for each in fields["best"]]
        return msgspec.convert({**fields, "entries": entries, "best": best}, Selection)
    except (OSError, msgspec.MsgspecError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"Expected a {FILE_NAME} as bln-export --select writes it at {path}. Received: {error!r}. "
            "Make it again with bln-export --select."
        ) from error


def _with_nan(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    if entry["unusable"] is not None:
        return entry
    metrics = {name: number(value) for name, value in entry["metrics"].items()}
    numbers = {name: number(entry[name]) for name in ("loss", "standard_error")}
    return {**entry, **numbers, "metrics": metrics}


def _heading(selection: Selection) -> Iterable[str]:
    slots = ", feature slots pooled" if selection.feature_slots == "pool" else ""
    data = f"{selection.data} (sha256 {selection.data_sha256[:12]})"
    lines = wrap(f"{data}: {selection.evaluated}, by {selection.loss}{slots}", WIDTH)
    for each in selection.variants:
        counted = f"{each.rows} row{'' if each.rows == 1 else 's'}"
        lines += _wrapped(f"{each.origin}: ", f"{each.source} (sha256 {each.sha256[:12]}), {counted}")
    return lines


def _ranking(selection: Selection, kept: bool) -> Iterator[str]:
    """Yield the header and a line for each usable entry, as many metrics as there is room for."""
    usable = [(index, entry) for index, entry in enumerate(selection.entries) if entry.loss is not None]
    before = [
        _column("", ["*" if index == selection.chosen else "" for index, _ in usable]),
        _column("#", [str(index + 1) if entry.finite else "-" for index, entry in usable], right=True),
        _column("policy", [entry.policy for _, entry in usable]),
        _column("statistics", [entry.origin for _, entry in usable]),
        _column("loss", [figure(number(entry.loss)) for _, entry in usable], right=True),
    ]
    after = [
        _column("row coupling", [entry.row_coupling for _, entry in usable]),
        _column("single rows", ["yes" if entry.single_rows else "no" for _, entry in usable]),
        _column("rows/s", [_rate(entry.rows_per_s) for _, entry in usable], right=True),
    ]
    metrics = [
        _column(
            short_name(name, _LONGEST_METRIC), [figure(entry.metrics.get(name, nan)) for _, entry in usable], right=True
        )
        for name in selection.metrics
    ]
    while metrics and sum(len(column[0]) + len(_GAP) for column in [*before, *metrics, *after]) > WIDTH:
        metrics.pop()
    for cells in zip(*before, *metrics, *after, strict=True):
        yield _GAP.join(cells).rstrip()
    if left_out := selection.metrics[len(metrics) :]:
        yield from _wrapped(f"also in {FILE_NAME}: " if kept else "no room for: ", ", ".join(left_out))


def _column(header: str, cells: Sequence[str], right: bool = False) -> Sequence[str]:
    width = max(map(len, [header, *cells]))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in [header, *cells]]


def _rate(rows_per_s: float | None) -> str:
    return "-" if rows_per_s is None or isnan(rows_per_s) else f"{rows_per_s:,.0f}"


def _unusable(selection: Selection) -> Iterator[str]:
    """Yield what cannot be used, entries of one origin and reason together."""
    entries = [entry for entry in selection.entries if entry.loss is None]
    if not entries:
        return
    yield "unusable:"
    for (origin, why), group in groupby(sorted(entries, key=_origin_and_reason), _origin_and_reason):
        text = f"{' '.join(entry.policy for entry in group)} {origin}: {why}"
        yield from wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    if CALIBRATED not in (each.origin for each in selection.variants):
        yield "  what training did not estimate can be estimated from data: --calibrate DATA"
    yield ""


def _origin_and_reason(entry: Entry) -> tuple[str, str]:
    return entry.origin, " ".join((entry.unusable or "unusable").split())


def _costs(selection: Selection) -> Iterator[str]:
    """Yield the best entry of each row coupling, and the best that takes single rows, with what each costs."""
    lines = [(f"best with {each.row_coupling} rows", each) for each in selection.best]
    single = next(
        (
            index
            for index, entry in enumerate(selection.entries)
            if entry.finite and entry.single_rows and selection.allows(entry)
        ),
        None,
    )
    if single is not None:
        entry = selection.entries[single]
        error = number(entry.standard_error)
        lines.append(
            ("best for single rows", Comparison(entry.row_coupling, single, selection.difference(entry), error))
        )
    labels = _column("", [label for label, _ in lines])[1:]
    names = _column("", [selection.entries[each.entry].name for _, each in lines])[1:]
    for label, name, (_, each) in zip(labels, names, lines, strict=True):
        entry = selection.entries[each.entry]
        beyond = "" if selection.allows(entry) else f", beyond --coupling {selection.coupling}"
        yield f"{label}  {name}  loss {figure(number(entry.loss))}, {_cost(selection, each)}{beyond}"
    if single is None:
        yield "best for single rows  none has a finite loss"
    if selection.mini_batches == 1:
        yield "one mini-batch: there is no standard error, and every difference may be noise"


def _cost(selection: Selection, comparison: Comparison) -> str:
    if comparison.entry == selection.reference:
        return "the lowest" if selection.coupling == "any" else "the lowest within the limit"
    error = "" if isnan(comparison.standard_error) else f" +/- {figure(comparison.standard_error)}"
    sign = "+" if comparison.difference >= 0 else ""
    return f"{sign}{figure(comparison.difference)}{error}"


def _dropped(selection: Selection) -> Iterator[str]:
    if count := selection.dropped_rows:
        rows = "row: it does" if count == 1 else f"{count} rows: they do"
        yield f"dropped the last {rows} not fill a mini-batch of {selection.mini_batch_rows}"


def _wrapped(label: str, text: str) -> Iterable[str]:
    return wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))
