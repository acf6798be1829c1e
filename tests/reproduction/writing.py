"""How numbers over seeds are written, and tables in Markdown; the names that the tables share."""

from collections.abc import Iterator, Sequence

import numpy as np

from .measured import mean, spread

CIFAR10, CIFAR10_ALONE = "cifar10_cnn-20pct-m25", "cifar10_cnn-20pct-m1"
IMDB, IMDB_WHOLE = "imdb_rnn-20pct-m25", "imdb_rnn-100pct-m25"
ORDERS = {"same": "the paper's order", "reshuffled": "reshuffled each epoch"}
NOTHING = "-"
TRAINED, REFERENCE, CALIBRATED = "as trained", "reference batch", "calibrated"

Rows = Iterator[Sequence[str]]


def figure(value: float | None, digits: int = 4) -> str:
    """Write a number, NaN and nothing as such."""
    if value is None:
        return NOTHING
    return f"{value:.{digits}f}" if np.isfinite(value) else "NaN"


def over_seeds(values: Sequence[float], digits: int = 4) -> str:
    """Write mean and spread."""
    if not len(values):
        return NOTHING
    deviation = spread(values)
    return figure(mean(values), digits) + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def signed(values: Sequence[float]) -> str:
    """Write the mean and spread of differences."""
    text = over_seeds(values)
    return f"+{text}" if len(values) and mean(values) >= 0 else text


def table(heads: Sequence[str], rows: Rows) -> list[str]:
    """Write a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
