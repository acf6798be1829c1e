"""Every candidate gets the losses and metrics that Keras evaluates, whatever the model does with its rows."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.models import bln, tiny, two_inputs, with_random_statistics

from bln_serve.errors import UnsupportedModelError, UsageError
from bln_serve.export import data, freezing, saved_model
from bln_serve.export.selection import evaluation, scoring, side_by_side
from bln_serve.export.selection.evaluation import Evaluation, Evaluator
from bln_serve.layers import bln_layers
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy

M, ROWS = 5, 43
FOUR = ("PPPP", "PPMM", "MPMP", "MMMM")
GENERATOR = np.random.default_rng(21)
X = GENERATOR.normal(size=(ROWS, 6, 4)).astype(np.float32)
LABELS = GENERATOR.integers(0, 3, ROWS)
# Losses of magnitude 1 in float32, summed in another order: some units in the seventh digit.
RTOL, ATOL = 2e-5, 2e-6
CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def keras_evaluates(model: keras.Model, policy: StatisticsPolicy, x: Any, y: Any) -> dict[str, float]:
    """Evaluate as Keras does, on the whole mini-batches."""
    for layer in bln_layers(model):
        layer.policy = policy
    model.make_test_function(force=True)
    whole = ROWS - ROWS % M
    x, y = keras.tree.map_structure(lambda array: array[:whole], (x, y))
    return model.evaluate(x, y, batch_size=M, verbose=0, return_dict=True)


def evaluated(model: keras.Model, x: Any, y: Any, policies: Sequence[str] = FOUR) -> tuple[Evaluator, list[Evaluation]]:
    callee = saved_model.describe(model)
    rows = data.read((x, y), callee.signature, targets=True).with_targets_like(callee.twin().output)
    evaluator = Evaluator(callee, scoring.scoring(model, None, None, []), rows, M)
    return evaluator, evaluator([freezing.with_policies(model, policy) for policy in policies])


def require_as_keras(model: keras.Model, x: Any, y: Any, policies: Sequence[str] = FOUR) -> None:
    _, found = evaluated(model, x, y, policies)
    for policy, one in zip(policies, found, strict=True):
        expected = keras_evaluates(model, StatisticsPolicy.from_code(policy), x, y)
        assert len(one.losses) == ROWS // M
        np.testing.assert_allclose(one.losses.mean(), expected.pop("loss"), rtol=RTOL, atol=ATOL, err_msg=str(policy))
        assert one.metrics == pytest.approx({name: expected[name] for name in one.metrics}, rel=RTOL, abs=ATOL)
    assert found[0].metrics


def compiled(model: keras.Model, loss: Any = CLASSES, metrics: Any = ("accuracy",)) -> keras.Model:
    model.compile(loss=loss, metrics=list(metrics) if isinstance(metrics, tuple) else metrics, jit_compile=False)
    return model


def residual() -> keras.Model:
    x = keras.Input((6, 4))
    y = layers.Add()([x, bln(M, "PPMM", "one")(layers.Dense(4)(x))])  # before and after the first BLN layer
    y = layers.Concatenate()([layers.Flatten()(bln(M, "PPMM", "two")(y)), layers.Flatten()(x)])
    return keras.Model(x, layers.Dense(3)(y * 2.0))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((6, 4)), layers.Dense(4), bln(M, "PPMM"), layers.Flatten(), layers.Dense(3)])


def nested() -> keras.Model:
    x = keras.Input((6, 4))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(sequential().layers[1](sequential().layers[0](x)))))


def inside_another() -> keras.Model:
    x, y = keras.Input((6, 4)), keras.Input((6, 4))
    inner = keras.Model(y, bln(M, "PPMM", "inner")(layers.Dense(4)(y)))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.Add()([inner(x), x]))))


def used_twice() -> keras.Model:
    x, shared = keras.Input((6, 4)), bln(M, "PPMM", "shared")
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(shared(layers.Dense(4)(shared(x))))))


def recurrent() -> keras.Model:
    x = keras.Input((6, 4))
    y = bln(M, "PPMM", "steps")(layers.LSTM(4, return_sequences=True)(x))
    return keras.Model(x, layers.Dense(3)(bln(M, "PPMM", "last")(layers.GRU(3)(y))))


def once_a_time_step() -> keras.Model:
    x = keras.Input((6, 4))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.TimeDistributed(bln(M, "PPMM", "bln"))(x))))


def centred() -> keras.Model:
    """Return a model with an operation of its own that looks across rows."""
    x = keras.Input((6, 4))
    y = bln(M, "PPMM", "bln")(x)
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y - keras.ops.mean(y, axis=0, keepdims=True))))


BUILDERS = [residual, sequential, nested, inside_another, used_twice, recurrent, once_a_time_step, centred]


def test_all_16_policies_get_what_keras_evaluates() -> None:
    require_as_keras(compiled(tiny("PPMM", M, "tiny")), X, LABELS, [str(policy) for policy in ALL_POLICIES])


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_every_policy_gets_what_keras_evaluates(build: Callable[[], keras.Model]) -> None:
    keras.utils.set_random_seed(5)
    require_as_keras(compiled(with_random_statistics(build())), X, LABELS)


def test_masked_steps_stay_masked() -> None:
    keras.utils.set_random_seed(5)
    words = keras.Input((6,), dtype="int32")
    y = layers.LSTM(4)(bln(M, "PPMM", "bln")(layers.Embedding(9, 4, mask_zero=True)(words)))
    x = GENERATOR.integers(0, 3, (ROWS, 6)).astype(np.int32)
    require_as_keras(compiled(with_random_statistics(keras.Model(words, layers.Dense(3)(y)))), x, LABELS)


def test_several_inputs_outputs_and_losses() -> None:
    x = [GENERATOR.normal(size=(ROWS, 3)).astype(np.float32), GENERATOR.integers(0, 20, (ROWS, 5)).astype(np.int32)]
    y = {"score": GENERATOR.normal(size=(ROWS, 1)).astype(np.float32), "classes": LABELS}
    model = compiled(two_inputs(), {"score": "mse", "classes": CLASSES}, {"score": ["mae"], "classes": ["accuracy"]})
    require_as_keras(model, x, y)


def test_what_the_layers_add_to_the_loss_counts() -> None:
    model = tiny("PPMM", M, "tiny")
    model.layers[-1].kernel_regularizer = keras.regularizers.L2(0.1)
    require_as_keras(compiled(model), X, LABELS)


def test_outputs_with_a_mask_count_what_is_not_padded() -> None:
    keras.utils.set_random_seed(5)
    words = keras.Input((6,), dtype="int32")
    y = bln(M, "PPMM", "bln")(layers.Embedding(9, 4, mask_zero=True)(words))
    model = keras.Model(words, layers.Dense(3)(layers.LSTM(4, return_sequences=True)(y)))
    x = GENERATOR.integers(0, 3, (ROWS, 6)).astype(np.int32)
    require_as_keras(compiled(with_random_statistics(model)), x, GENERATOR.integers(0, 3, (ROWS, 6)))


def test_what_layers_find_in_rows_and_add_to_the_loss_counts() -> None:
    x = keras.Input((6, 4))
    y = layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.1))(layers.Flatten()(bln(M, "PPMM", "bln")(x)))
    require_as_keras(compiled(with_random_statistics(keras.Model(x, y))), X, LABELS)


class Counting(keras.layers.Layer):
    """Has a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, inputs: Any) -> Any:
        return inputs


def test_a_metric_of_a_layer_is_its_own_business() -> None:
    x = keras.Input((6, 4))
    y = layers.Dense(3)(layers.Flatten()(bln(M, "PPMM", "bln")(Counting()(x))))
    model = compiled(with_random_statistics(keras.Model(x, y)))
    _, found = evaluated(model, X, LABELS)
    assert list(found[0].metrics) == ["accuracy"]


def test_a_metric_of_several_numbers_is_refused_before_any_work() -> None:
    model = compiled(tiny("PPMM", M, "tiny"), "mse", [keras.metrics.F1Score()])
    with pytest.raises(UsageError, match=r"Expected metrics of one number. Received: 'f1_score', which gives \(3,\)"):
        evaluated(model, X, np.eye(3, dtype=np.float32)[LABELS])


def test_every_run_is_told_of_once_and_what_telling_raises_is_raised() -> None:
    for build in (residual, centred):  # side by side, and not
        model = compiled(with_random_statistics(build()))
        told: list[int] = []
        callee = saved_model.describe(model)
        rows = data.read((X, LABELS), callee.signature, targets=True)
        evaluator = Evaluator(callee, scoring.scoring(model, None, None, []), rows, M)
        candidates = [freezing.with_policies(model, policy) for policy in ("PPPP", "PPMM", "MMMM")]
        evaluator(candidates, lambda told=told: told.append(1))
        assert len(told) == 3 * evaluator.mini_batches
        with pytest.raises(RuntimeError, match="of the one who is told"):
            evaluator(candidates, raising)


def raising() -> None:
    raise RuntimeError("of the one who is told")


def test_large_activations_are_not_held_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of candidates, down to one, get the same losses."""
    model = compiled(tiny("PPMM", M, "tiny"))
    _, whole = evaluated(model, X, LABELS)
    for most in (5 * evaluation._bytes_a_row(saved_model.describe(model)) * M, 1):
        monkeypatch.setattr(evaluation, "_MOST_BYTES", most)
        _, parts = evaluated(model, X, LABELS)
        for one, other in zip(parts, whole, strict=True):
            np.testing.assert_allclose(one.losses, other.losses, rtol=RTOL, atol=ATOL)


def test_side_by_side_is_taken_where_it_can_be_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    by_itself = []
    monkeypatch.setattr(
        Evaluator,
        "by_itself",
        lambda self, candidate, first=None, **options: (
            by_itself.append(first) or original(self, candidate, first, **options)
        ),
    )
    original = EVALUATE_BY_ITSELF
    evaluated(compiled(with_random_statistics(residual())), X, LABELS)
    assert by_itself == [1, 1]  # the first and the last, to compare with
    by_itself.clear()
    evaluated(compiled(with_random_statistics(centred())), X, LABELS)
    assert by_itself.count(None) == len(FOUR)


EVALUATE_BY_ITSELF = Evaluator.by_itself


def test_what_is_not_what_the_layers_compute_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that is made alone and side by side alike, as a wrong formula would be."""
    right = side_by_side._LIVE["batch_mean"]
    monkeypatch.setitem(side_by_side._LIVE, "batch_mean", lambda x: 1.5 * right(x))
    require_as_keras(compiled(with_random_statistics(sequential())), X + 1.0, LABELS)


def test_the_model_is_as_it_was() -> None:
    model = compiled(tiny("PMPM", M, "tiny"))
    weights, compiled_loss = [weight.numpy() for weight in model.weights], model.loss
    evaluated(model, X, LABELS)
    assert {str(layer.policy) for layer in bln_layers(model)} == {"PMPM"}
    assert model.loss is compiled_loss
    for before, weight in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), before)


def test_more_rows_than_slots_are_refused_where_they_would_meet_them() -> None:
    model = tiny("PPPP", M, "tiny")
    callee, frozen = saved_model.describe(model), freezing.with_policies(model, "PPPP")
    panel = side_by_side.SideBySide(callee, frozen, 1)
    with pytest.raises(UnsupportedModelError, match="Expected at most 5 rows for bln1/batch_mean|feature_mean"):
        panel.answers([X[:6]], evaluation._tensors(side_by_side.tables([frozen])))
