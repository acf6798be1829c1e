"""A reference mini-batch: the statistics that it has of its own take the place of live ones.

Under a policy with a live batch mean or variance the rows of a mini-batch are coupled. Freezing these statistics at one
chosen mini-batch's own values, biased as the layer computes them live, keeps what the model answers to that mini-batch
and uncouples the rows of every other. This is virtual batch normalisation (Salimans et al., 2016, arXiv 1606.03498,
section 3.5) at inference, without the row itself among the reference. Live feature statistics are a row's own and stay
live.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bln_serve.errors import MiniBatchError, UnsupportedModelError, UsageError
from bln_serve.export import estimates, freezing
from bln_serve.export.data import Data
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.observing import Moments, Observer
from bln_serve.export.saved_model import Callee
from bln_serve.statistics import Source, mini_batch_rule


def freeze_at(callee: Callee, frozen: Sequence[FrozenLayer], data: Data) -> tuple[FrozenLayer, ...]:
    """Freeze the live batch statistics of a model at those of one mini-batch.

    Args:
        callee: the model.
        frozen: its BLN layers with the policies under which the mini-batch's own statistics are taken.
        data: the rows of the mini-batch, all in one.

    Returns:
        The same layers, with both batch statistics stored.

    Raises:
        UsageError: no batch statistic is live.
        MiniBatchError: these rows make no mini-batch.
        UnsupportedModelError: a layer is called more than once, and would need a statistic for each call.
    """
    if not any(item.policy.live_over_rows for item in frozen):
        policies = ", ".join(sorted({item.policy.code for item in frozen}))
        raise UsageError(
            f"Expected a policy with a live batch mean or variance for --reference-batch. Received: {policies}, which "
            "has none to freeze. Take one with --statistics, such as MMMM."
        )
    _require_mini_batch(frozen, data.rows)
    with freezing.applied(callee.model, frozen):
        observer = Observer(callee)
        layers = observer.trace()
        ((inputs, _),) = data.mini_batches(callee.signature, data.rows)
        seen = dict(zip(layers, observer(inputs), strict=True))
    return tuple(_frozen(item, seen[item.layer]) if item.layer in seen else item for item in frozen)


def _require_mini_batch(frozen: Sequence[FrozenLayer], rows: int) -> None:
    rule = mini_batch_rule([item.statistics for item in frozen if item.called], rows)
    if rule is None or rule.allows(rows, rows):
        return
    count = f"at least {rule.min_rows}" if rule.max_rows is None else _between(rule.min_rows, rule.max_rows)
    slots = "" if rule.max_rows is None else " Statistics stored by slot allow no more: --feature-slots pool has none."
    raise MiniBatchError(
        f"Expected --reference-batch with {count} rows, all of one mini-batch ({rule.reason}). Received: {rows}.{slots}"
    )


def _between(fewest: int, most: int) -> str:
    if fewest == most:
        return f"exactly {fewest}"
    return f"{fewest} to {most}" if fewest < most else f"at least {fewest}, and at most {most},"


def _frozen(item: FrozenLayer, calls: Sequence[Moments]) -> FrozenLayer:
    live = item.policy.live_over_rows
    if not live:
        return item
    if len(calls) > 1:
        raise UnsupportedModelError(
            f"Expected each layer to be called once for --reference-batch. Received: {item.name!r}, called "
            f"{len(calls)} times, with statistics of its own each time. Give each place a layer, or take --calibrate."
        )
    kept = item.stored or estimates.read(item.layer)
    own = {f"population_{name}": calls[0][name] for name in live}
    steps = {"batch_mean": "mean_steps", "batch_var": "variance_steps"}
    counts = {steps[name]: np.ones(()) for name in live}
    policy = replace(item.policy, batch_mean=Source.POPULATION, batch_var=Source.POPULATION)
    return replace(item, policy=policy, stored={**kept, **own, **counts})
