"""Where an export's files go: a Keras file takes its place last, and an error leaves nothing that was made."""

import os
from pathlib import Path

import pytest

from bln_serve.errors import ArtifactExistsError, UsageError
from bln_serve.export.places import coming, keras_file, made


def write(path: Path | None, text: str = "new") -> None:
    assert path is not None
    path.write_text(text)


def test_the_file_comes_to_its_place_at_the_end_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "best.keras"
    with coming(path) as written:
        write(written)
        assert written is not None
        assert written.name == "best.keras"
        assert not path.exists()
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.rglob("*")] == ["a", "b", "best.keras"]


def test_an_error_leaves_what_was_there_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "best.keras").write_text("old")

    def interrupted(path: Path) -> None:
        with coming(path) as written:
            write(written)
            raise KeyboardInterrupt

    for path in (tmp_path / "best.keras", tmp_path / "a" / "b" / "best.keras"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(path)
    assert [each.name for each in tmp_path.rglob("*")] == ["best.keras"]
    assert (tmp_path / "best.keras").read_text() == "old"


def test_no_file_is_no_place() -> None:
    with coming(None) as written:
        assert written is None
    assert keras_file(None, None, False) is None


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below", "new/" + "n" * 300):
        with (
            pytest.raises(UsageError, match="Expected --save-model in a folder that can be written to. Received: .*: "),
            coming(tmp_path / folder / "best.keras"),
        ):
            raise AssertionError
    assert [each.name for each in tmp_path.rglob("*")] == ["file"]


def test_a_folder_that_something_else_filled_stays(tmp_path: Path) -> None:

    def filled() -> None:
        with made(tmp_path / "a" / "b"):
            (tmp_path / "a" / "other").write_text("")
            raise KeyError

    def emptied() -> None:
        with made(tmp_path / "a"):
            (tmp_path / "a" / "other").unlink()
            raise KeyError

    with pytest.raises(KeyError):
        filled()
    assert [each.name for each in tmp_path.rglob("*")] == ["a", "other"]
    with pytest.raises(KeyError):
        emptied()
    assert (tmp_path / "a").is_dir()  # it was there before


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_models_own_file_is_never_written_over(link, force: bool, tmp_path: Path) -> None:
    source, path = tmp_path / "model.keras", tmp_path / "best.keras"
    source.write_text("mine")
    if link is None:
        path = tmp_path / "." / "model.keras"
    else:
        link(source, path)
    with pytest.raises(UsageError, match="Expected --save-model with a file of its own. Received: .*, from which the"):
        keras_file(path, source, force)


def test_another_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    source, path = tmp_path / "model.keras", tmp_path / "best.keras"
    for each in (source, path):
        each.write_text("")
    with pytest.raises(ArtifactExistsError, match="Replace it with --force"):
        keras_file(path, source, False)
    assert keras_file(str(path), source, True) == path
    assert keras_file(path, None, True) == path
    assert keras_file(path, tmp_path / "none.keras", True) == path


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "best.keras").mkdir()
    with pytest.raises(UsageError, match="Expected --save-model with a file NAME.keras. Received: .*, a folder"):
        keras_file(tmp_path / "best.keras", None, True)
