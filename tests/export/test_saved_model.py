"""The SavedModel: its signatures, several mini-batches in one call, and names that cannot be had."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support import models

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import saved_model
from bln_serve.signature import Arrays


def written(model: keras.Model, folder: Path) -> saved_model.Serve:
    saved_model.write(saved_model.describe(model), folder)
    return saved_model.read(folder)


def parts(inputs: Arrays, count: int) -> list[Arrays]:
    split = {name: np.split(array, count) for name, array in inputs.items()}
    return [{name: arrays[index] for name, arrays in split.items()} for index in range(count)]


@pytest.mark.parametrize(("policy", "size", "count"), [("MMMM", 5, 3), ("MMMM", 2, 4), ("PPPP", 4, 2), ("PPMM", 1, 6)])
def test_each_mini_batch_gets_bit_for_bit_what_it_gets_alone(
    tmp_path: Path, policy: str, size: int, count: int
) -> None:
    serve = written(models.tiny(policy, 5, "tiny"), tmp_path)
    inputs = {"x": np.random.default_rng(count).normal(size=(size * count, 6, 4)).astype(np.float32)}
    alone = np.concatenate([serve(part, 1)["score"] for part in parts(inputs, count)])
    np.testing.assert_array_equal(serve(inputs, count)["score"], alone)


def test_taken_as_one_mini_batch_they_would_answer_otherwise(tmp_path: Path) -> None:
    serve = written(models.tiny("MMMM", 5, "tiny"), tmp_path)
    inputs = {"x": np.random.default_rng(0).normal(size=(10, 6, 4)).astype(np.float32)}
    together, merged = serve(inputs, 2)["score"], serve(inputs, 1)["score"]
    assert np.abs(together - merged).max() > 1e-3 * np.abs(together).max()


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    serve = written(models.two_inputs("MMMM"), tmp_path)
    generator = np.random.default_rng(0)
    inputs = {
        "numbers": generator.normal(size=(10, 3)).astype(np.float32),
        "tokens": generator.integers(0, 20, (10, 5)).astype(np.int32),
    }
    alone = [serve(part, 1) for part in parts(inputs, 2)]
    together = serve(inputs, 2)
    assert set(together) == {"score", "classes"}
    for name, answer in together.items():
        np.testing.assert_array_equal(answer, np.concatenate([part[name] for part in alone]))


@pytest.mark.parametrize("count", [0, 3, -2])
def test_a_number_that_does_not_divide_the_rows_gets_no_answer(tmp_path: Path, count: int) -> None:
    serve = written(models.tiny("MMMM", 5, "tiny"), tmp_path)
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve({"x": np.ones((10, 6, 4), np.float32)}, count)


def test_more_rows_than_slots_get_no_answer_in_any_mini_batch(tmp_path: Path) -> None:
    serve = written(models.tiny("PPPP", 4, "tiny"), tmp_path)
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve({"x": np.ones((10, 6, 4), np.float32)}, 2)


def test_the_folder_needs_nothing_of_keras_or_of_this_package(tmp_path: Path) -> None:
    model = models.tiny("PPMM", 5, "tiny")
    saved_model.write(saved_model.describe(model), tmp_path)
    x = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    before = model.predict(x, verbose=0)
    for weight in model.weights:  # what was saved has values of its own
        weight.assign(np.zeros(weight.shape))
    loaded = tf.saved_model.load(str(tmp_path))
    assert set(loaded.signatures) == {"serve", "serving_default", "serve_mini_batches"}
    # The same kernels on the same numbers; the order of additions is TensorFlow's.
    np.testing.assert_allclose(loaded.serve(tf.constant(x))["score"], before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", ["mini_batches", "a b", "größe", '"'])
def test_an_input_name_that_cannot_be_had_is_refused(name: str) -> None:
    x = keras.Input((3,), name=name)
    with pytest.raises(UnsupportedModelError, match="Expected an input name of letters.*Rename the model's Input"):
        saved_model.describe(keras.Model(x, layers.Dense(2)(x)))


class Scores(keras.Model):
    def __init__(self) -> None:
        super().__init__(name="scores")
        self.dense = layers.Dense(3)

    def call(self, inputs: dict) -> dict:
        return {"sum": self.dense(inputs["a"]) + self.dense(inputs["b"])}


def test_a_built_subclassed_model_gets_inputs_by_the_names_it_was_called_with() -> None:
    model = Scores()
    model({"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32)})
    signature = saved_model.describe(saved_model.functional(model)).signature
    assert [(spec.name, spec.dtype, spec.shape) for spec in signature.inputs] == [
        ("a", "float32", (None, 4)),
        ("b", "float32", (None, 4)),
    ]
    assert [spec.name for spec in signature.outputs] == ["sum"]


def test_a_model_that_was_never_built_is_refused_with_the_way_out() -> None:
    message = (
        r"a built model with known inputs. Received: Scores without. Wrap it: keras.Model\(inputs, model\(inputs\)\)"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        saved_model.functional(Scores())
