"""Which statistics policy answers best, and which to take: from the losses alone. No TensorFlow.

Every entry is evaluated on the same mini-batches, so two entries are compared mini-batch by mini-batch: the standard
error of the paired difference, std(ddof=1) / sqrt(mini-batches), leaves out what makes a mini-batch hard for both.

The reference is the entry of the lowest loss that may be chosen. Where the best entry of a weaker row coupling costs
no more than one standard error of its difference to the reference, the difference is taken for noise, and the weaker
coupling is chosen. With one mini-batch there is no standard error: every difference may be noise, and the weakest
coupling is chosen.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, isnan, nan

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError
from bln_serve.export.selection.record import (
    COUPLING_LIMITS,
    Comparison,
    Entry,
    Selection,
    difference,
    figure,
    lowest,
    number,
    within,
)
from bln_serve.manifest import StoredStatistics
from bln_serve.statistics import RowCoupling

__all__ = ["COUPLING_LIMITS", "Comparison", "Entry", "Selection", "rank"]

_ROWS_IN_WORDS = {
    RowCoupling.INDEPENDENT: "its rows are independent",
    RowCoupling.POSITIONAL: "an answer depends on its row's place alone, not on other rows",
}


def rank(
    entries: Sequence[Entry],
    losses: Sequence[NDArray[np.float64] | None],
    *,
    data: str,
    data_sha256: str,
    rows: int,
    mini_batch_rows: int,
    loss: str,
    metrics: Sequence[str] = (),
    coupling: str = "any",
    feature_slots: str = "keep",
    variants: Sequence[StoredStatistics] = (),
) -> Selection:
    """Rank the entries by their mean loss, and choose one.

    Args:
        entries: without `loss` and `standard_error`, in the order that breaks ties.
        losses: each entry's loss by mini-batch, (mini-batches,), all on the same mini-batches; None where unusable.
        data: where the rows come from.
        data_sha256: of the data.
        rows: of the data; those at its end that do not fill a mini-batch were dropped.
        mini_batch_rows: rows of each mini-batch.
        loss: the loss's name.
        metrics: their names, in order.
        coupling: the strongest row coupling that may be chosen, one of `COUPLING_LIMITS`.
        feature_slots: `keep` or `pool`, for the record.
        variants: the data of other statistics than those of training, for the record.

    Raises:
        UsageError: `coupling` is none of them; the losses do not belong together; or no entry within the limit has a
            finite loss.
    """
    if coupling not in COUPLING_LIMITS:
        raise UsageError(f"Expected a row coupling of {', '.join(COUPLING_LIMITS)}. Received: {coupling!r}")
    mini_batches, dropped = divmod(rows, mini_batch_rows)
    _check(losses, mini_batches)
    measured = [(replace(entry, loss=_mean(each)), each) for entry, each in zip(entries, losses, strict=True)]
    measured.sort(key=lambda pair: _place(pair[0]))
    if not any(entry.finite and within(coupling, entry.row_coupling) for entry, _ in measured):
        raise UsageError(_nothing_to_choose([entry for entry, _ in measured], coupling))
    _, of_reference = measured[lowest([entry for entry, _ in measured], coupling)]
    ranked = tuple(replace(entry, standard_error=_standard_error(each, of_reference)) for entry, each in measured)
    best = _best(ranked, coupling)
    # The reference is among them, with 0 for both, and what is beyond the limit comes after it.
    chosen = next(each for each in best if mini_batches == 1 or each.difference <= each.standard_error)
    return Selection(
        data=data,
        data_sha256=data_sha256,
        rows=rows,
        dropped_rows=dropped,
        mini_batch_rows=mini_batch_rows,
        mini_batches=mini_batches,
        loss=loss,
        metrics=tuple(metrics),
        coupling=coupling,
        entries=ranked,
        best=best,
        chosen=chosen.entry,
        reason=_reason(ranked, best, chosen, coupling),
        feature_slots=feature_slots,
        variants=tuple(variants),
    )


def _check(losses: Sequence[NDArray[np.float64] | None], mini_batches: int) -> None:
    shapes = {np.shape(each) for each in losses if each is not None}
    if mini_batches < 1 or shapes - {(mini_batches,)}:
        raise UsageError(
            "Expected rows for at least one mini-batch, and from every policy a loss for each mini-batch. Received: "
            f"{mini_batches} mini-batches and losses of shape {', '.join(map(str, sorted(shapes))) or 'none'}."
        )


def _mean(losses: NDArray[np.float64] | None) -> float | None:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is ranked as such
        return None if losses is None else float(np.mean(losses))


def _place(entry: Entry) -> tuple[int, float, int]:
    """Return what entries are sorted by: numbers, infinity, NaN, unusable; then the strength of the coupling."""
    strength = entry.row_coupling.strength
    if entry.loss is None:
        return 2, 0.0, strength
    return (1, 0.0, strength) if isnan(entry.loss) else (0, entry.loss, strength)


def _standard_error(losses: NDArray[np.float64] | None, of_reference: NDArray[np.float64] | None) -> float | None:
    if losses is None or of_reference is None:
        return None
    if losses is of_reference:
        return 0.0
    if len(losses) == 1:
        return nan
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.std(losses - of_reference, ddof=1) / np.sqrt(len(losses)))
    return error if isfinite(error) else nan


def _best(entries: Sequence[Entry], coupling: str) -> tuple[Comparison, ...]:
    reference, found = entries[lowest(entries, coupling)], []
    for row_coupling in RowCoupling:
        for index, entry in enumerate(entries):
            if entry.finite and entry.row_coupling is row_coupling:
                found.append(
                    Comparison(row_coupling, index, difference(entry, reference), number(entry.standard_error))
                )
                break
    return tuple(found)


def _reason(entries: Sequence[Entry], best: Sequence[Comparison], chosen: Comparison, coupling: str) -> str:
    entry, reference = entries[chosen.entry], entries[lowest(entries, coupling)]
    if entry is reference:
        beaten = any(each.difference < 0 for each in best)
        said = f"{entry.name} has the lowest loss{f' that --coupling {coupling} allows' if beaten else ''}"
    else:
        noise = (
            "which a single mini-batch cannot tell from noise"
            if isnan(chosen.standard_error)
            else f"within one standard error ({figure(chosen.standard_error)}) of the paired difference"
        )
        said = f"{entry.name}: its loss is {figure(chosen.difference)} above that of {reference.name}, {noise}"
    if words := _ROWS_IN_WORDS.get(entry.row_coupling):
        said = f"{said}, and {words}"
    if entry.row_coupling is RowCoupling.INDEPENDENT:
        return said
    than = "more" if entry is reference else f"more than {reference.name}"
    return f"{said}; {_cost_of_independence(entries, best, than)}"


def _cost_of_independence(entries: Sequence[Entry], best: Sequence[Comparison], than: str) -> str:
    if best[0].row_coupling is not RowCoupling.INDEPENDENT:
        return "no policy with independent rows has a finite loss"
    costs = f"the best with independent rows, {entries[best[0].entry].name}, costs {figure(best[0].difference)}"
    if isnan(best[0].standard_error):
        return f"{costs} {than}, and there is no standard error to judge it by"
    return f"{costs} (standard error {figure(best[0].standard_error)}) {than}"


def _nothing_to_choose(entries: Sequence[Entry], coupling: str) -> str:
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(_why_not(entry), []).append(entry.name)
    listed = "\n".join(f"  {', '.join(names)}: {why}" for why, names in groups.items())
    allowed = "" if coupling == "any" else f" and a row coupling that --coupling {coupling} allows"
    ways = []
    if any(entry.finite for entry in entries):
        ways.append("allow a stronger row coupling with --coupling")
    if any(entry.loss is not None and not entry.finite for entry in entries):
        ways.append("see that the data is scaled as in training")
    if not all(entry.finite for entry in entries):
        ways.append("estimate the stored statistics again with --calibrate")
    return (
        f"Expected a policy with a finite loss{allowed}. Received:\n{listed or '  no policy'}\n"
        f"To choose one, {', or '.join(ways) or 'evaluate some'}."
    )


def _why_not(entry: Entry) -> str:
    if entry.loss is None:
        return entry.unusable or "unusable"
    return f"{entry.row_coupling} rows" if entry.finite else f"a loss of {figure(entry.loss)}"
