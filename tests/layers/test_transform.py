"""The same model under another policy: same weights, same optimizer, and it trains on with the same numbers."""

import keras
import numpy as np
import pytest
from keras import layers
from support.models import bln, two_inputs, with_random_statistics

from bln_serve.errors import UnsupportedModelError, UsageError
from bln_serve.layers import PopulationStatistics, bln_layers, with_statistics
from bln_serve.statistics import ALL_POLICIES, StatisticsPolicy

M = 4
RNG = np.random.default_rng(11)
X = RNG.normal(0.5, 2, (12, 6)).astype(np.float32)
Y = RNG.normal(size=(12, 1)).astype(np.float32)


class Subclassed(keras.Model):
    """BLN as an attribute, in a list and in a dictionary; nobody registered the class."""

    def __init__(self, m: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.m = m
        self.first = bln(m, "PPMM", "first")
        self.others = [layers.Dense(5), bln(m, "MPMM", "listed")]
        self.named = {"last": bln(m, "PPPP", "keyed"), "head": layers.Dense(1)}

    def call(self, inputs, training=None):
        x = self.others[1](self.others[0](self.first(inputs)))
        return self.named["head"](self.named["last"](x))

    def get_config(self):
        return {**super().get_config(), "m": self.m}


def functional() -> keras.Model:
    x = keras.Input((6,))
    y = layers.Dropout(0.3, seed=1)(bln(M, "PPMM", "bln1")(layers.Dense(5, activation="tanh")(x)))
    return keras.Model(x, layers.Dense(1)(bln(M, "MPPM", "bln2")(y)))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), layers.Dense(5), bln(M, "PPMM"), layers.Dense(1)])


def nested() -> keras.Model:
    x = keras.Input((6,))
    shared = bln(M, "PPMM", "shared")
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6), bln(M, "MMPP", "inner")])
    return keras.Model(x, layers.Dense(1)(shared(inner(shared(x)))))


def wrapped() -> keras.Model:
    layered = [layers.Reshape((3, 2)), layers.TimeDistributed(bln(M, "PPMM", "wrapped")), layers.Flatten()]
    return keras.Sequential([keras.Input((6,)), *layered, layers.Lambda(lambda x: 2 * x), layers.Dense(1)])


def subclassed() -> keras.Model:
    model = Subclassed(M, name="subclassed")
    model(X[:M])
    return model


MODELS = [functional, sequential, nested, wrapped, subclassed]


def compiled(make, **arguments) -> keras.Model:
    keras.utils.set_random_seed(3)
    model = make()
    model.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": "mse", "run_eagerly": True, **arguments})
    return model


def train(model: keras.Model) -> None:
    model.fit(X, Y, batch_size=M, shuffle=False, verbose=0, callbacks=[PopulationStatistics()])


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def numbers(variables) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


@pytest.mark.parametrize("make", MODELS)
def test_the_copy_has_the_same_weights_another_policy_and_trains_on_with_the_same_numbers(make) -> None:
    in_graph = {"run_eagerly": False, "jit_compile": False} if make is functional else {}
    model = compiled(make, **in_graph)
    train(model)
    before, policies = numbers(model.variables), [layer.policy for layer in bln_layers(model)]
    copied = with_statistics(model, "MMMM")
    assert {layer.policy.code for layer in bln_layers(copied)} == {"MMMM"}
    assert_same(numbers(copied.variables), before)
    assert_same(numbers(copied.optimizer.variables), numbers(model.optimizer.variables))
    train(copied)
    assert_same(numbers(model.variables), before)
    assert [layer.policy for layer in bln_layers(model)] == policies
    train(model)
    assert_same(numbers(copied.variables), numbers(model.variables))
    assert_same(numbers(copied.optimizer.variables), numbers(model.optimizer.variables))


def test_all_sixteen_policies_answer_as_the_layers_own_flags_would() -> None:
    model = with_random_statistics(functional())
    for policy in ALL_POLICIES:
        copied = with_statistics(model, policy)
        for layer in bln_layers(model):
            layer.policy = policy
        assert_same(numbers([copied(X[:M])]), numbers([model(X[:M])]))


@pytest.mark.parametrize(
    ("policy", "codes"),
    [
        ("PMPM", ["PMPM", "PMPM"]),
        ("population", ["PPPP", "PPPP"]),
        ("feature_var=population", ["PPMP", "MPPP"]),
        (StatisticsPolicy(), ["PPMM", "PPMM"]),
    ],
)
def test_what_a_policy_does_not_name_stays_as_each_layer_has_it(policy, codes: list[str]) -> None:
    assert [layer.policy.code for layer in bln_layers(with_statistics(functional(), policy))] == codes


def test_an_uncompiled_model_gives_an_uncompiled_copy() -> None:
    assert not with_statistics(functional(), "MMMM").compiled


def test_a_compiled_model_that_was_never_trained_gives_a_copy_that_trains() -> None:
    model = compiled(functional)
    copied = with_statistics(model, "MMMM")
    train(copied)
    train(model)
    assert_same(numbers(copied.variables), numbers(model.variables))


def test_a_model_with_several_inputs_and_outputs_keeps_its_losses_and_metrics_apart() -> None:
    model = two_inputs(m=M)
    losses = {"score": keras.losses.Huber(), "classes": lambda truth, y: keras.ops.mean(keras.ops.abs(truth - y))}
    accuracy = keras.metrics.MeanAbsoluteError(name="error")
    model.compile("adam", losses, {"score": 2.0, "classes": 1.0}, {"score": [accuracy]}, run_eagerly=True)
    x = {"numbers": X[:M, :3], "tokens": np.arange(M * 5).reshape(M, 5) % 20}
    y = {"score": Y[:M], "classes": X[:M, :3]}
    model.train_on_batch(x, y)
    copied = with_statistics(model, "MMMM")
    assert copied.run_eagerly
    before = accuracy.count.numpy()
    one = copied.train_on_batch(x, y, return_dict=True)
    assert accuracy.count.numpy() == before
    model.reset_metrics()
    assert one == model.train_on_batch(x, y, return_dict=True)


def test_frozen_layers_stay_frozen_and_the_optimizer_keeps_its_state() -> None:
    model = compiled(functional)
    train(model)
    model.get_layer("bln1").trainable = False
    copied = with_statistics(model, "PPMM")
    assert [layer.trainable for layer in bln_layers(copied)] == [False, True]
    assert_same(numbers(copied.optimizer.variables), numbers(model.optimizer.variables))


def test_mixed_float16_keeps_its_loss_scale() -> None:
    keras.utils.set_random_seed(0)
    dtype = keras.dtype_policies.DTypePolicy("mixed_float16")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        model = compiled(sequential, optimizer="sgd")
        train(model)
        copied = with_statistics(model, "MMMM")
    finally:
        keras.config.set_dtype_policy(before)
    assert isinstance(copied.optimizer, keras.optimizers.LossScaleOptimizer)
    assert_same(numbers(copied.optimizer.variables), numbers(model.optimizer.variables))
    train(copied)


@pytest.mark.parametrize("model", ["model.keras", layers.Dense(1)], ids=["a path", "a layer"])
def test_what_is_no_model_is_refused(model) -> None:
    with pytest.raises(UsageError, match="Expected a Keras model. Received: .*keras.saving.load_model"):
        with_statistics(model, "PPMM")


def test_a_model_without_bln_is_refused() -> None:
    with pytest.raises(UsageError, match="Expected a model with Batch Layer Normalization layers. Received: 'plain'"):
        with_statistics(keras.Sequential([keras.Input((3,)), layers.Dense(1)], name="plain"), "PPMM")


def test_an_unbuilt_model_is_refused() -> None:
    with pytest.raises(UsageError, match="Expected a built model.*Received: 'bare', which is not built. Call it once"):
        with_statistics(keras.Sequential([bln(M, "PPMM")], name="bare"), "PPMM")


@pytest.mark.parametrize("policy", ["PPM", "TTFF", "batch_mean=live"])
def test_a_policy_that_cannot_be_read_is_refused(policy: str) -> None:
    with pytest.raises(UsageError, match=r"Expected .*Received: "):
        with_statistics(functional(), policy)


class Unsaveable(keras.Model):
    """Its constructor takes what no config can hold."""

    def __init__(self, normalization, **kwargs) -> None:
        super().__init__(**kwargs)
        self.normalization = normalization()

    def call(self, inputs):
        return self.normalization(inputs)


def test_a_subclass_that_keras_cannot_save_is_refused() -> None:
    model = Unsaveable(lambda: bln(M, "PPMM"), name="mine")
    model(X[:M])
    with pytest.raises(UnsupportedModelError, match="Expected a model that Keras can save.* Received: 'mine', where"):
        with_statistics(model, "MMMM")


class OwnCompile(Subclassed):
    """Its compile takes an argument of its own, and Keras is not told how to repeat it."""

    def compile(self, weight: float = 1.0, **kwargs) -> None:
        super().compile(**kwargs)
        self.weight = weight


class RepeatedCompile(OwnCompile):
    """The same, and Keras is told."""

    def get_compile_config(self):
        return {"weight": self.weight, "learning_rate": float(self.optimizer.learning_rate)}

    def compile_from_config(self, config):
        self.compile(config["weight"], optimizer=keras.optimizers.Adam(config["learning_rate"]), loss="mse")
        self.optimizer.build(self.trainable_variables)


def test_a_compile_of_its_own_is_refused_unless_it_can_be_repeated() -> None:
    model = OwnCompile(M)
    model(X[:M])
    assert not with_statistics(model, "MMMM").compiled
    model.compile(0.5, optimizer="sgd", loss="mse")
    with pytest.raises(UnsupportedModelError, match=r"Expected OwnCompile.*its own get_compile_config\(\)"):
        with_statistics(model, "MMMM")


def test_a_compile_that_can_be_repeated_is_and_the_state_comes_along() -> None:
    model = RepeatedCompile(M)
    model(X[:M])
    model.compile(0.5, optimizer=keras.optimizers.Adam(0.02), loss="mse", run_eagerly=True)
    train(model)
    copied = with_statistics(model, "MMMM")
    assert copied.weight == 0.5
    assert_same(numbers(copied.optimizer.variables), numbers(model.optimizer.variables))
