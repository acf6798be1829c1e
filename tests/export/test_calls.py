"""Running a model layer by layer. The canary for Keras's own way through a graph, which is not public."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.models import bln, with_random_statistics

from bln_serve.export import calls

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 5, (4, 7))


def let_them(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Stand in for nobody."""


class Asked:
    """Stands in for nobody, and remembers who was asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self.names.append(layer.name)


def functional() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, layers.Dense(3, name="c")(bln(4, "MMMM", "b")(layers.Dense(5, name="a")(x))))


def sequential() -> keras.Model:
    named = [layers.Dense(5, name="a"), bln(4, "PPMM", "b"), layers.Dense(3, name="c")]
    return keras.Sequential([keras.Input((6,)), *named])


def nested() -> keras.Model:
    x = keras.Input((6,))
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="inner_1"), bln(4, "PPPP", "inner_2")])
    middle = keras.Model(y := keras.Input((5,)), layers.Dense(3, name="middle_1")(inner(y)))
    return keras.Model(x, layers.Dense(2, name="outer_2")(middle(layers.Dense(5, name="outer_1")(x))))


def shared() -> keras.Model:
    x, twice = keras.Input((6,)), layers.Dense(6, name="twice")
    return keras.Model(x, layers.Concatenate(name="joined")([twice(twice(x)), twice(x)]))


def a_nested_model_used_twice() -> keras.Model:
    x = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="inside")])
    return keras.Model(x, inner(inner(x)))


def inference_differs_from_training() -> keras.Model:
    x = keras.Input((6,))
    y = layers.BatchNormalization(name="a")(layers.Dropout(0.5, name="d")(x))
    model = keras.Model(x, layers.GaussianNoise(1.0, name="n")(y))
    model.get_layer("a").moving_mean.assign(np.arange(6.0))
    return model


def training_was_asked_for_at_build_time() -> keras.Model:
    # Keras lets the model's own argument win: this is inference, under `training=False`.
    x = keras.Input((6,))
    model = keras.Model(x, layers.BatchNormalization(name="a")(x, training=True))
    model.get_layer("a").moving_mean.assign(np.arange(6.0))
    return model


def inference_was_asked_for_at_build_time() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, layers.Dropout(0.5, name="a")(x, training=False))


def operations() -> keras.Model:
    x = keras.Input((6,))
    y = layers.Dense(6, name="a")(x)
    return keras.Model(x, keras.ops.concatenate([x + y, keras.ops.exp(-x) * 2, y[:, ::-1]], axis=-1))


def merged() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, layers.Add(name="b")([x, layers.Dense(6, name="a")(x)]))


def by_keyword() -> keras.Model:
    x = keras.Input((6,))
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(3, name="hidden")], name="inner")
    return keras.Model(x, layers.Dense(2, name="a")(inputs=inner(inputs=x)))


def output_is_input() -> keras.Model:
    x = keras.Input((6,))
    return keras.Model(x, [x, layers.Dense(2, name="a")(x)])


def wrapped() -> keras.Model:
    # What a wrapper calls itself is out of reach, and computes as it is.
    x = keras.Input((6,))
    y = layers.TimeDistributed(layers.Dense(2, name="hidden"), name="w")(layers.Reshape((3, 2), name="r")(x))
    return keras.Model(x, y)


class OwnCall(keras.Model):
    def call(self, inputs: Any, training: Any = None) -> Any:
        return 2 * super().call(inputs, training=training)


def subclass_with_its_own_call() -> keras.Model:
    x = keras.Input((6,))
    return OwnCall(x, layers.Dense(3, name="hidden")(x))


def sequential_subclass_with_its_own_call() -> keras.Model:
    class Doubled(keras.Sequential):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return 2 * super().call(inputs, training=training, mask=mask)

    x = keras.Input((6,))
    inner = Doubled([keras.Input((6,)), layers.Dense(3, name="hidden")], name="own")
    return keras.Model(x, layers.Dense(2, name="a")(inner(x)))


def nested_subclass_with_its_own_call() -> keras.Model:
    x = keras.Input((6,))
    y = keras.Input((6,))
    inner = OwnCall(y, layers.Dropout(0.5, name="hidden")(layers.Dense(3, name="deeper")(y)), name="own")
    return keras.Model(x, layers.Dense(2, name="a")(inner(x)))


def subclass_without() -> keras.Model:
    class Plain(keras.Model):
        pass

    x = keras.Input((6,))
    return Plain(x, layers.Dense(3, name="a")(x))


MODELS: dict[Callable[[], keras.Model], list[str]] = {
    functional: ["a", "b", "c"],
    sequential: ["a", "b", "c"],
    nested: ["outer_1", "inner_1", "inner_2", "middle_1", "outer_2"],
    shared: ["twice", "twice", "twice", "joined"],
    a_nested_model_used_twice: ["inside", "inside"],
    inference_differs_from_training: ["d", "a", "n"],
    training_was_asked_for_at_build_time: ["a"],
    inference_was_asked_for_at_build_time: ["a"],
    operations: ["a"],
    merged: ["a", "b"],
    by_keyword: ["inner", "a"],
    output_is_input: ["a"],
    wrapped: ["r", "w"],
    subclass_with_its_own_call: [],
    sequential_subclass_with_its_own_call: ["own", "a"],
    nested_subclass_with_its_own_call: ["own", "a"],
    subclass_without: ["a"],
}


def same(actual: Any, expected: Any) -> None:
    keras.tree.assert_same_structure(actual, expected)
    for one, other in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def built(build: Callable[[], keras.Model]) -> keras.Model:
    keras.utils.set_random_seed(3)
    return with_random_statistics(build())


@pytest.mark.parametrize("build", MODELS)
def test_run_answers_as_the_model_does(build: Callable[[], keras.Model]) -> None:
    model = built(build)
    same(calls.run(model, tf.constant(X), let_them), model(X, training=False))


@pytest.mark.parametrize(("build", "names"), MODELS.items())
def test_the_stand_in_is_asked_once_a_call(build: Callable[[], keras.Model], names: list[str]) -> None:
    asked = Asked()
    calls.run(built(build), tf.constant(X), asked)
    assert sorted(asked.names) == sorted(names)


def test_training_that_was_asked_for_at_build_time_is_overridden_by_keras() -> None:
    model = built(training_was_asked_for_at_build_time)
    in_inference = (X - np.arange(6)) / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(model(X, training=False), in_inference, atol=1e-5)


def by_name() -> keras.Model:
    x = {name: keras.Input((6,), name=name) for name in ("one", "two")}
    sums = {"sum": x["one"] + x["two"], "nested": [layers.Dense(2)(x["one"]), (x["two"],)]}
    return keras.Model(x, sums)


def listed() -> keras.Model:
    one, two = keras.Input((6,)), keras.Input((6,))
    return keras.Model([one, two], [layers.Subtract()([one, two]), one])


@pytest.mark.parametrize(
    ("build", "inputs"), [(by_name, {"one": X, "two": X + 1}), (listed, [X, X + 1])], ids=["by name", "listed"]
)
def test_structures_of_inputs_and_outputs(build: Callable[[], keras.Model], inputs: Any) -> None:
    model = built(build)
    tensors = keras.tree.map_structure(tf.constant, inputs)
    same(calls.run(model, tensors, let_them), model(inputs, training=False))


def test_a_nested_model_of_several_inputs() -> None:
    inner, x = built(by_name), keras.Input((6,))
    model = keras.Model(x, inner({"one": x, "two": layers.Dense(6)(x)}))
    same(calls.run(model, tf.constant(X), let_them), model(X, training=False))


def embedded() -> keras.Model:
    x = keras.Input((7,), dtype="int32")
    y = layers.Embedding(5, 3, mask_zero=True)(x)
    return keras.Model(x, layers.GlobalAveragePooling1D()(layers.LSTM(4, return_sequences=True)(y)))


def masking() -> keras.Model:
    x = keras.Input((7,))
    return keras.Model(x, layers.LSTM(3)(layers.Masking(0.0)(layers.Reshape((7, 1))(x))))


def masked_through_a_nested_model() -> keras.Model:
    x = keras.Input((7,), dtype="int32")
    inner = keras.Model(y := keras.Input((7, 3)), layers.LSTM(4)(y))
    return keras.Model(x, inner(layers.Embedding(5, 3, mask_zero=True)(x)))


def a_nested_model_that_is_given_a_mask() -> keras.Model:
    x = keras.Input((7,), dtype="int32")
    inner = keras.Model(y := keras.Input((7, 3)), layers.LSTM(4)(y))
    return keras.Model(x, inner(layers.Embedding(5, 3)(x), mask=keras.ops.not_equal(x, 0)))


# Keras says so of the nested models, whose outputs have no time.
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
@pytest.mark.parametrize(
    "build", [embedded, masking, masked_through_a_nested_model, a_nested_model_that_is_given_a_mask]
)
def test_masks_reach_the_layers_behind(build: Callable[[], keras.Model]) -> None:
    model = built(build)
    tokens = tf.constant(TOKENS, model.inputs[0].dtype)
    expected = model(tokens, training=False)
    same(calls.run(model, tokens, let_them), expected)
    unmasked = model(tf.ones_like(tokens), training=False)
    assert not np.array_equal(unmasked, expected)


def test_a_stand_in_may_answer_with_a_mask_of_its_own() -> None:
    model = built(embedded)

    def stand_in(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(layer, layers.Embedding):
            return None
        y = tf.gather(layer.embeddings, args[0])
        y._keras_mask = layer.compute_mask(args[0])
        return y

    same(calls.run(model, tf.constant(TOKENS), stand_in), model(TOKENS, training=False))


def test_what_the_stand_in_answers_is_what_the_next_layer_takes() -> None:
    model = built(functional)
    zeros = tf.zeros((4, 5))
    answer = calls.run(model, tf.constant(X), lambda layer, args, kwargs: zeros if layer.name == "b" else None)
    same(answer, model.get_layer("c")(zeros))


def test_the_stand_in_is_given_the_arguments_of_the_call() -> None:
    x = keras.Input((7, 3))
    state = layers.Dense(4)(layers.Flatten()(x))
    model = keras.Model(x, layers.GRU(4, name="gru")(x, initial_state=state))
    given: dict[str, Any] = {}

    def stand_in(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if layer.name == "gru":
            given.update(kwargs, sequences=args[0])

    calls.run(model, tf.zeros((4, 7, 3)), stand_in)
    assert given["sequences"].shape == (4, 7, 3)
    assert given["initial_state"].shape == (4, 4)


def test_two_threads_with_different_stand_ins_do_not_mix() -> None:
    model, both_inside, answers = built(functional), threading.Barrier(2, timeout=30), {}

    def run(value: float) -> None:
        def stand_in(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            both_inside.wait()  # at every layer, so that both are always in the midst of it
            return args[0] * 0 + value if layer.name == "c" else None

        answers[value] = calls.run(model, tf.constant(X), stand_in).numpy()

    threads = [threading.Thread(target=run, args=[value]) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value: np.unique(answer).tolist() for value, answer in answers.items()} == {1.0: [1.0], 2.0: [2.0]}


def state_of(model: keras.Model) -> Any:
    flat = model._flatten_layers()
    return [(layer.name, len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in flat]


@pytest.mark.parametrize("build", [nested, shared, inference_differs_from_training])
def test_the_model_is_as_it_was(build: Callable[[], keras.Model]) -> None:
    model = built(build)
    before, weights = state_of(model), [weight.numpy() for weight in model.weights]
    answer = model(X, training=False)
    tf.function(lambda x: calls.run(model, x, lambda layer, args, kwargs: args[0]))(tf.constant(X))
    assert state_of(model) == before
    same([weight.numpy() for weight in model.weights], weights)
    same(model(X, training=False), answer)


def test_a_stand_in_that_raises_is_heard() -> None:
    def stand_in(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        raise KeyError(layer.name)

    with pytest.raises(KeyError, match="a"):
        calls.run(built(functional), tf.constant(X), stand_in)
