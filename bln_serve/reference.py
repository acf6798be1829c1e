"""Batch Layer Normalization in float64 NumPy, straight from the equations: the oracle of every other room.

It shares no code with the layer or with the decomposition, and it is written to be read beside the paper
(arXiv 2209.08898) and the reference implementation, not to be fast. For x of shape (n, ..., d), a layer trained with
batch size m, and epsilon = 1e-3:

    x_b = (x - batch_mean) / sqrt(batch_var + epsilon)            batch_*:   over axis 0, shape (1, ..., d)
    x_f = (x - feature_mean) / sqrt(feature_var + epsilon)        feature_*: over axis -1, shape (n, ..., 1)
    y   = gamma * [ x_b * (1 - (1/m + 1e-4)) + x_f * (1/m - 1e-4) ] / sqrt(d) + beta

Variances are biased. A statistic whose letter in the policy is P is replaced by its population estimate; a live
variance is always taken about its own live mean, also where the mean beside it is stored.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPSILON = 1e-3
LIVE = "MMMM"


def branch_weights(m: int) -> tuple[float, float]:
    """Return the weights of the batch branch and of the feature branch, which m alone decides."""
    return 1.0 - (1.0 / m + 1e-4), 1.0 / m - 1e-4


def batch_statistics(x: NDArray[Any]) -> tuple[Array, Array]:
    """Return mean and biased variance over axis 0, each of shape (1, ..., d)."""
    x = np.asarray(x, np.float64)
    mean = x.sum(axis=0, keepdims=True) / x.shape[0]
    return mean, ((x - mean) ** 2).sum(axis=0, keepdims=True) / x.shape[0]


def feature_statistics(x: NDArray[Any]) -> tuple[Array, Array]:
    """Return mean and biased variance over the last axis, each of shape (n, ..., 1)."""
    x = np.asarray(x, np.float64)
    mean = x.sum(axis=-1, keepdims=True) / x.shape[-1]
    return mean, ((x - mean) ** 2).sum(axis=-1, keepdims=True) / x.shape[-1]


def normalize(
    x: NDArray[Any],
    gamma: NDArray[Any],
    beta: NDArray[Any],
    *,
    m: int,
    policy: str = LIVE,
    population: Mapping[str, NDArray[Any]] | None = None,
    epsilon: float = EPSILON,
) -> Array:
    """Apply BLN to one mini-batch.

    Args:
        x: the mini-batch, shape (n, ..., d) with rank >= 2.
        gamma: shape (d,).
        beta: shape (d,).
        m: the batch size the layer was trained with.
        policy: four letters P or M for batch mean, batch variance, feature mean, feature variance. Training is MMMM.
        population: the stored statistics that the policy asks for, as `population_estimates` returns them. Feature
            statistics have m slots; row i meets slot i. A table of one slot, as at m = 1 or where the slots were
            averaged, meets every row.
        epsilon: added to each variance, inside the root.

    Returns:
        shape (n, ..., d), float64.

    Raises:
        ValueError: more rows than slots.
    """
    x = np.asarray(x, np.float64)
    rows, features = x.shape[0], x.shape[-1]
    statistics = dict(
        zip(
            ("batch_mean", "batch_var", "feature_mean", "feature_var"),
            (*batch_statistics(x), *feature_statistics(x)),
            strict=True,
        )
    )
    for name, letter in zip(statistics, policy, strict=True):
        if letter == "P":
            stored = np.asarray((population or {})[name], np.float64)
            slots = stored.shape[0]
            if name.startswith("feature") and slots > 1:
                if rows > slots:
                    raise ValueError(f"{rows} rows, and only {slots} slots")
                stored = stored[:rows]
            statistics[name] = stored
    x_b = (x - statistics["batch_mean"]) / np.sqrt(statistics["batch_var"] + epsilon)
    x_f = (x - statistics["feature_mean"]) / np.sqrt(statistics["feature_var"] + epsilon)
    w_b, w_f = branch_weights(m)
    y: Array = np.asarray(gamma) * ((x_b * w_b + x_f * w_f) / np.sqrt(features)) + np.asarray(beta)
    return y


def population_estimates(batches: Iterable[NDArray[Any]], m: int) -> dict[str, Array]:
    """Estimate the population statistics from the training batches of one epoch.

    Means are plain means over the batches. Each batch variance counts n / (n - 1) times, with that batch's n rows, and
    batches of one row do not count; each feature variance counts m / (m - 1) times. A partial batch updates the slots
    it has. At m = 1 no variance can be estimated: both come back as NaN.

    Args:
        batches: each of shape (n, ..., d) with n <= m; full batches first, so that every slot is known.
        m: the batch size the layer was trained with.

    Returns:
        `batch_mean` and `batch_var` of shape (1, ..., d), `feature_mean` and `feature_var` of shape (m, ..., 1).
    """
    batch_means, batch_vars = [], []
    slots: list[list[tuple[Array, Array]]] = [[] for _ in range(m)]
    for x in batches:
        rows = x.shape[0]
        mean, var = batch_statistics(x)
        batch_means.append(mean)
        if rows > 1 and m > 1:
            batch_vars.append(var * rows / (rows - 1))
        row_means, row_vars = feature_statistics(x)
        for slot in range(rows):
            slots[slot].append((row_means[slot], row_vars[slot]))
    unknown = np.full_like(batch_means[0], np.nan)
    feature_mean = np.stack([np.mean([mean for mean, _ in slot], axis=0) for slot in slots])
    feature_var = np.stack([np.mean([var for _, var in slot], axis=0) for slot in slots])
    return {
        "batch_mean": np.mean(batch_means, axis=0),
        "batch_var": np.mean(batch_vars, axis=0) if batch_vars else unknown,
        "feature_mean": feature_mean,
        "feature_var": feature_var * m / (m - 1) if m > 1 else np.full_like(feature_var, np.nan),
    }
