"""The files that a model would have ONNX Runtime read: found wherever they are named, refused unless hashed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.artifacts import NAMES, TOGETHER, copy_of, edit_manifest, rehash
from support.onnx_bytes import adding, number, part

import bln_serve
from bln_serve.artifact import ONNX_MODEL, Artifact, hashes
from bln_serve.errors import ArtifactError, IntegrityError
from bln_serve.external_data import external_locations
from bln_serve.runtime import OnnxSession

PLACES = ("initializer", "constant", "body", "function")
SECRET = np.array([3, 1, 4, 1], np.float32)


@pytest.fixture
def folder(golden_artifacts: Path, tmp_path: Path) -> Path:
    """A copy of a golden version, two folders below a secret."""
    (tmp_path / "secret").write_bytes(SECRET.tobytes())
    return copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "tiny_mpmm" / "1")


def replace_model(folder: Path, model: bytes) -> None:
    """Put another model there, with the right hash."""
    (folder / ONNX_MODEL).write_bytes(model)
    edit_manifest(folder, files={**Artifact.open(folder).manifest.files, ONNX_MODEL: hashes(folder)[ONNX_MODEL]})


@pytest.mark.parametrize("name", [*NAMES, *TOGETHER])
def test_exported_models_keep_their_weights_in_themselves(golden_artifacts: Path, name: str) -> None:
    assert external_locations(golden_artifacts / name / "1" / ONNX_MODEL) == ()


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_it_is_named(tmp_path: Path, place: str) -> None:
    model = tmp_path / ONNX_MODEL
    model.write_bytes(adding("weights", place))
    assert external_locations(model) == ("weights",)
    # These are models: ONNX Runtime loads them, and reads a file that nobody checked.
    (tmp_path / "weights").write_bytes(SECRET.tobytes())
    np.testing.assert_array_equal(OnnxSession(model, threads=1).run({"x": np.zeros(4, np.float32)})["y"], SECRET)


def link_out(folder: Path) -> str:
    (folder / "link").symlink_to(folder.parents[1] / "secret")
    return "link"


def link_inside(folder: Path) -> str:
    (folder / "weights").write_bytes(SECRET.tobytes())
    (folder / "link").symlink_to("weights")
    return "link"


def hard_link(folder: Path) -> str:
    (folder / "link").hardlink_to(folder.parents[1] / "secret")
    return "link"


def linked_folder(folder: Path) -> str:
    (folder / "linked").symlink_to(folder.parents[1])
    return "linked/secret"


def unnamed(folder: Path) -> str:
    (folder / "weights").write_bytes(SECRET.tobytes())
    return "weights"


LOCATIONS: dict[str, Callable[[Path], str]] = {
    "above": lambda _: "../../secret",
    "absolute": lambda folder: str(folder.parents[1] / "secret"),
    "round about": lambda folder: f"variables/../../../{folder.parents[1].name}/secret",
    "a link that leads out": link_out,
    "a link inside": link_inside,
    "a hard link": hard_link,
    "in a linked folder": linked_folder,
    "a file the manifest does not name": unnamed,
    "a file the manifest names, named otherwise": lambda _: f"./{ONNX_MODEL}",
    "the manifest": lambda _: "manifest.json",
    "nothing": lambda _: "",
    "with a zero byte": lambda _: f"{ONNX_MODEL}\0",
    "the process's memory": lambda _: "*/_ORT_MEM_ADDR_/*",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("locate", LOCATIONS.values(), ids=LOCATIONS.keys())
def test_external_data_that_was_not_hashed_is_refused_before_onnx_runtime_sees_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, locate: Callable[[Path], str]
) -> None:
    replace_model(folder, adding(locate(folder), place))
    monkeypatch.setattr(OnnxSession, "__init__", None)
    with pytest.raises(
        IntegrityError, match=r"keep its weights in itself, or in files of its folder that the manifest n"
    ):
        bln_serve.load(folder)


def test_external_data_that_the_manifest_names_is_hashed_and_then_read(folder: Path) -> None:
    (folder / "weights").write_bytes(SECRET.tobytes())
    (folder / ONNX_MODEL).write_bytes(adding("weights"))
    rehash(folder)
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    answer = OnnxSession(artifact.onnx_path, threads=1).run({"x": np.ones(4, np.float32)})["y"]
    np.testing.assert_array_equal(answer, SECRET + 1)
    (folder / "weights").write_bytes((SECRET + 1).tobytes())
    with pytest.raises(IntegrityError, match="weights with SHA-256"):
        artifact.check_hashes()


def test_external_data_that_the_manifest_names_and_that_is_a_link_out_is_refused(folder: Path) -> None:
    link_out(folder)
    (folder / ONNX_MODEL).write_bytes(adding("link"))
    rehash(folder)
    with pytest.raises(IntegrityError, match="'link' to lie in .* Received: a path that leaves it"):
        bln_serve.load(folder)


@pytest.mark.parametrize(
    ("model", "received"),
    [
        (b"no model", "a field of the unknown kind 6"),
        (part(7, b"")[:-1] + b"\x7f", "a field that ends at byte 129, behind the end of its message at 2"),
        (part(7, part(5, b"")[:-1] + b"\x01"), "a field that ends at byte 5, behind the end of its message at 4"),
        (b"\x08", "a number that goes on behind the end"),
        (b"\x08" + b"\xff" * 10, "a number of more than 10 bytes"),
        (b"\x02\x00", "the impossible number 0"),
        (b"\xba\x80\x80\x80\x10\x00", "the impossible number 536870919"),  # cut to 32 bits it would be the graph's
        (b"\x3b", "the unknown kind 3"),  # an old encoding's beginning of a group
        (part(7, b"")[:1], "a number that goes on behind the end"),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(
    tmp_path: Path, golden_artifacts: Path, model: bytes, received: str
) -> None:
    path = tmp_path / ONNX_MODEL
    whole = (golden_artifacts / "tiny_mpmm" / "1" / ONNX_MODEL).read_bytes()
    for content in (model, whole + model):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"Expected an ONNX model in .*\. Received: a .*\. Export the model ag"):
            external_locations(path)
    path.write_bytes(model)
    with pytest.raises(ArtifactError, match=received):
        external_locations(path)


def test_parts_of_one_message_count_together_and_the_last_of_two_texts(tmp_path: Path) -> None:
    """As protobuf has it: a message written in two parts is one, and of a repeated single text the last counts."""
    path = tmp_path / ONNX_MODEL
    entry = part(13, part(1, "offset") + part(1, "location") + part(2, "inside") + part(2, "outside"))
    path.write_bytes(number(1, 8) + part(7, part(2, "g")) + part(7, part(5, entry)))
    assert external_locations(path) == ("outside",)
