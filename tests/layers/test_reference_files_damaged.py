"""Damaged, foreign and hostile HDF5 in place of a file of the reference: an error, and nothing strange is read."""

import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.reference_files import BATCH_MEAN, FULL, GAMMA, LEGACY, edited, replace

from bln_serve.errors import ModelLoadError
from bln_serve.layers.reference_files import load_h5, load_keras

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
