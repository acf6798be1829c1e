"""A file of the reference is data: its weights go where they belong, and what is hostile in it is refused unread."""

import json
import marshal
import os
import pickle
import sys
import zipfile
from base64 import b64encode
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
    with_config,
    write_archive_as_keras_2,
    write_as_keras_2,
)

from bln_serve.errors import ModelLoadError
from bln_serve.export.freezing import unusable
from bln_serve.layers import bln_layers
from bln_serve.layers.reference_files import load_h5, load_keras, names_reference_layers
from bln_serve.statistics import STATISTICS

GAMMA = "model_weights/bn1/bn1/scale1:0"
BATCH_MEAN = "model_weights/bn1/bn1/moving_Bmean:0"


def bn1(model: Any) -> Any:
    return model.get_layer("bn1")


def usable(layer: Any) -> list[bool]:
    return [unusable(layer, name) is None for name in STATISTICS]


def replace(file: Any, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


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


# Damaged and foreign files.


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file(part: float, tmp_path: Path) -> None:
    content = FULL.read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(
        ModelLoadError, match=r"^a\.h5: Expected a whole HDF5 file\. Received: .*\. Write the file again"
    ):
        load_h5(tmp_path / "a.h5")


def test_what_is_not_hdf5(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ModelLoadError, match=r"Expected a whole HDF5 file\. Received: .*file signature not found"):
        load_h5(tmp_path / "a.h5")


def test_hdf5_of_something_else(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["measurements"] = np.zeros(3)
    with pytest.raises(
        ModelLoadError, match="Expected a model with its config. Received: a file of weights, or of some"
    ):
        load_h5(tmp_path / "a.h5")
    with pytest.raises(ModelLoadError, match="Expected weights for the layers .*Received: weights for measurements"):
        load_h5(tmp_path / "a.h5", load_h5(FULL))


def test_a_dataset_where_the_weights_should_be(tmp_path: Path) -> None:
    path = edited(tmp_path / "a.h5", lambda file: replace(file, "model_weights", 1.0))
    with pytest.raises(ModelLoadError, match="Expected model_weights to be a group. Received: Dataset"):
        load_h5(path)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            GAMMA,
            np.zeros(5, "f4"),
            r"Expected gamma of layer 'bn1' in shape \(6,\)\. Received: \(5,\)\. Give the archit",
        ),
        (
            BATCH_MEAN,
            np.zeros((1, 6), "f4"),
            r"Expected population_batch_mean of layer 'bn1' in shape \(1, 16, 16, 6\)",
        ),
        ("model_weights/bn1/bn1/moving_Fmean:0", np.float32(1), r"m = 25 slots in layer 'bn1'\. Received: none"),
        (
            "model_weights/bn1/bn1/Variable:0",
            np.float32(-1),
            r"of at least 0 as the epsilon .*Received: -1\.0 of shape",
        ),
        ("model_weights/bn1/bn1/Variable:0", np.zeros(2, "f4"), r"Expected one number of at least 0 as the epsilon"),
        (
            "model_weights/bn3/bn3/moving_Bvar:0",
            -np.ones((1, 120), "f4"),
            "in moving_Bvar of layer 'bn3'. Received: neg",
        ),
    ],
)
def test_weights_that_cannot_be_the_layers(name: str, value: Any, sentence: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.h5", lambda file: replace(file, name, value))
    for architecture in (None, load_h5(FULL)):
        with pytest.raises(ModelLoadError, match=sentence):
            load_h5(path, architecture)


@pytest.mark.parametrize("name", ["bn1/bn1/scale1:0", "dense1/dense1/bias:0"])
def test_a_missing_weight(name: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.h5", lambda file: file["model_weights"].__delitem__(name))
    with pytest.raises(ModelLoadError, match=rf"as the weights of layer '{name.partition('/')[0]}'\. Received: "):
        load_h5(path)


def test_a_weight_too_many(tmp_path: Path) -> None:
    def add(file: Any) -> None:
        file["model_weights/dense1/dense1/more:0"] = np.zeros(3, "f4")

    with pytest.raises(
        ModelLoadError, match="Expected kernel, bias as the weights of layer 'dense1'. Received: .*more:0"
    ):
        load_h5(edited(tmp_path / "a.h5", add))


# Hostile HDF5. Each alters a file that loads.


def soft_link(file: Any) -> None:
    replace(file, GAMMA, h5py.SoftLink("/model_weights/bn2/bn2/scale1:0"))


def external_link(file: Any) -> None:
    replace(file, GAMMA, h5py.ExternalLink(str(FULL), GAMMA))


def intermediate_link(file: Any) -> None:
    file.move("model_weights/bn1/bn1", "elsewhere")
    file["model_weights/bn1/bn1"] = h5py.SoftLink("/elsewhere")


def link_at_the_top(file: Any) -> None:
    file.move("model_weights", "elsewhere")
    file["model_weights"] = h5py.SoftLink("/elsewhere")


def virtual_dataset(file: Any) -> None:
    layout = h5py.VirtualLayout((6,), "f4")
    layout[:] = h5py.VirtualSource(str(FULL), GAMMA, (6,))
    del file[GAMMA]
    file.create_virtual_dataset(GAMMA, layout)


def external_storage(file: Any) -> None:
    del file[GAMMA]
    file.create_dataset(GAMMA, (6,), "f4", external=[("/etc/passwd", 0, 24)])


def shape_never_written(file: Any) -> None:
    del file[GAMMA]
    file.create_dataset(GAMMA, (10**12,), "f4", chunks=(10**6,))


def chunk_never_written(file: Any) -> None:
    del file[GAMMA]
    file.create_dataset(GAMMA, (6,), "f4", chunks=(6,))


def compression_bomb(file: Any) -> None:
    del file[GAMMA]
    file.create_dataset(GAMMA, data=np.zeros(10**6, "f4"), compression="gzip")


def the_same_bytes_many_times(file: Any) -> None:
    for number in range(4):
        file[f"model_weights/dense1/dense1/more{number}:0"] = file["model_weights/dense1/dense1/weights:0"]


def references(file: Any) -> None:
    replace(file, GAMMA, np.array([file["model_weights"].ref] * 6, dtype=h5py.ref_dtype))


def objects(file: Any) -> None:
    replace(file, GAMMA, np.array(["a"] * 6, dtype=h5py.string_dtype()))


def compound(file: Any) -> None:
    replace(file, GAMMA, np.zeros(6, dtype=[("a", "f4")]))


def named_type(file: Any) -> None:
    replace(file, GAMMA, np.dtype("f4"))


def group_within_itself(file: Any) -> None:
    file["model_weights/again/again"] = file.create_group("model_weights/again")


NOT_PLAIN = r"to be plain numbers within the file\. Received: "


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (soft_link, r"Expected no links to other places\. Received: scale1:0, a SoftLink\. Write the file again"),
        (external_link, r"Expected no links to other places\. Received: scale1:0, a ExternalLink"),
        (intermediate_link, r"Expected no links to other places\. Received: bn1, a SoftLink"),
        (link_at_the_top, r"Expected no links to other places\. Received: model_weights, a SoftLink"),
        (virtual_dataset, rf"bn1/bn1/scale1:0 {NOT_PLAIN}a virtual dataset"),
        (external_storage, rf"bn1/bn1/scale1:0 {NOT_PLAIN}a dataset stored outside the file"),
        (shape_never_written, rf"{NOT_PLAIN}shape \(1000000000000,\), 4000000000000 bytes, of which 0 can be stored"),
        (chunk_never_written, rf"{NOT_PLAIN}shape \(6,\), 24 bytes, of which 0 can be stored"),
        (compression_bomb, rf"{NOT_PLAIN}a compressed or filtered dataset"),
        (the_same_bytes_many_times, rf"{NOT_PLAIN}shape \(576, 120\), 276480 bytes, of which \d+ can be stored"),
        (references, rf"{NOT_PLAIN}a dataset of object"),
        (objects, rf"{NOT_PLAIN}a dataset of object"),
        (compound, rf"{NOT_PLAIN}a dataset of \[\('a'"),
        (named_type, rf"{NOT_PLAIN}a Datatype"),
        (group_within_itself, r"Expected at most 100000 objects, 16 groups deep\. Received: more"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_hdf5_that_points_elsewhere_or_claims_more_than_it_holds(change, sentence: str, tmp_path: Path) -> None:
    path = edited(tmp_path / "a.h5", change)
    for architecture in (None, load_h5(FULL)):
        with pytest.raises(ModelLoadError, match=sentence):
            load_h5(path, architecture)


def test_the_archived_weights_are_read_with_the_same_care(tmp_path: Path) -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "weights.h5").write_bytes(members["model.weights.h5"])
    with h5py.File(tmp_path / "weights.h5", "r+") as file:
        replace(file, "layers/bln_layer/vars/0", h5py.ExternalLink(str(FULL), GAMMA))
    members["model.weights.h5"] = (tmp_path / "weights.h5").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(
        ModelLoadError, match=r"^a\.keras: Expected no links to other places\. Received: 0, a ExternalL"
    ):
        load_keras(tmp_path / "a.keras")


def test_an_archive_that_is_damaged(tmp_path: Path) -> None:
    content = bytearray((LEGACY / "cnn_bs25_full.keras").read_bytes())
    content[content.index(b"\x89HDF") + 3000] ^= 1
    (tmp_path / "a.keras").write_bytes(content)
    with pytest.raises(
        ModelLoadError, match=r"^a\.keras: Expected a whole \.keras file, .*Received: Bad CRC-32 .*Copy or"
    ):
        load_keras(tmp_path / "a.keras")


def test_an_archive_without_weights(tmp_path: Path) -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        config = archive.read("config.json")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("config.json", config)
    with pytest.raises(ModelLoadError, match=r"a zip archive with model\.weights\.h5\. Received: .*no item named"):
        load_keras(tmp_path / "a.keras")


def test_an_archive_that_inflates(tmp_path: Path) -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        config = archive.read("config.json")
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", bytes(10**7))
    with pytest.raises(ModelLoadError, match=r"at most 100 times its compressed size\. Received: 10000000 bytes from"):
        load_keras(tmp_path / "a.keras")


def set_attribute(value: Any) -> Any:
    def change(file: Any) -> None:
        del file.attrs["model_config"]
        file.attrs["model_config"] = value

    return change


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.zeros((100, 70)), r"Expected attribute model_config to be one text\. Received: float64"),
        (["{}"] * 50, r"Expected attribute model_config to be one text\. Received: object"),
        (h5py.Empty("f4"), "Expected attribute model_config to be one text"),
        ("x" * (2**26 + 1), r"Expected attribute model_config to have at most 67108864 bytes\. Received: a longer one"),
        ("{", r"Expected a config in JSON\. Received: Expecting property name"),
        (b"\xff", r"Expected a config in JSON\. Received: Expecting value"),
        ("[" * 100_000 + "]" * 100_000, r"Expected a config in JSON\. Received: maximum recursion depth"),
        ("[" * 70 + "]" * 70, r"Expected a config nested at most 64 deep\. Received: a deeper one"),
        ("[]", r"Expected a config of Keras 2, with a str 'class_name'\. Received: None\. No code"),
        ('{"class_name": "Functional", "config": {"layers": 3}}', r"with a list 'layers'\. Received: 3\. No code"),
    ],
    ids=["array", "texts", "empty", "long", "no JSON", "no UTF-8", "very deep", "deep", "list", "types"],
)
def test_a_config_that_is_none(value: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=sentence):
        load_h5(edited(tmp_path / "a.h5", set_attribute(value)))


# Hostile configs.


class Runs:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


CODE = b64encode(marshal.dumps(compile("import os; os.mkdir('ran')", "hostile", "exec"))).decode()
FUNCTION = {"class_name": "__lambda__", "config": {"code": CODE, "defaults": None, "closure": None}}


def lambda_layer(config: Any) -> None:
    layer_of(config, "flatten").update(
        class_name="Lambda",
        config={"name": "flatten", "function": [CODE, None, None], "function_type": "lambda", "module": "__main__"},
    )


def marshalled_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = FUNCTION


def pickled_setting(config: Any) -> None:
    pickled = {"class_name": "__bytes__", "config": b64encode(pickle.dumps(Runs())).decode()}
    layer_of(config, "conv2d")["config"]["padding"] = pickled


def marshalled_regularizer(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["kernel_regularizer"] = FUNCTION


def constraint_as_regularizer(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["kernel_regularizer"] = {"class_name": "NonNeg", "config": {}}


def looked_up_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = "deserialize"


def changed_activation(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["activation"] = "hard_sigmoid"


def unknown_setting(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["surprise"] = 1


def new_setting(config: Any) -> None:
    layer_of(config, "conv2d")["config"].update(lora_rank=10**9)
    layer_of(config, "dense1").update(class_name="Dense")
    layer_of(config, "dense1")["config"].update(lora_rank=10**9)


def foreign_layer(config: Any) -> None:
    layer_of(config, "flatten").update(class_name="hostile>Layer", module="hostile")


def file_reader(config: Any) -> None:
    layer_of(config, "flatten").update(class_name="TFSMLayer", config={"name": "flatten", "filepath": "/nowhere"})


def wrapped_lambda(config: Any) -> None:
    inner = {"class_name": "Lambda", "config": {"function": [CODE, None, None]}}
    layer_of(config, "flatten").update(class_name="TimeDistributed", config={"name": "flatten", "layer": inner})


def huge_layer(config: Any) -> None:
    layer_of(config, "dense1")["config"]["units"] = 10**12


def huge_input(config: Any) -> None:
    layer_of(config, "input")["config"]["batch_input_shape"] = [25, 10**6, 10**6, 3]


def huge_m(config: Any) -> None:
    layer_of(config, "bn1")["config"]["self.batchsize"] = 10**12


def no_m(config: Any) -> None:
    del layer_of(config, "bn1")["config"]["self.batchsize"]


def loop(config: Any) -> None:
    layer_of(config, "conv2d")["inbound_nodes"] = [[["dense3", 0, 0, {}]]]


def call_arguments(config: Any) -> None:
    layer_of(config, "bn1")["inbound_nodes"] = [[["average_pooling2d", 0, 0, {"training": True}]]]


def nodes_of_keras_3(config: Any) -> None:
    layer_of(config, "conv2d")["inbound_nodes"] = [{"args": [FUNCTION], "kwargs": {}}]


def no_such_output(config: Any) -> None:
    config["config"]["output_layers"] = [["dense3", 7, 0]]


def twice_the_name(config: Any) -> None:
    config["config"]["layers"].append(layer_of(config, "conv2d"))


def many_layers(config: Any) -> None:
    config["config"]["layers"] *= 200


def a_layer_as_the_model(config: Any) -> Any:
    return layer_of(config, "conv2d")


def bad_value(config: Any) -> None:
    layer_of(config, "conv2d")["config"]["padding"] = "sideways"


CONFIGS = [
    (
        lambda_layer,
        r"standard layers and the reference's\. Received: one that names Lambda\. No code that a file names is",
    ),
    (marshalled_activation, r"Expected an activation among .*\. Received: dict .*\. No code that a file names"),
    (pickled_setting, r"Expected numbers, texts and lists as a layer's settings\. Received: dict .*\. No code"),
    (marshalled_regularizer, r"Expected a kernel_regularizer among L1, .*\. Received: '__lambda__'"),
    (constraint_as_regularizer, r"Expected a kernel_regularizer\. Received: NonNeg"),
    (looked_up_activation, r"Expected an activation among .*\. Received: 'deserialize'"),
    (changed_activation, r"Expected an activation among .*\. Received: 'hard_sigmoid'"),
    (unknown_setting, r"Expected settings of Conv2D that Keras 3 has\. Received: 'surprise', 1"),
    (new_setting, r"Expected settings of Conv2D that Keras 3 has\. Received: 'lora_rank', 1000000000"),
    (foreign_layer, r"Received: one that names Layer\. No code that a file names is imported or run"),
    (file_reader, r"Received: one that names TFSMLayer\. No code"),
    (wrapped_lambda, r"Received: one that names TimeDistributed\. No code"),
    (huge_layer, r"Received: a weight of shape \(576, 1000000000000\), 576000000000000 numbers where \d+ are left"),
    (huge_input, r"Expected the layers to have the weights that the file stores\. Received: a weight of shape"),
    (huge_m, r"Expected the layers to have the weights that the file stores\. Received: a weight of shape"),
    (no_m, r"Expected a config of Keras 2, with a int 'self\.batchsize'\. Received: None"),
    (loop, r"Expected every layer to be reached\. Received: 'conv2d' is not"),
    (call_arguments, r"Expected \[layer, node, tensor\] without further arguments\. Received: list .*'training': True"),
    (nodes_of_keras_3, r"Expected the nodes of Keras 2, which are lists\. Received: dict"),
    (no_such_output, r"Expected output_layers to name tensors of the model\. Received: list"),
    (twice_the_name, r"Expected layers with different names\. Received: conv2d twice"),
    (many_layers, r"Expected at most 2000 layers\. Received: 3000"),
    (a_layer_as_the_model, r"Received: one that names Conv2D\. No code"),
    (bad_value, r"Expected a model that Keras 3 can build\. Received: .*\. No code that a file names"),
]


@pytest.mark.parametrize(("change", "sentence"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_config_that_names_or_asks_for_what_it_may_not(change, sentence: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('ran')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=sentence):
        load_h5(with_config(tmp_path / "a.h5", change))
    assert not (tmp_path / "ran").exists()
    assert "hostile" not in sys.modules


def test_what_leaves_a_mark_can_leave_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs()))
    assert (tmp_path / "ran").exists()


def test_the_module_that_a_keras_file_names_for_the_layer_is_not_imported(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "helpers"
    package.mkdir()
    for name in ("__init__", "bln_layer", "dense_layer"):
        (package / f"{name}.py").write_text("import os\nos.mkdir('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(bln_layers(load_keras(LEGACY / "cnn_bs25_full.keras"))) == 4
    assert not (tmp_path / "ran").exists()
    assert not any(name.startswith("helpers") for name in sys.modules)


def test_the_layers_of_the_reference_are_told_from_ours() -> None:
    with zipfile.ZipFile(LEGACY / "cnn_bs25_full.keras") as archive:
        assert names_reference_layers(json.loads(archive.read("config.json")))
    model = keras.Sequential([keras.Input((3,)), bln(4, "PPMM"), keras.layers.Dense(1)])
    assert not names_reference_layers(json.loads(model.to_json()))
