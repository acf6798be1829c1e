"""A model file is data: what it names is not imported, what it carries is not run, what is broken is said."""

import json
import zipfile
from pathlib import Path

import keras
import pytest
from support.models import tiny

from bln_serve.errors import ModelLoadError
from bln_serve.export.loading import load


def rewrite_config(path: Path, change) -> Path:
    """Apply `change` to the config inside a .keras file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.keras"
    tiny("PPMM", 5, "tiny").save(path)
    return path


def test_a_saved_model_loads(model_file: Path) -> None:
    assert load(model_file).name == "tiny"


def test_a_class_of_another_module_is_not_imported(model_file: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Layer: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    def name_it(config: dict) -> None:
        config["config"]["layers"][1] |= {"module": "hostile", "class_name": "Layer", "registered_name": "Layer"}

    with pytest.raises(ModelLoadError, match=r"which names hostile.Layer. No code that a file names is imported"):
        load(rewrite_config(model_file, name_it))
    assert not (tmp_path / "ran").exists()


def test_a_lambda_is_not_run(tmp_path: Path) -> None:
    x = keras.Input((3,))
    path = tmp_path / "lambda.keras"
    keras.Model(x, keras.layers.Lambda(lambda value: value * 2)(x)).save(path)
    with pytest.raises(ModelLoadError, match="a Lambda layer, which carries code"):
        load(path)


def test_a_registered_class_of_the_callers_is_welcome(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable(package="callers")
    class Doubling(keras.layers.Layer):
        def call(self, x):
            return x * 2

    x = keras.Input((3,))
    path = tmp_path / "own.keras"
    keras.Model(x, Doubling()(x)).save(path)
    assert isinstance(load(path).layers[-1], Doubling)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="which is not there or is no file"):
        load(tmp_path / "none.keras")


def test_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ModelLoadError, match=r"Expected a \.keras file\. Received: model\.h5"):
        load(tmp_path / "model.h5")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_what_is_no_zip(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(content)
    with pytest.raises(ModelLoadError, match="to be a .keras file: a zip archive"):
        load(tmp_path / "model.keras")


def test_a_truncated_file(model_file: Path) -> None:
    model_file.write_bytes(model_file.read_bytes()[:-2000])
    with pytest.raises(ModelLoadError, match="a zip archive"):
        load(model_file)


def test_weights_that_are_damaged(model_file: Path) -> None:
    with zipfile.ZipFile(model_file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["model.weights.h5"] = members["model.weights.h5"][:500]
    with zipfile.ZipFile(model_file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelLoadError, match="Keras cannot load model.keras: "):
        load(model_file)
