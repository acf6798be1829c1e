"""The Keras 3 layer. Its docstring is its specification."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from bln_serve.layers import _estimate
from bln_serve.layers._marker import Marker, current_marker, marked_calls
from bln_serve.layers._slots import require_slots
from bln_serve.layers.pooling import pooled_in_graph
from bln_serve.statistics import STATISTICS, Source, StatisticsPolicy

__all__ = ["BatchLayerNormalization", "Marker", "marked_calls"]

# Weighs the batch branch against the feature branch beside 1/m; fixed by the reference implementation.
DELTA = 1e-4

_FEATURE_SLOTS = ("keep", "pool")


@keras.saving.register_keras_serializable(package="bln_serve")
class BatchLayerNormalization(keras.layers.Layer):  # type: ignore[misc]  # keras publishes no types
    """Batch Layer Normalization (Ziaee and Çano, 2022, https://arxiv.org/abs/2209.08898).

    The layer normalises each value twice, over the rows of its mini-batch and over the features of its row, and adds
    the two in a proportion that the batch size decides. For an input x of shape `(n, ..., d)`, a layer built for batch
    size m, and `epsilon` inside each root:

        x_b = (x - batch_mean) / sqrt(batch_var + epsilon)
        x_f = (x - feature_mean) / sqrt(feature_var + epsilon)
        y   = gamma * (x_b * (1 - (1/m + 1e-4)) + x_f * (1/m - 1e-4)) / sqrt(d) + beta

    `batch_*` are taken over axis 0 alone, so per position and not per channel: shape `(1, ..., d)`. `feature_*` are
    taken over the last axis: shape `(n, ..., 1)`. All variances are biased.

    m is fixed for the life of the layer, whatever number of rows is fed. It sets the two weights (0.9599 and 0.0399 at
    m = 25; -1e-4 and 0.9999 at m = 1; the feature branch is gone at m = 10,000), the number of slots, and the
    correction of the stored feature variance.

    Training (`training=True` and `trainable`) uses the mini-batch's own four statistics, whatever the flags say, lets
    gradients flow through them, and updates the population estimates.

    Inference takes each statistic from the source that its flag names: the population estimate (True) or the
    mini-batch (False). A live variance is taken about its own live mean, also beside a stored mean. The four flags are
    the *statistics policy*, written as four letters: the default is PPMM, and all False is MMMM.

    The trap: with a live batch mean or batch variance a row's answer depends on the other rows of its mini-batch, at
    inference as well. The same row gives different answers in different company, one row alone gives an answer
    without meaning (its batch branch is 0, or, with a stored mean, some 30 times too large), a smaller last batch
    answers differently, and a server that merges requests leaks one client's rows into another's answer. Stored
    feature statistics are kept per *slot*, the row's place in its mini-batch: there a row's answer depends on its
    place. PPMM alone has neither, unless the slots are pooled. Whatever the policy, an answer is only as good as the
    rows the statistics came from are like the rows at hand.

    `feature_slots="pool"` makes one of the slots at inference: each stored feature statistic is averaged over them in
    float64, weighted by `slot_steps`, to shape `(1, ..., 1)`, and serves every row. Then any number of rows may come,
    nothing is positional, and PPPP, PPPM and PPMP treat each row alone as PPMM does. Each row that the estimates rest
    on counts once: a slot that was never updated weighs nothing, and where none was, all weigh alike, so that the
    average is the initial value. A pooled variance is the rows' own variance, averaged. Training, its n <= m, what is
    stored, and m = 1, where one slot serves all anyway, are untouched; the answers are not those of the slots.

    Population estimates are running means over the steps since the estimate was started, right after every step; with
    the callback `PopulationStatistics` an estimate starts anew each epoch, so that the stored one is the last epoch's.
    Each step weighs 1. A batch variance counts n / (n - 1) times, and a step of one row does not count for it; a
    feature variance counts m / (m - 1) times. At m = 1 training can estimate neither variance; the export's calibration
    can, until training goes on. A partial batch updates the slots it has. They are kept in float64, where a running
    mean in float32 stagnates (1e-3 off after 100,000 steps).

    What the paper calls "independent of the input data" are these laws; tests/layers/test_laws.py has each, and each
    place where it stops. A branch is *live* if its mean and its variance both are, as always in training.

    - A live batch branch does not change with x -> a * x + c for a > 0 and c of shape `(1, ..., d)`: each position has
      its own scale and shift over the rows. So a kernel column of a Dense layer before it may be scaled with its bias,
      and any bias moved. A live feature branch does not change for a > 0 and c of shape `(n, ..., 1)`: the contrast
      and brightness of each row, a common scale of the kernel and bias before it, one number added to all biases.
    - The shift is exact, the scale up to epsilon: a acts as epsilon / a**2 in epsilon's place, so that the branch moves
      by at most |x - mean| / std * epsilon * |1 - 1 / a**2| / (2 * var). It stops where the variance is no larger than
      epsilon: there a branch grows with a, and it is 0 where the variance is. A negative a turns the branch's sign.
    - y is the sum of both branches, and does not change only for what suits both: a and c of shape `(1, ..., 1)`.
    - A stored mean ends both laws: a shift c moves the branch by c / sqrt(var + epsilon). Under a stored variance with
      a live mean the shift's law holds, and the branch grows with a, exactly.
    - Rows in another order give the same answers in that order, under every policy without stored feature statistics
      (PPMM and MMMM among them) and in training; not where slots make it positional (PPPP), except at m = 1 or where
      they are pooled.
    - Inference under MMMM is the training output of the same rows; under no other policy.
    - A row alone gives its answer in company under PPMM. With stored feature statistics it does in the same slot, so
      the first rows of a mini-batch may come without the others, and in any place where the slots are pooled. With a
      live batch mean or variance it does not.

    Positions, where the reference implementation answers otherwise or not at all:

    - `training` is omitted or None (the enclosing call's, else False), a bool, or a scalar boolean tensor, for which
      the graph holds both ways and updates in the training one alone.
    - `trainable=False`: `training=True` is inference, under the policy, and nothing is updated, as in Keras's own
      BatchNormalization. Compile again after changing it, the policy or `feature_slots`.
    - A layer used twice in a model, or once a time step by TimeDistributed (a known number of them),
      averages over its uses.
    - More rows than slots are an error, never a broadcast. One row meets slot 0; at m = 1 the one slot serves all rows,
      and so do pooled ones.
    - Inference computes with what is stored, also if nothing was ever estimated: then mean 0 and variance 1.
    - Statistics are computed in float32 under mixed precision and in float64 under float64; the output has the compute
      dtype. `epsilon` is an argument and not a weight.
    - A mask passes through unchanged and does not exclude rows or positions from the statistics.

    Args:
        batch_size: m, at least 1: the batch size that the layer is trained with, and its number of slots.
        batch_moving_mean: take the batch mean from the population estimate at inference.
        batch_moving_var: the same for the batch variance.
        feature_moving_mean: the same for the feature mean, by slot.
        feature_moving_var: the same for the feature variance, by slot.
        epsilon: added to each variance.
        feature_slots: what inference makes of the slots: "keep", a row meets its own, or "pool", their average serves
            every row. May be set later, as the policy may.
        **kwargs: as every Keras layer takes.

    Weights:
        gamma, beta: `(d,)`.
        population_batch_mean, population_batch_var: `(1, ..., d)`, float64, not trainable.
        population_feature_mean, population_feature_var: `(m, ..., 1)`, float64, not trainable.
        mean_steps, variance_steps: scalars, and slot_steps: `(m,)`: how many steps each estimate rests on.
        start_new_estimate: scalar, 1 where the next training step begins a new estimate.

    Input shape:
        `(n, ..., d)`, rank at least 2, every dimension but the first known. Training takes n <= m; inference takes any
        n where nothing is stored by slot (or m is 1, or the slots are pooled), else n <= m.

    Output shape:
        The input's.

    Raises:
        ValueError: m below 1; another `feature_slots`; an input of rank 1 or with an unknown dimension; more rows than
            slots.
    """

    def __init__(  # noqa: PLR0917 - the reference's flags may be given by position
        self,
        batch_size: int,
        batch_moving_mean: bool = True,
        batch_moving_var: bool = True,
        feature_moving_mean: bool = False,
        feature_moving_var: bool = False,
        epsilon: float = 1e-3,
        feature_slots: str = "keep",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(batch_size, bool) or int(batch_size) != batch_size or batch_size < 1:
            raise ValueError(f"Expected batch_size to be a whole number of at least 1. Received: {batch_size!r}")
        self.batch_size = int(batch_size)
        self.batch_moving_mean = bool(batch_moving_mean)
        self.batch_moving_var = bool(batch_moving_var)
        self.feature_moving_mean = bool(feature_moving_mean)
        self.feature_moving_var = bool(feature_moving_var)
        self.epsilon = float(epsilon)
        self.feature_slots = feature_slots
        self.supports_masking = True

    @property
    def policy(self) -> StatisticsPolicy:
        """The four flags as a policy. Setting it asks for a new trace of functions that were compiled before."""
        return StatisticsPolicy.from_flags(
            (self.batch_moving_mean, self.batch_moving_var, self.feature_moving_mean, self.feature_moving_var)
        )

    @policy.setter
    def policy(self, policy: StatisticsPolicy) -> None:
        self.batch_moving_mean, self.batch_moving_var, self.feature_moving_mean, self.feature_moving_var = (
            source is Source.POPULATION for source in policy.sources.values()
        )

    @property
    def feature_slots(self) -> str:
        """`keep` or `pool`. Setting it asks for a new trace of functions that were compiled before."""
        return self._feature_slots

    @feature_slots.setter
    def feature_slots(self, feature_slots: str) -> None:
        if feature_slots not in _FEATURE_SLOTS:
            raise ValueError(f"Expected feature_slots to be 'keep' or 'pool'. Received: {feature_slots!r}")
        self._feature_slots = feature_slots

    @property
    def branch_weights(self) -> tuple[float, float]:
        """The weights of the batch branch and of the feature branch."""
        return 1.0 - (1.0 / self.batch_size + DELTA), 1.0 / self.batch_size - DELTA

    @property
    def population(self) -> Mapping[str, Any]:
        """The stored statistics as Keras variables, by the statistic's name."""
        return {name: getattr(self, f"population_{name}") for name in STATISTICS}

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Create the weights for inputs of `input_shape`."""
        if len(input_shape) < 2 or None in input_shape[1:]:
            raise ValueError(
                f"Expected an input of at least 2 dimensions, all known but the first, in layer {self.name!r}. "
                f"Received: shape {tuple(input_shape)}. Give the model an Input with a fixed shape."
            )
        position = tuple(input_shape[1:])
        features = position[-1:]
        self.gamma = self.add_weight(name="gamma", shape=features, initializer="ones", autocast=False)
        self.beta = self.add_weight(name="beta", shape=features, initializer="zeros", autocast=False)
        batch, by_slot = (1, *position), (self.batch_size, *position[:-1], 1)
        self.population_batch_mean = self._state("population_batch_mean", batch)
        self.population_batch_var = self._state("population_batch_var", batch, "ones")
        self.population_feature_mean = self._state("population_feature_mean", by_slot)
        self.population_feature_var = self._state("population_feature_var", by_slot, "ones")
        self.mean_steps = self._state("mean_steps", ())
        self.variance_steps = self._state("variance_steps", ())
        self.slot_steps = self._state("slot_steps", (self.batch_size,))
        self.start_new_estimate = self._state("start_new_estimate", ())

    def _state(self, name: str, shape: tuple[int, ...], initializer: str = "zeros") -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            dtype="float64",
            trainable=False,
            autocast=False,
            aggregation="mean",  # over the replicas of a distribution strategy
        )

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Normalise a mini-batch of shape `(n, ..., d)`; `training` is as the class says."""
        if not self.trainable or training is None:
            training = False
        if ops.is_tensor(training):  # a constant is folded; else the updates are in the training branch alone
            return ops.cond(ops.cast(training, "bool"), lambda: self._train(inputs), lambda: self._evaluate(inputs))
        return self._train(inputs) if training else self._evaluate(inputs)

    def _evaluate(self, inputs: Any) -> Any:
        marker = current_marker()
        return marker(self, inputs) if marker else self._infer(inputs)

    def _train(self, inputs: Any) -> Any:
        x = ops.cast(require_slots(self.name, inputs, self.batch_size), self._statistics_dtype)
        live = _live_statistics(x)
        _estimate.update(self, ops.shape(x)[0], live)
        return self._combine(x, live)

    def _infer(self, inputs: Any) -> Any:
        policy = self.policy
        if policy.stored_by_slot and self._meets_slots:
            inputs = require_slots(self.name, inputs, self.batch_size)
        x = ops.cast(inputs, self._statistics_dtype)
        statistics = _live_statistics(x)
        statistics |= {name: self._stored(name, ops.shape(x)[0]) for name in policy.stored}
        return self._combine(x, statistics)

    def _stored(self, name: str, rows: Any) -> Any:
        stored, by_slot = self.population[name], name.startswith("feature")
        if by_slot and self.feature_slots == "pool":
            stored = pooled_in_graph(stored, self.slot_steps)
        stored = ops.cast(stored, self._statistics_dtype)
        return stored[:rows] if by_slot and self._meets_slots else stored

    @property
    def _meets_slots(self) -> bool:
        """Whether a row meets the statistics of its own slot, where they are stored."""
        return self.feature_slots == "keep" and self.batch_size > 1

    def _combine(self, x: Any, statistics: Mapping[str, Any]) -> Any:
        gamma, beta = (ops.cast(weight, x.dtype) for weight in (self.gamma, self.beta))
        root_d = float(x.shape[-1]) ** 0.5
        w_b, w_f = (weight / root_d for weight in self.branch_weights)
        batch_scale = gamma * w_b / ops.sqrt(statistics["batch_var"] + self.epsilon)
        feature_scale = w_f / ops.sqrt(statistics["feature_var"] + self.epsilon)
        y = (
            (x - statistics["batch_mean"]) * batch_scale
            + (x - statistics["feature_mean"]) * feature_scale * gamma
            + beta
        )
        return ops.cast(y, self.compute_dtype)

    @property
    def _statistics_dtype(self) -> str:
        return "float64" if self.compute_dtype == "float64" else "float32"

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return `input_shape`."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        return {
            **super().get_config(),
            "batch_size": self.batch_size,
            "batch_moving_mean": self.batch_moving_mean,
            "batch_moving_var": self.batch_moving_var,
            "feature_moving_mean": self.feature_moving_mean,
            "feature_moving_var": self.feature_moving_var,
            "epsilon": self.epsilon,
            "feature_slots": self.feature_slots,
        }


def _live_statistics(x: Any) -> dict[str, Any]:
    """Return the four statistics of a mini-batch, variances in two passes so that an offset costs no precision."""
    statistics = {}
    for name, axis in (("batch", 0), ("feature", -1)):
        mean = ops.mean(x, axis=axis, keepdims=True)
        statistics[f"{name}_mean"] = mean
        # The deviations from a mean add up to 0, so no gradient comes through the mean here, and none is computed.
        deviations = x - ops.stop_gradient(mean)
        statistics[f"{name}_var"] = ops.mean(ops.square(deviations), axis=axis, keepdims=True)
    return statistics
