"""Calibration: a model's stored statistics estimated anew, with its final weights, from data.

While a model trains its weights move, and its population estimates average over models that are gone. With the weights
at rest (Wu and Johnson, 2021, arXiv 2105.07576, section 3: precise statistics):

    batch mean, batch variance        over all rows that reach it: mean(x), mean((x - mean(x))**2)    (1, ..., d)
    feature mean, feature variance    of each row over its last axis, averaged over the rows of a slot   (m, ..., 1)

Row i of a mini-batch is of slot i; where nothing is positional and a mini-batch may have more rows than m, of slot
i % m. A slot that no row reaches keeps what it had, and weighs nothing if slots are pooled.

The variance over all rows holds what differs between mini-batches as well, which the mean of their variances does not;
nothing is corrected for degrees of freedom, since with N rows there is next to nothing to correct. Where m is 1 a
variance over all rows is the only one there is, and each row is a step.

Layers are calibrated in the order in which they are called, each on what the calibrated layers before it answer under
the policy that is exported: in service they will.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bln_serve.errors import UsageError
from bln_serve.export import estimates, freezing
from bln_serve.export.data import Data
from bln_serve.export.estimates import Estimates
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.observing import Moments, Observer
from bln_serve.export.saved_model import Callee
from bln_serve.layers import BatchLayerNormalization

OnRun = Callable[[], None]
"""Is told of each run of the model."""

# At m = 1 a run a row would take minutes, and independent rows may share one.
_INDEPENDENT_RUN_ROWS = 256


def calibrate(
    callee: Callee,
    frozen: Sequence[FrozenLayer],
    data: Data,
    rows: int,
    on_run: OnRun = lambda: None,
    *,
    independent: bool = False,
) -> tuple[FrozenLayer, ...]:
    """Estimate what the layers store from data.

    Args:
        callee: the model; it has its own estimates again afterwards.
        frozen: its BLN layers with the policies that it answers under.
        data: the rows; a last partial mini-batch of them is left out.
        rows: of a mini-batch.
        on_run: is told of each run of the model.
        independent: whether it is proved that no answer depends on other rows: at m = 1 many rows then share a run.

    Returns:
        The same layers with estimates of the data's. A layer that the model never calls keeps its own.

    Raises:
        UsageError: nothing is stored under these policies, there is not one whole mini-batch, or the layers do not
            take mini-batches of so many rows.
        UnsupportedModelError: a layer answers where its rows cannot be looked at.
    """
    if not any(item.policy.stored for item in frozen):
        raise UsageError(
            "Expected a policy that stores statistics for --calibrate. Received: mini-batch statistics alone (MMMM), "
            "of which nothing is stored. Take another with --statistics, such as PPMM."
        )
    if data.rows < rows:
        raise UsageError(
            f"Expected at least one mini-batch of {rows} rows for --calibrate. Received: {data.rows} rows."
        )
    if problem := freezing.rows_problem(frozen, rows):
        raise UsageError(
            f"Expected mini-batches that the layers take for --calibrate. Received: {problem}. Set --mini-batch-rows, "
            "or take a policy without slots, such as PPMM."
        )
    run_rows, found = _run_rows(frozen, rows, independent), {}
    with freezing.applied(callee.model, frozen):
        observer = Observer(callee)
        layers = observer.trace()
        for place, layer in enumerate(layers):
            totals = _Totals(layer)
            for inputs, _ in data.mini_batches(callee.signature, run_rows, keep_last=run_rows > rows):
                for moments in observer(inputs)[place]:
                    totals.add(moments)
                on_run()
            estimates.write(layer, totals.estimates())
            found[layer] = estimates.read(layer)
    return tuple(replace(item, stored=found.get(item.layer)) for item in frozen)


def runs(frozen: Sequence[FrozenLayer], data: Data, rows: int, *, independent: bool = False) -> int:
    """Return how many runs of the model a calibration takes, as `calibrate` does with these arguments."""
    called = sum(item.called for item in frozen)
    return called * -(-(data.rows - data.rows % rows) // _run_rows(frozen, rows, independent))


def _run_rows(frozen: Sequence[FrozenLayer], rows: int, independent: bool) -> int:
    single = rows == 1 and all(item.layer.batch_size == 1 for item in frozen)
    return _INDEPENDENT_RUN_ROWS if single and independent else rows


class _Totals:
    """Adds up what one layer saw, call by call."""

    def __init__(self, layer: BatchLayerNormalization) -> None:
        self._m = layer.batch_size
        self._pooled = layer.feature_slots == "pool"
        self._before = estimates.read(layer)
        self._calls = 0
        self._rows = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0  # of the deviations from the mean
        self._slot_sums = {name: np.zeros(getattr(layer, f"population_{name}").shape) for name in _FEATURES}
        self._slot_rows = np.zeros(self._m)

    def add(self, moments: Moments) -> None:
        """Add the moments of one call."""
        rows = len(moments["feature_mean"])
        self._add_over_rows(moments["batch_mean"], moments["batch_var"] * rows, rows)
        self._add_by_slot(moments, rows)
        self._calls += 1

    def _add_over_rows(self, mean: NDArray[Any], squares: NDArray[Any], rows: int) -> None:
        # Chan, Golub and LeVeque (1979): sums of squares about two means, added without cancellation.
        together = self._rows + rows
        shift = mean - self._mean
        self._mean = self._mean + shift * (rows / together)
        self._squares = self._squares + squares + shift**2 * (self._rows * rows / together)
        self._rows = together

    def _add_by_slot(self, moments: Moments, rows: int) -> None:
        slots = np.arange(rows) % self._m
        self._slot_rows += np.bincount(slots, minlength=self._m)
        for name, sums in self._slot_sums.items():
            np.add.at(sums, slots, moments[name])

    def estimates(self) -> Estimates:
        """Return what the layer stores from now on."""
        steps = np.float64(self._rows if self._m == 1 else self._calls)
        return {
            "population_batch_mean": self._mean,
            "population_batch_var": self._squares / self._rows,
            "mean_steps": steps,
            "variance_steps": steps,
            "start_new_estimate": np.float64(0.0),
            **{f"population_{name}": self._slots(name) for name in _FEATURES},
            "slot_steps": np.where(self._reached | self._pooled, self._slot_rows, self._before["slot_steps"]),
        }

    @property
    def _reached(self) -> NDArray[np.bool_]:
        return self._slot_rows > 0

    def _slots(self, name: str) -> NDArray[np.float64]:
        found = self._before[f"population_{name}"].astype(np.float64)
        rows = self._slot_rows[self._reached].reshape(-1, *[1] * (found.ndim - 1))
        found[self._reached] = self._slot_sums[name][self._reached] / rows
        return found


_FEATURES = ("feature_mean", "feature_var")
