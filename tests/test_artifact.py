"""A version's folder: written whole or not at all, checked by hash, read without running any code it brings."""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifacts import NAMES, copy_of, edit_manifest, rehash
from support.laws import law

from bln_serve.artifact import (
    ONNX_MODEL,
    SAMPLES,
    Artifact,
    Sample,
    hashes,
    sha256,
    write_atomically,
    write_samples,
)
from bln_serve.errors import ArtifactError, IntegrityError


@pytest.fixture
def folder(golden_artifacts: Path, tmp_path: Path) -> Path:
    """A copy of a golden version, to be spoilt."""
    return copy_of(golden_artifacts / "tiny_mpmm" / "1", tmp_path / "tiny_mpmm" / "1")


@pytest.mark.parametrize("name", NAMES)
def test_golden_artifact_is_whole(golden_artifacts: Path, name: str) -> None:
    artifact = Artifact.open(golden_artifacts / name / "1")
    artifact.check_hashes()
    assert artifact.unknown_files == ()
    assert artifact.onnx_path.is_file()
    assert {ONNX_MODEL, SAMPLES, "saved_model.pb"} <= set(artifact.manifest.files)


def test_every_file_that_changes_by_one_bit_is_named(folder: Path) -> None:
    artifact = Artifact.open(folder)
    for name in artifact.manifest.files:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=rf"{re.escape(name)} with SHA-256 .*\. Received: .*export .* again"):
            artifact.check_hashes()
        (folder / name).write_bytes(whole)
    artifact.check_hashes()


def test_every_file_that_is_missing_is_named(folder: Path) -> None:
    artifact = Artifact.open(folder)
    for name in artifact.manifest.files:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(IntegrityError, match=rf"Expected the file .*{re.escape(name)}.* It is missing: export"):
            artifact.check_hashes()
        (folder / name).write_bytes(whole)


def test_a_link_that_leaves_the_folder_is_refused_though_its_content_is_right(folder: Path, tmp_path: Path) -> None:
    elsewhere = (folder / ONNX_MODEL).rename(tmp_path / "elsewhere.onnx")
    (folder / ONNX_MODEL).symlink_to(elsewhere)
    assert sha256(folder / ONNX_MODEL) == Artifact.open(folder).manifest.files[ONNX_MODEL]
    with pytest.raises(IntegrityError, match="'model.onnx' to lie in .* Received: a path that leaves it"):
        Artifact.open(folder).check_hashes()


@pytest.mark.parametrize("name", ["../outside.bin", "{absolute}"])
def test_a_manifest_that_names_a_file_outside_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside.bin"
    outside.write_bytes(b"x")
    named = {name.format(absolute=outside): sha256(outside)}
    edit_manifest(folder, files={**hashes(folder), **named})
    with pytest.raises(IntegrityError, match="a path that leaves it"):
        Artifact.open(folder).check_hashes()


@pytest.mark.parametrize("name", [ONNX_MODEL, SAMPLES])
def test_a_manifest_without_the_hash_of_what_is_served_is_refused(folder: Path, name: str) -> None:
    edit_manifest(folder, files={key: value for key, value in hashes(folder).items() if key != name})
    with pytest.raises(IntegrityError, match=f"to hold the SHA-256 of {name}. Received: none. Export the model again"):
        Artifact.open(folder).check_hashes()


def test_unknown_files_are_reported_and_do_not_fail(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "manifest.json").write_text("{}")
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    assert artifact.unknown_files == ("deeper/manifest.json", "notes.txt")


def test_hashes_name_every_file_but_the_manifest(folder: Path) -> None:
    assert hashes(folder) == Artifact.open(folder).manifest.files
    before = dict(hashes(folder))
    (folder / ONNX_MODEL).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hashes(folder) == {**before, ONNX_MODEL: empty}


ARRAYS = st.dictionaries(st.sampled_from(["x", "a/b", "0", "inputs"]), st.integers(1, 4), min_size=1, max_size=3)


@law
@given(st.lists(st.tuples(ARRAYS, ARRAYS, st.none() | st.integers(0, 30)), max_size=12))
def test_samples_survive_the_disk(
    tmp_path_factory: pytest.TempPathFactory, described: list[tuple[dict[str, int], dict[str, int], int | None]]
) -> None:
    def arrays(rows: dict[str, int]) -> dict[str, Any]:
        return {name: np.arange(count * 2, dtype=np.float32).reshape(count, 2) for name, count in rows.items()}

    folder = tmp_path_factory.mktemp("samples")
    samples = tuple(Sample(arrays(inputs), arrays(outputs), rows) for inputs, outputs, rows in described)
    write_samples(folder, samples)
    found = Artifact(folder, None).samples()  # type: ignore[arg-type]  # samples need no manifest
    assert [sample.mini_batch_rows for sample in found] == [sample.mini_batch_rows for sample in samples]
    for sample, read in zip(samples, found, strict=True):
        for written, back in ((sample.inputs, read.inputs), (sample.outputs, read.outputs)):
            assert set(written) == set(back)
            for name in written:
                np.testing.assert_array_equal(written[name], back[name])


class Bomb:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the samples were unpickled",))


def pickled_npz(path: Path) -> None:
    np.savez(path, **{"0/inputs/x": np.array([Bomb()], object), "0/mini_batch_rows": np.asarray(-1)})


def bare_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def damaged_npz(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first = archive.infolist()[1]
    start = first.header_offset + 30 + len(first.filename) + 40
    whole[start : start + 40] = b"\xff" * 40
    path.write_bytes(whole)


UNREADABLE: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no archive"),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "a pickled array": pickled_npz,
    "one bare array": bare_npy,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "damaged inside": damaged_npz,
    "other keys": lambda path: np.savez(path, x=np.zeros(3)),
    "no mini_batch_rows": lambda path: np.savez(path, **{"0/inputs/x": np.zeros(3)}),
}


@pytest.mark.parametrize("spoil", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_samples_that_cannot_be_read_are_refused_without_running_anything(
    folder: Path, spoil: Callable[[Path], Any]
) -> None:
    spoil(folder / SAMPLES)
    with pytest.raises(ArtifactError, match=r"Expected requests with answers in .*samples\.npz. Received: ."):
        Artifact.open(folder).samples()


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert entries(tmp_path) == ["config.pbtxt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_rehash_makes_an_altered_copy_pass_the_hash_check(folder: Path) -> None:
    (folder / ONNX_MODEL).write_bytes(b"")
    rehash(folder)
    artifact = Artifact.open(folder)
    artifact.check_hashes()
    assert replace(artifact.manifest, files={}) != artifact.manifest
