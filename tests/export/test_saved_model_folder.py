"""A version's folder as TensorFlow's own tools read it, with our files beside the SavedModel."""

import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.models import two_inputs

from bln_serve.artifact import Artifact
from bln_serve.export import export

COMMAND = Path(sys.executable).with_name("saved_model_cli")
SIGNATURES = ["serve", "serving_default"]
INPUTS = {"numbers": ("DT_FLOAT", "(-1, 3)"), "tokens": ("DT_INT32", "(-1, 5)")}
OUTPUTS = {"classes": ("DT_FLOAT", "(-1, 3)"), "score": ("DT_FLOAT", "(-1, 1)")}

GENERATOR = np.random.default_rng(5)
X = {
    "numbers": GENERATOR.normal(size=(7, 3)).astype(np.float32),
    "tokens": GENERATOR.integers(0, 20, (7, 5)).astype(np.int32),
}


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return two_inputs()


@pytest.fixture(scope="module")
def artifact(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    artifact = export(model, tmp_path_factory.mktemp("models"))
    assert {"manifest.json", "model.onnx", "samples.npz"} <= {path.name for path in artifact.path.iterdir()}
    return artifact


@pytest.fixture(scope="module")
def answers(model: keras.Model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in model(list(X.values())).items()}


def saved_model_cli(*arguments: str | Path) -> str:
    result = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def described(text: str) -> dict[str, dict[str, dict[str, tuple[str, str]]]]:
    """Read what `show --all` prints: signature -> inputs or outputs -> name -> dtype and shape."""
    found: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for section in re.split(r"signature_def\['", text)[1:]:
        tensors = re.findall(r"(input|output)s\['(.*?)'\] tensor_info:\s+dtype: (\w+)\s+shape: (\(.*?\))", section)
        kinds = found.setdefault(section.partition("'")[0], {"input": {}, "output": {}})
        for kind, name, dtype, shape in tensors:
            kinds[kind][name] = (dtype, shape)
    return found


def assert_as_keras(found: dict[str, np.ndarray], answers: dict[str, np.ndarray]) -> None:
    assert set(found) == set(answers)
    for name, expected in answers.items():
        # float32 sums in another order; 1e-5 of the largest answer is the export's own tolerance
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_show_names_the_signatures_their_dtypes_and_a_free_number_of_rows(artifact: Artifact) -> None:
    found = described(saved_model_cli("show", "--all", "--dir", artifact.path))
    assert set(found) - {"__saved_model_init_op"} == {*SIGNATURES, "serve_mini_batches"}
    for signature in SIGNATURES:
        assert found[signature] == {"input": INPUTS, "output": OUTPUTS}
    several = {**INPUTS, "mini_batches": ("DT_INT64", "()")}
    assert found["serve_mini_batches"] == {"input": several, "output": OUTPUTS}


def test_run_answers_as_keras_does(artifact: Artifact, answers: dict[str, np.ndarray], tmp_path: Path) -> None:
    for name, array in X.items():
        np.save(tmp_path / f"{name}.npy", array)
    given = ";".join(f"{name}={tmp_path / name}.npy" for name in X)
    signature = ["--tag_set", "serve", "--signature_def", "serving_default"]
    saved_model_cli("run", "--dir", artifact.path, *signature, "--inputs", given, "--outdir", tmp_path)
    assert_as_keras({name: np.load(tmp_path / f"{name}.npy") for name in OUTPUTS}, answers)


def test_run_refuses_a_name_that_the_signature_has_not(artifact: Artifact) -> None:
    signature = ["--tag_set", "serve", "--signature_def", "serving_default"]
    with pytest.raises(AssertionError, match='"others" is not a valid input key'):
        saved_model_cli("run", "--dir", artifact.path, *signature, "--input_exprs", "others=[[1.0]]")


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_version_folder_is_loaded_as_it_is(
    artifact: Artifact, answers: dict[str, np.ndarray], signature: str, rows: int
) -> None:
    served = tf.saved_model.load(str(artifact.path))
    assert set(served.signatures) == {*SIGNATURES, "serve_mini_batches"}
    found = served.signatures[signature](**{name: tf.constant(array[:rows]) for name, array in X.items()})
    assert_as_keras(
        {name: value.numpy() for name, value in found.items()}, {name: array[:rows] for name, array in answers.items()}
    )


def test_the_folder_stays_what_was_verified_when_tensorflow_has_read_it(artifact: Artifact) -> None:
    tf.saved_model.load(str(artifact.path))
    saved_model_cli("show", "--dir", artifact.path)
    artifact.check_hashes()
    assert artifact.unknown_files == ()
