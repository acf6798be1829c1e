"""Selections to test with: entries of policies whose losses are given."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bln_serve.export.selection.ranking import Entry, Selection, rank
from bln_serve.statistics import ALL_POLICIES, LayerStatistics, RowCoupling

NEVER = "b1: the stored batch variance was never updated"


def entry(policy: str, origin: str = "as trained", m: int = 5, **fields: Any) -> Entry:
    """Return an entry of a model with one layer, not yet ranked."""
    layer = LayerStatistics("b1", policy, m)
    single = layer.row_coupling is not RowCoupling.MINI_BATCH or m == 1
    facts: dict[str, Any] = {"metrics": {"accuracy": 0.5}, "rows_per_s": 1234.5, "loss": None}
    return Entry(policy, origin, layer.row_coupling, single, **facts | fields)


def ranked(losses: Mapping[str, Sequence[float] | str], m: int = 5, dropped: int = 0, **facts: Any) -> Selection:
    """Rank policies by code, or by code and origin (`PPMM calibrated`), with their losses or why they are unusable."""
    entries, arrays = [], []
    for name, each in losses.items():
        policy, _, origin = name.partition(" ")
        unusable = each if isinstance(each, str) else None
        more = {"unusable": unusable, "metrics": {}, "rows_per_s": None} if unusable else {}
        entries.append(entry(policy, origin or "as trained", m, **more))
        arrays.append(None if isinstance(each, str) else np.array(each, np.float64))
    count = next((len(each) for each in arrays if each is not None), 1)
    given = {"data": "validation.npz", "data_sha256": "ab" * 32, "rows": count * m + dropped, "mini_batch_rows": m}
    return rank(entries, arrays, **given | {"loss": "mse", "metrics": ("accuracy",)} | facts)


def sixteen(m: int = 5, mini_batches: int = 40, origins: Sequence[str] = ("as trained",), **facts: Any) -> Selection:
    """Rank all policies, with losses that differ by more than their noise and rise from PPPP to MMMM."""
    rng = np.random.default_rng(7)
    hard = rng.normal(0, 0.3, mini_batches)
    losses = {
        f"{policy} {origin}": 1.5 + 0.02 * place + 0.001 * number + hard + rng.normal(0, 0.03, mini_batches)
        for number, origin in enumerate(origins)
        for place, policy in enumerate(ALL_POLICIES)
    }
    return ranked(losses, m, **facts)
