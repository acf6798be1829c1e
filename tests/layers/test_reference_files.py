"""A file of the reference is data: its weights go where they belong, and what is hostile in it is refused unread."""

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from support.models import bln, with_random_statistics
from support.reference_files import (
    FULL,
    LEGACY,
    edited,
    entry,
    layer_of,
    replace,
    write_archive_as_keras_2,
    write_as_keras_2,
)

from bln_serve.export.freezing import unusable
from bln_serve.layers import bln_layers
from bln_serve.layers.reference_files import load_h5, load_keras
from bln_serve.statistics import STATISTICS


def bn1(model: Any) -> Any:
    return model.get_layer("bn1")


def usable(layer: Any) -> list[bool]:
    return [unusable(layer, name) is None for name in STATISTICS]


# What goes where.


def test_every_weight_of_the_layer_goes_where_it_belongs() -> None:
    layer = bn1(load_h5(FULL))
    with h5py.File(FULL) as file:
        stored = {name.partition(":")[0]: value[()] for name, value in file["model_weights/bn1/bn1"].items()}
    for ours, theirs in (
        ("gamma", "scale1"),
        ("beta", "shift1"),
        ("population_batch_mean", "moving_Bmean"),
        ("population_batch_var", "moving_Bvar"),
        ("population_feature_mean", "moving_Fmean"),
        ("population_feature_var", "moving_Fvar"),
    ):
        np.testing.assert_array_equal(np.asarray(getattr(layer, ours)), stored[theirs])
    assert layer.batch_size == 25
    assert layer.policy.code == "MMMM"
    assert layer.epsilon == 0.001
    assert float(layer.mean_steps) == float(layer.variance_steps) == 30
    np.testing.assert_array_equal(layer.slot_steps, np.full(25, 30.0))


def test_a_stored_epsilon_is_used(tmp_path: Path) -> None:
    path = edited(tmp_path / "a.h5", lambda file: replace(file, "model_weights/bn1/bn1/Variable:0", np.float32(0.5)))
    assert bn1(load_h5(path)).epsilon == 0.5


def test_any_number_of_rows_may_be_fed() -> None:
    assert load_h5(FULL).input_shape == (None, 32, 32, 3)


@pytest.mark.parametrize(
    ("batchcount", "trusted"), [(0, False), (1, True), (2, False), (3, True), (np.nan, False), (-3, False)]
)
def test_statistics_are_trusted_where_the_count_of_steps_says_they_were_finalised(
    batchcount: float, trusted: bool, tmp_path: Path
) -> None:
    count = np.float32(batchcount)
    path = edited(tmp_path / "a.h5", lambda file: replace(file, "model_weights/bn1/bn1/batchcount:0", count))
    model = load_h5(path)
    assert usable(bn1(model)) == [trusted] * 4
    assert usable(model.get_layer("bn2")) == [True] * 4


def test_names_that_tensorflow_made_unique_are_understood(tmp_path: Path) -> None:
    def rename(file: Any) -> None:
        group = file["model_weights/bn1/bn1"]
        group.move("Variable:0", "Variable_3:0")
        group.move("batchcount:0", "batchcount_3:0")

    assert usable(bn1(load_h5(edited(tmp_path / "a.h5", rename)))) == [True] * 4


def test_layers_numbered_in_another_session_are_taken_in_their_order(tmp_path: Path) -> None:
    def rename(file: Any) -> None:
        weights = file["model_weights"]
        weights.move("conv2d_1", "conv2d_10")
        weights.move("conv2d", "conv2d_9")

    path = edited(tmp_path / "a.h5", rename)
    original = load_h5(FULL)
    renamed = load_h5(path, load_h5(FULL))
    for name in ("conv2d", "conv2d_1"):
        for ours, theirs in zip(renamed.get_layer(name).weights, original.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def rnn() -> Any:
    """Return the paper's RNN in small, with layers whose settings Keras 2 called differently."""
    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Embedding(30, 6, name="embedding"),
        keras.layers.LSTM(5, dropout=0.2, recurrent_dropout=0.2, return_sequences=True, name="lstm"),
        bln(4, "PPMM", "bn1"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.LayerNormalization(name="row_norm"),
        keras.layers.LeakyReLU(negative_slope=0.2, name="leaky"),
        keras.layers.TimeDistributed(keras.layers.Dense(4), name="each"),
        keras.layers.GRU(3, name="gru"),
        bln(4, "PMPP", "bn2"),
        keras.layers.Dense(2, activation="softmax", name="dense"),
    ]
    model = keras.Sequential([keras.Input((7,), dtype="int32"), *layers])
    generator = np.random.default_rng(1)
    for layer in layers:
        layer.set_weights([value + generator.uniform(0, 0.2, value.shape) for value in layer.get_weights()])
    return with_random_statistics(model)


def rnn_of_keras_2() -> list[Any]:
    """Return the same model's layers as Keras 2 described them."""
    zeros = {"class_name": "Zeros", "config": {}}
    flow = {"return_state": False, "go_backwards": False, "stateful": False, "unroll": False, "time_major": False}
    gates = {"activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True, "implementation": 2}
    norm = {"axis": [2], "epsilon": 1e-3, "center": True, "scale": True, "beta_initializer": zeros}
    penalty = {"class_name": "L2", "config": {"l2": 0.01}}
    dense = entry("Dense", name="inner", units=4, kernel_initializer=zeros, kernel_regularizer=penalty)
    reference = {"stateful": True, "self.batchsize": 4}
    flags = ("batch_moving_mean", "batch_moving_var", "feature_moving_mean", "feature_moving_var")
    return [
        entry("InputLayer", name="tokens", batch_input_shape=[4, 7], sparse=False, ragged=False),
        entry("Embedding", name="embedding", input_dim=30, output_dim=6, mask_zero=False, input_length=7),
        entry("LSTM", name="lstm", units=5, unit_forget_bias=True, return_sequences=True, dropout=0.2, **flow, **gates),
        entry("bln_layer", name="bn1", **reference, **dict(zip(flags, (True, True, False, False), strict=True))),
        entry("BatchNormalization", name="norm", momentum=0.99, **norm),
        entry("LayerNormalization", name="row_norm", **norm),
        entry("LeakyReLU", name="leaky", alpha=0.2),
        entry("TimeDistributed", name="each", layer=dense),
        entry("GRU", name="gru", units=3, reset_after=True, return_sequences=False, **flow, **gates),
        entry("bln_layer", name="bn2", **reference, **dict(zip(flags, (True, False, True, True), strict=True))),
        entry("Dense", name="dense", units=2, activation="softmax", use_bias=True),
    ]


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_the_layers_of_keras_2_compute_what_the_same_layers_compute_in_keras_3(suffix: str, tmp_path: Path) -> None:
    model = rnn()
    write = {".h5": write_as_keras_2, ".keras": write_archive_as_keras_2}[suffix]
    path = write(model, tmp_path / f"rnn{suffix}", rnn_of_keras_2())
    loaded = {".h5": load_h5, ".keras": load_keras}[suffix](path)
    tokens = np.random.default_rng(0).integers(0, 30, (4, 7)).astype("int32")
    # The same operations in float32, but for statistics that the file rounds to float32.
    np.testing.assert_allclose(loaded(tokens), model(tokens), rtol=0, atol=1e-6)
    assert loaded.get_layer("each").layer.kernel_regularizer.l2 == pytest.approx(0.01)
    assert isinstance(loaded.get_layer("lstm").cell.recurrent_initializer, keras.initializers.Orthogonal)


def nested_config(config: Any) -> Any:
    """Put layers bn3 to dense3 into a model of their own."""
    layers = config["config"]["layers"]
    cut = layers.index(layer_of(config, "bn3"))
    inner_input = entry("InputLayer", batch_input_shape=[25, 120], name="inner_input")
    inner_layers = [inner_input | {"name": "inner_input", "inbound_nodes": []}, *layers[cut:]]
    inner_layers[1] = inner_layers[1] | {"inbound_nodes": [[["inner_input", 0, 0, {}]]]}
    inner = {
        "class_name": "Functional",
        "name": "inner",
        "config": {
            "name": "inner",
            "layers": inner_layers,
            "input_layers": [["inner_input", 0, 0]],
            "output_layers": [["dense3", 0, 0]],
        },
        "inbound_nodes": [[["activation", 0, 0, {}]]],
    }
    return {
        "class_name": "Functional",
        "config": config["config"] | {"layers": [*layers[:cut], inner], "output_layers": [["inner", 1, 0]]},
    }


def test_a_nested_model_loads(tmp_path: Path) -> None:
    def nest(file: Any) -> None:
        file.attrs["model_config"] = json.dumps(nested_config(json.loads(file.attrs["model_config"])))
        weights = file["model_weights"]
        inner = weights.create_group("inner")
        for name in ("bn3", "dense2", "bn4", "dense3"):
            weights.move(f"{name}/{name}", f"inner/{name}")
        assert set(inner) == {"bn3", "dense2", "bn4", "dense3"}

    x = np.random.default_rng(0).normal(size=(25, 32, 32, 3)).astype("float32")
    nested = load_h5(edited(tmp_path / "a.h5", nest))
    np.testing.assert_array_equal(nested(x), load_h5(FULL)(x))
    assert len(bln_layers(nested)) == 4


def test_a_nested_model_in_a_keras_file_loads(tmp_path: Path) -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        config = nested_config(json.loads(archive.read("config.json")))
        (tmp_path / "weights.h5").write_bytes(archive.read("model.weights.h5"))
    with h5py.File(tmp_path / "weights.h5", "r+") as file:
        layers = file["layers"]
        for place, inner in (
            ("bln_layer_2", "bln_layer"),
            ("dense_layer_1", "dense_layer"),
            ("bln_layer_3", "bln_layer_1"),
            ("dense_layer_2", "dense_layer_1"),
        ):
            layers.move(place, f"functional/layers/{inner}")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.write(tmp_path / "weights.h5", "model.weights.h5")
    x = np.random.default_rng(0).normal(size=(25, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(load_keras(tmp_path / "a.keras")(x), load_h5(FULL)(x))
