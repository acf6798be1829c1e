"""What is not exported: each refusal says what was expected, what was received and what to do, and leaves nothing."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from support.kinds import TIME, WIDTH, M, Several, called
from support.models import bln, tiny, with_random_statistics

from bln_serve.errors import (
    ArtifactError,
    BlnServeError,
    ModelLoadError,
    ParityError,
    UnsupportedModelError,
    UnusableStatisticsError,
    UsageError,
)
from bln_serve.export import export, request_rows
from bln_serve.statistics import RowCoupling


def refused(model: Any, folder: Path, error: type[BlnServeError], words: str, **options: Any) -> None:
    """Export and expect a refusal of this kind; nothing is left in the folder."""
    with pytest.raises(error, match=f"(?s){words}") as caught:
        export(model, folder, **options)
    assert error is ParityError or {"Expected", "Received"} <= set(str(caught.value).replace(":", "").split())
    assert not folder.exists() or list(folder.iterdir()) == []


def model_of(compute: Callable[[Any], Any], shape: tuple[int | None, ...] = (TIME, WIDTH), **options: Any) -> Any:
    keras.utils.set_random_seed(3)
    x = keras.Input(shape, name="x", **options)
    return with_random_statistics(keras.Model(x, compute(x), name="refused"))


def normalized(x: Any, policy: str = "PPMM", m: int = M) -> Any:
    return bln(m, policy, "norm")(x)


# Statistics


def with_statistic(name: str, value: float) -> Any:
    model = tiny("PPPP", M, "tiny")
    variable = model.get_layer("bln1").population[name]
    values = variable.numpy()
    values.flat[-1] = value
    variable.assign(values)
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("statistic", ["batch_mean", "batch_var", "feature_mean", "feature_var"])
def test_a_stored_statistic_that_is_no_number(statistic: str, value: float, tmp_path: Path) -> None:
    words = f"bln1: the stored {statistic.replace('var', 'variance').replace('_', ' ')} holds NaN or infinity"
    way_out = "take the statistics from the rows at hand: --statistics mini-batch"
    refused(with_statistic(statistic, value), tmp_path, UnusableStatisticsError, f"{words}.*{way_out}")


def test_a_stored_variance_at_m_1(tmp_path: Path) -> None:
    model = model_of(lambda x: normalized(x, "PPMM", 1))
    words = "norm: a batch variance cannot be estimated at m = 1.*--statistics mini-batch"
    refused(model, tmp_path, UnusableStatisticsError, words)


# Layers and tensors that cannot be followed


class Holder(layers.Layer):
    """Holds a layer and leaves it out at inference, or never builds it."""

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.aside = bln(M, policy, "aside")

    def build(self, shape: Any) -> None:
        self.aside.build(shape)

    def call(self, x: Any) -> Any:
        return x


class Unbuilt(Holder):
    def build(self, shape: Any) -> None:
        pass


@pytest.mark.parametrize("policy", ["MMMM", "PPPP"])
def test_a_layer_that_is_not_called_at_inference_couples_nothing_and_is_said(policy: str, tmp_path: Path) -> None:
    manifest = export(model_of(lambda x: Holder(policy)(normalized(x))), tmp_path).manifest
    assert manifest.row_coupling is RowCoupling.INDEPENDENT
    assert [layer.name for layer in manifest.layers] == ["norm"]
    assert manifest.notes == ("aside is not called at inference, and is not exported",)


def test_a_layer_without_weights(tmp_path: Path) -> None:
    x = keras.Input((TIME, WIDTH), name="x")
    refused(keras.Model(x, Unbuilt("MMMM")(x)), tmp_path, UnsupportedModelError, "'aside', which has no weights yet.")


def test_a_layer_that_keras_does_not_know_of(tmp_path: Path) -> None:
    hidden = bln(M, "MMMM", "hidden")
    hidden.build((None, TIME, WIDTH))
    model = model_of(lambda x: layers.Lambda(lambda x: hidden(x))(x))  # noqa: PLW0108 - a function that holds the layer
    # Keras puts its own words around what is raised inside a layer, and paints them.
    with pytest.raises(UnsupportedModelError, match="'hidden', which Keras does not know of. Make it one"):
        export(model, tmp_path)


class Raises(layers.Layer):
    def call(self, x: Any) -> Any:
        raise TypeError("as a user's layer may")

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def test_a_layer_that_raises_whatever_it_likes(tmp_path: Path) -> None:
    refused(model_of(Raises()), tmp_path, UnsupportedModelError, "any number of rows.*as a user's layer may")


def test_an_input_among_the_outputs(tmp_path: Path) -> None:
    x = keras.Input((4,), name="x")
    model = keras.Model(x, [x, layers.Dense(2)(x)])
    refused(model, tmp_path, UnsupportedModelError, r"1 of its inputs among them.*keras.layers.Identity\(\)\(x\)")


def test_outputs_inside_outputs(tmp_path: Path) -> None:
    x = keras.Input((4,), name="x")
    outputs = {"a": [layers.Dense(2)(x), layers.Dense(3)(x)], "b": layers.Dense(1)(x)}
    words = "one tensor, a list or a dict of tensors.*3 tensors.*Give each a name of its own"
    refused(keras.Model(x, outputs), tmp_path, UnsupportedModelError, words)


def test_an_output_of_nothing(tmp_path: Path) -> None:
    refused(model_of(lambda x: x[:, :0]), tmp_path, UnsupportedModelError, "known dimensions behind them")


def test_weights_that_no_onnx_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx.checker.MAXIMUM_PROTOBUF", 1000)
    model = model_of(layers.Embedding(100, 4, name="words"), (3,), dtype="int32")
    words = "less than 2 GB.*of them in 'words/embeddings'. Make the table smaller"
    refused(model, tmp_path, UnsupportedModelError, words)


def test_what_the_manifests_own_reader_refuses_takes_no_version_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(tiny("PPMM", M, "tiny"), tmp_path)
    before = (artifact.path / "manifest.json").read_bytes()
    whole = request_rows.RequestRows.facts
    monkeypatch.setattr(request_rows.RequestRows, "facts", lambda self: whole(self) | {"min_mini_batch_rows": 7})
    with pytest.raises(ArtifactError, match="Expected min_mini_batch_rows"):
        export(tiny("PPMM", M, "tiny"), tmp_path, version=1, force=True)
    assert (artifact.path / "manifest.json").read_bytes() == before


# Shapes


@pytest.mark.parametrize("shape", [(None, WIDTH), (TIME, None)])
def test_an_input_with_a_free_dimension(shape: tuple[int | None, ...], tmp_path: Path) -> None:
    words = r"input 'x' to have rows and known dimensions .* shape \(None, .*None.*\)\. Give the model an Input with a"
    refused(model_of(layers.Activation("tanh"), shape), tmp_path, UnsupportedModelError, words)


@pytest.mark.parametrize("dtype", ["string", "bfloat16", "complex64"])
def test_a_dtype_that_not_everybody_knows(dtype: str, tmp_path: Path) -> None:
    model = model_of(layers.Identity(), dtype=dtype)
    refused(model, tmp_path, UnsupportedModelError, f"'x' to be one of bool, float16, .* Received: {dtype}")


@pytest.mark.parametrize(
    ("compute", "received"),
    [
        (lambda y: ops.mean(y, axis=0, keepdims=True), "1 for 7 rows"),
        (lambda y: ops.mean(y, axis=0), f"{TIME} for 7 rows"),
        (lambda y: ops.reshape(y, (-1, WIDTH)), f"{TIME * 7} for 7 rows"),
        (lambda y: ops.repeat(y, 2, axis=0), "14 for 7 rows"),
        (lambda y: [y, layers.Identity()(ops.zeros((2, 3)) * ops.mean(y))], "2 for 7 rows"),
    ],
)
def test_an_output_whose_rows_are_not_the_inputs_rows(compute: Any, received: str, tmp_path: Path) -> None:
    words = f"output .* to have a row for each row of the inputs. Received: {received}. Take what is not a row's own"
    refused(model_of(lambda x: compute(normalized(x))), tmp_path, UnsupportedModelError, words, mini_batch_rows=M)


@pytest.mark.parametrize(
    ("compute", "shape"),
    [(lambda y: ops.transpose(y, (1, 0, 2)), r"\(3, None, 6\)"), (ops.mean, r"\(\)")],
)
def test_an_output_without_rows_on_its_first_axis(compute: Any, shape: str, tmp_path: Path) -> None:
    words = f"output .* to have rows and known dimensions behind them. Received: shape {shape}"
    refused(model_of(lambda x: compute(normalized(x))), tmp_path, UnsupportedModelError, words)


class Chosen(layers.Layer):
    """Keeps the rows whose first number is positive: nobody knows how many before they are there."""

    def call(self, x):
        import tensorflow as tf

        return tf.boolean_mask(x, x[:, 0, 0] > 0)

    def compute_output_spec(self, x):
        return keras.KerasTensor((None, *x.shape[1:]))


def test_an_output_whose_rows_nobody_knows_beforehand(tmp_path: Path) -> None:
    words = r"to have a row for each row of the inputs. Received: \d+ for \d+ rows"
    refused(model_of(lambda x: Chosen()(normalized(x))), tmp_path, UnsupportedModelError, words, mini_batch_rows=M)


# Where a layer stands


class Padded(layers.Layer):
    """BLN over the rows and one more, which it takes off again."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = bln(M, "PPMM", "norm")

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x):
        return self.norm(ops.pad(x, [[0, 1], [0, 0], [0, 0]]))[:-1]


def test_a_layer_whose_rows_are_no_multiple_of_the_requests(tmp_path: Path) -> None:
    words = "axis 0 of layer 'norm' .* the same whole number of entries for each. Received: 8 for 7 rows. Move"
    refused(model_of(Padded()), tmp_path, UnsupportedModelError, words)


def test_fewer_slots_than_a_row_makes_entries(tmp_path: Path) -> None:
    def fold(x: Any) -> Any:
        return ops.reshape(normalized(ops.reshape(x, (-1, WIDTH)), "PPPP", 2), (-1, TIME, WIDTH))

    words = "layer 'norm' to have slots for one row of a request. Received: 2 slots, and 3 entries for each row. Take a"
    refused(model_of(fold), tmp_path, UnsupportedModelError, words, mini_batch_rows=1)


class Cell(layers.Layer):
    """A recurrent cell with BLN inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.state_size = bln(M, "PPMM", "in_cell"), WIDTH

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, states, training=None):
        y = self.norm(x + states[0])
        return y, [y]


def test_a_layer_in_a_loop(tmp_path: Path) -> None:
    words = r"without 'in_cell'. A layer inside a loop.* cannot be exported: unroll the loop \(unroll=True\)"
    refused(model_of(layers.RNN(Cell())), tmp_path, UnsupportedModelError, words)
    assert export(model_of(layers.RNN(Cell(), unroll=True)), tmp_path).manifest.statistics == "PPMM"


class Forgetful(keras.Model):
    """Calls a layer and does not use what it answers."""

    def __init__(self):
        super().__init__(name="forgetful")
        self.used, self.unused = bln(M, "PPMM", "used"), bln(M, "PPMM", "unused")

    def call(self, x):
        self.unused(x)
        return self.used(x)


def test_a_layer_whose_answer_is_not_used(tmp_path: Path) -> None:
    model = with_random_statistics(called(Forgetful(), (WIDTH,)))
    refused(model, tmp_path, UnsupportedModelError, "Received: 1, without 'unused'. .* take the layer out")


def test_a_stateful_layer(tmp_path: Path) -> None:
    x = keras.Input((TIME, WIDTH), batch_size=M, name="x")
    model = keras.Model(x, layers.LSTM(3, stateful=True)(x), name="stateful")
    refused(model, tmp_path, UnsupportedModelError, "takes any number of rows.* a stateful recurrent layer")


# What the model computes


def test_an_operator_that_onnx_does_not_have(tmp_path: Path) -> None:
    spectrogram = layers.MelSpectrogram(sequence_length=8, num_mel_bins=4, fft_length=16, sampling_rate=100)
    words = r"standard ONNX operators only. Received: .*RFFT \(mel.*\).* do that part before or behind the model"
    refused(model_of(spectrogram, (64,)), tmp_path, UnsupportedModelError, words)


def test_a_table_of_words(tmp_path: Path) -> None:
    model = model_of(layers.IntegerLookup(vocabulary=[1, 2, 3]), dtype="int64")
    refused(
        model,
        tmp_path,
        UnsupportedModelError,
        "standard ONNX operators only. Received: LookupTableFindV2 .*do that part",
    )


class Noisy(layers.Layer):
    """Draws at inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seed)


def test_random_answers(tmp_path: Path) -> None:
    words = "standard ONNX operators only. Received: StatelessRandomNormalV2 .*noisy"
    refused(model_of(lambda x: Noisy()(normalized(x))), tmp_path, UnsupportedModelError, words)


class Offset(layers.Layer):
    """Adds a number that it does not hold."""

    number = keras.Variable(1.0)

    def call(self, x):
        return x + Offset.number


def test_a_variable_that_no_layer_holds(tmp_path: Path) -> None:
    words = "that TensorFlow can save. .* A layer must hold each variable, table and seed generator"
    refused(model_of(lambda x: Offset()(normalized(x))), tmp_path, UnsupportedModelError, words)


def test_half_precision(tmp_path: Path) -> None:
    half = [layers.Dense(size, activation="tanh", dtype="mixed_float16") for size in (5, 4, 2)]
    model = model_of(lambda x: half[2](half[1](half[0](normalized(x)))))
    refused(model, tmp_path, ParityError, "FAIL ONNX = Keras.*half precision needs a float32 policy, or --tolerance")


def test_answers_that_are_no_numbers(tmp_path: Path) -> None:
    model = model_of(lambda x: ops.sqrt(normalized(x)))
    refused(model, tmp_path, UnsupportedModelError, "NaN or infinity in output 'sqrt'.* by clipping or rescaling")


# Subclassed models


class OfTwo(keras.Model):
    """Takes two arguments."""

    def call(self, x, z):
        return x + z


class Branching(keras.Model):
    """Asks its input's values."""

    def call(self, x):
        return x if float(ops.sum(x)) > 0 else -x


def test_subclassed_models_that_cannot_be_wrapped(tmp_path: Path) -> None:
    two = OfTwo(name="two")
    two(ops.ones((2, WIDTH)), ops.ones((2, WIDTH)))
    wrap = r"Wrap it: keras.Model\(inputs, model\(inputs\)\)"
    refused(Several("PPMM"), tmp_path, UnsupportedModelError, f"built model .* Received: Several without. {wrap}")
    refused(two, tmp_path, UnsupportedModelError, f"Received: OfTwo that was built with .*{wrap}")
    refused(called(Branching(), (WIDTH,)), tmp_path, UnsupportedModelError, f"Received: Branching that .*{wrap}")


# Options


@pytest.mark.parametrize("opset", [0, 17, 99])
def test_an_opset_that_the_converter_does_not_know(opset: int, tmp_path: Path) -> None:
    words = f"an opset from 18 to .* Received: {opset}"
    refused(tiny("PPMM", M, "tiny"), tmp_path, UsageError, words, opset=opset)


@pytest.mark.parametrize(
    ("policy", "rows", "words"),
    [
        ("PPPP", 0, "--mini-batch-rows 1 or more. Received: 0"),
        ("PPPP", 5, r"--mini-batch-rows from 1 to 4 \(.* stored by slot\). Received: 5"),
        ("MMPP", 1, r"--mini-batch-rows from 2 to 4 \(.* are live\). Received: 1"),
    ],
)
def test_mini_batch_rows_that_the_layers_do_not_allow(policy: str, rows: int, words: str, tmp_path: Path) -> None:
    refused(tiny(policy, M, "tiny"), tmp_path, UsageError, words, mini_batch_rows=rows)


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        (lambda x: bln(4, "MMMM", "b")(bln(5, "MMMM", "a")(x)), r"different batch sizes \(\[4, 5\]\)"),
        (lambda x: x - ops.mean(x, axis=0, keepdims=True), "ReduceMean .* reduces the row axis.*no layer has an m"),
    ],
)
def test_coupled_rows_without_a_number_that_is_every_layers(compute: Any, why: str, tmp_path: Path) -> None:
    refused(model_of(compute), tmp_path, UsageError, f"--mini-batch-rows, the rows that a mini-batch has .*{why}")


# Files


class Mine(layers.Layer):
    """A layer that only the program that saved it knows."""

    def call(self, x):
        return x


def saved(model: Any, folder: Path) -> Path:
    model.save(folder / "model.keras")
    return folder / "model.keras"


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (Mine(), r"\.Mine\. .* register it with keras.saving.register_keras_serializable"),
        (layers.Lambda(lambda x: 2 * x), r"keras\.layers\.Lambda\. No code that a file names is imported or run"),
    ],
)
def test_a_file_that_names_code(compute: Any, named: str, tmp_path: Path) -> None:
    path = saved(model_of(compute), tmp_path)
    refused(path, tmp_path / "models", ModelLoadError, f"Received: model.keras, which names .*{named}")


@pytest.mark.parametrize("change", [("os", "system"), ("keras.src.utils.file_utils", "get_file")])
def test_a_file_that_calls_programs(change: tuple[str, str], tmp_path: Path) -> None:
    path = saved(model_of(layers.Dense(2, activation="tanh", name="victim")), tmp_path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(held["config.json"])
    victim = next(item for item in config["config"]["layers"] if item["name"] == "victim")
    module, name = change
    victim["config"]["activation"] = {
        "module": module, "class_name": "function", "config": name, "registered_name": name
    }  # fmt: skip
    held["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in held.items():
            archive.writestr(entry, content)
    refused(path, tmp_path / "models", ModelLoadError, rf"which names {module}\.{name}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_off(share: float, tmp_path: Path) -> None:
    path = saved(tiny("PPMM", M, "tiny"), tmp_path)
    os.truncate(path, int(share * path.stat().st_size))
    words = "model.keras to be a .keras file: a zip archive with config.json"
    refused(path, tmp_path / "models", ModelLoadError, words)


def test_a_file_with_damaged_weights(tmp_path: Path) -> None:
    path = saved(tiny("PPMM", M, "tiny"), tmp_path)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    held["model.weights.h5"] = held["model.weights.h5"][: len(held["model.weights.h5"]) // 2]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in held.items():
            archive.writestr(entry, content)
    with pytest.raises(ModelLoadError, match="Keras cannot load model.keras"):
        export(path, tmp_path / "models")
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing.keras", "which is not there or is no file"), ("model.pkl", "a .keras or .h5 file. Received: model.pkl")],
)
def test_what_is_no_model_file(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(b"")
    refused(tmp_path / name, tmp_path / "models", ModelLoadError, words)


# That all of this can fail


def test_a_model_with_nothing_wrong_is_not_refused(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(tiny("PPMM", M, "tiny"), tmp_path, BlnServeError, "")
