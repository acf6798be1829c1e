"""Which models and versions lie where, however the folder is given."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.artifacts import NAMES, TOGETHER

from bln_serve.errors import ArtifactError, ModelNotFoundError, UsageError
from bln_serve.manifest import FILE_NAME
from bln_serve.repository import (
    Kind,
    ModelVersion,
    candidates,
    check_name,
    find,
    in_order,
    next_version,
    place_of,
    stamp,
    versions_in,
)


@pytest.fixture
def place(golden_artifacts: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Copy the manifest of a golden model to a place below an empty repository: place("tiny_mpmm", "tiny_mpmm/2")."""

    def copy(name: str, where: str) -> Path:
        folder = tmp_path / "models" / where
        folder.mkdir(parents=True)
        shutil.copy(golden_artifacts / name / "1" / FILE_NAME, folder)
        return tmp_path / "models"

    return copy


def listed(found: list[ModelVersion]) -> list[tuple[str, int, str]]:
    return [(item.name, item.version, "/".join(item.path.parts[-2:])) for item in found]


def test_a_repository_holds_every_model_sorted_by_number(place: Callable[[str, str], Path]) -> None:
    for where in ("b/10", "b/9", "a/1"):
        repository = place("tiny_mpmm", where)
    assert listed(find(repository)) == [("a", 1, "a/1"), ("b", 9, "b/9"), ("b", 10, "b/10")]


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Go on as nobody, where root would be let in everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("closed", [".", "tiny_mpmm"])
def test_a_folder_that_may_not_be_read_is_named_with_the_way_out(
    place: Callable[[str, str], Path], tmp_path: Path, closed: str
) -> None:
    repository = place("tiny_mpmm", "tiny_mpmm/1")
    (repository / closed).chmod(0)
    # The folders above are pytest's, for their owner alone; a service in a container sees the repository's own.
    os.chdir(repository)
    try:
        with as_another_user(), pytest.raises(ModelNotFoundError) as raised:
            find(Path())
    finally:
        os.chdir(tmp_path)
        (repository / closed).chmod(0o755)
    assert str(raised.value).startswith(
        "Expected a model repository that this process may read at .. Received: no perm"
    )
    assert "chmod -R a+rX" in str(raised.value)


def test_golden_repository_is_found(golden_artifacts: Path) -> None:
    names = [item.name for item in find(golden_artifacts)]
    assert names == sorted([*NAMES, *TOGETHER])


def test_a_models_folder_is_found_under_the_name_in_its_manifests(place: Callable[[str, str], Path]) -> None:
    place("tiny_mpmm", "model/1")
    repository = place("tiny_mpmm", "model/2")
    assert listed(find(repository / "model")) == [("tiny_mpmm", 1, "model/1"), ("tiny_mpmm", 2, "model/2")]


def test_a_versions_folder_is_found_whatever_it_is_called(place: Callable[[str, str], Path]) -> None:
    repository = place("tiny_mpmm", "mnt/data")
    assert listed(find(repository / "mnt" / "data")) == [("tiny_mpmm", 1, "mnt/data")]


def test_in_a_repository_the_folder_gives_the_name(place: Callable[[str, str], Path]) -> None:
    assert listed(find(place("tiny_mpmm", "renamed/1"))) == [("renamed", 1, "renamed/1")]


def test_an_unreadable_version_is_found_and_named_by_its_mate(place: Callable[[str, str], Path]) -> None:
    place("tiny_mpmm", "model/1")
    repository = place("tiny_mpmm", "model/2")
    (repository / "model" / "2" / FILE_NAME).write_text("damaged")
    assert listed(find(repository / "model")) == [("tiny_mpmm", 1, "model/1"), ("tiny_mpmm", 2, "model/2")]


def test_a_models_folder_without_any_readable_version_is_named_by_itself(tmp_path: Path) -> None:
    (tmp_path / "lost" / "3").mkdir(parents=True)
    assert listed(find(tmp_path / "lost")) == [("lost", 3, "lost/3")]


@pytest.mark.parametrize("name", ["01", "0", "-1", "+1", "1.0", "v1", ".1.k3j2", "1 ", "²", "1" * 19])
def test_what_is_no_positive_integer_without_leading_zeros_is_no_version(tmp_path: Path, name: str) -> None:
    for folder in (name, "7"):
        (tmp_path / "model" / folder).mkdir(parents=True)
    assert versions_in(tmp_path / "model") == [7]


def test_a_file_named_as_a_version_is_none(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("")
    assert versions_in(tmp_path) == []
    assert versions_in(tmp_path / "absent") == []


def test_folders_that_cannot_be_a_models_are_passed_over(place: Callable[[str, str], Path]) -> None:
    place("tiny_mpmm", ".hidden/1")
    place("tiny_mpmm", "with space/1")
    assert listed(find(place("tiny_mpmm", "plain/1"))) == [("plain", 1, "plain/1")]


def test_an_empty_folder_is_refused_with_the_way_to_fill_it(tmp_path: Path) -> None:
    (tmp_path / "empty_model").mkdir()
    message = (
        r"NAME/VERSION/manifest.json.* Received: a folder without any exported version\. .* bln-export MODEL.keras"
    )
    with pytest.raises(ModelNotFoundError, match=message):
        find(tmp_path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"version's at .*absent. Received: no such folder"):
        find(tmp_path / "absent")


def test_next_version_follows_the_latest_by_number(tmp_path: Path) -> None:
    assert next_version(tmp_path / "model") == 1
    for version in ("9", "10", "0011"):
        (tmp_path / "model" / version).mkdir(parents=True)
    assert next_version(tmp_path / "model") == 11


HERE = Path("here")
FOUND = [
    ModelVersion("b", 1, HERE),
    ModelVersion("a", 9, HERE),
    ModelVersion("a", 10, HERE),
    ModelVersion("a", 2, HERE),
]


def tried(pins: dict[str, int]) -> dict[str, list[int]]:
    return {name: [item.version for item in versions] for name, versions in candidates(FOUND, pins).items()}


def test_candidates_go_from_the_latest_down() -> None:
    assert tried({}) == {"a": [10, 9, 2], "b": [1]}
    assert list(tried({})) == ["a", "b"]


def test_a_pin_leaves_one_version_and_other_models_alone() -> None:
    assert tried({"a": 9}) == {"a": [9], "b": [1]}


@pytest.mark.parametrize(("pins", "there"), [({"a": 3}, "10, 9, 2"), ({"c": 1}, "none")])
def test_a_pin_to_what_is_not_there_is_refused(pins: dict[str, int], there: str) -> None:
    ((name, version),) = pins.items()
    message = f"Expected version {version} of model '{name}', which is pinned. Received: versions {there} of it"
    with pytest.raises(ModelNotFoundError, match=message):
        candidates(FOUND, pins)


@pytest.mark.parametrize("name", ["digits", "a", "A-1_b.c", "2nd", "007"])
def test_names_that_can_be_a_folder_and_part_of_a_url_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "-x", "ümlaut", "a\n", "a:b"])
def test_names_that_cannot_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"letters, digits, '_', '.' and '-', beginning .* Received: '"):
        check_name(name)


def test_a_name_that_reads_as_a_version_is_refused_since_its_repository_would_read_as_a_model() -> None:
    with pytest.raises(UsageError, match="not a number alone. Received: '123'"):
        check_name("123")


def test_a_place_stays_what_it_was_when_versions_come_and_go(place: Callable[[str, str], Path]) -> None:
    repository = place("tiny_mpmm", "a/1")
    whole, model, version = place_of(repository), place_of(repository / "a"), place_of(repository / "a" / "1")
    assert [each.kind for each in (whole, model, version)] == [Kind.REPOSITORY, Kind.MODEL, Kind.VERSION]
    (repository / "7").mkdir()
    assert listed(whole.versions()) == [("a", 1, "a/1")], "a folder called as a version makes it no model's folder"
    place("tiny_mpmm", "a/2")
    assert listed(whole.versions()) == [("a", 1, "a/1"), ("a", 2, "a/2")]
    assert listed(model.versions()) == [("tiny_mpmm", 1, "a/1"), ("tiny_mpmm", 2, "a/2")]
    for each in ("1", "2"):
        (repository / "a" / each / FILE_NAME).write_text("damaged")
    assert [each.name for each in model.versions()] == ["tiny_mpmm", "tiny_mpmm"], "as when it could be read"
    with pytest.raises(ArtifactError):
        version.versions()
    shutil.rmtree(repository / "a" / "1")
    shutil.rmtree(repository / "a" / "2")
    assert whole.versions() == []
    assert model.versions() == []


@pytest.mark.parametrize("where", [".", "a"])
def test_a_place_that_is_not_there_any_more_is_not_taken_for_empty(
    place: Callable[[str, str], Path], where: str
) -> None:
    repository = place("tiny_mpmm", "a/1")
    there = place_of(repository / where)
    shutil.rmtree(repository)
    with pytest.raises(FileNotFoundError):
        there.versions()


@pytest.mark.parametrize("where", [".", "a"])
def test_a_place_that_goes_away_while_it_is_looked_at_is_not_taken_for_empty(
    place: Callable[[str, str], Path], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place("tiny_mpmm", "a/1")
    there = place_of(root / where)

    def gone(folder: Path) -> list[int]:
        monkeypatch.undo()
        there.path.rename(root.with_name("elsewhere"))
        return versions_in(folder)

    monkeypatch.setattr("bln_serve.repository.versions_in", gone)
    with pytest.raises(FileNotFoundError):
        there.versions()


def test_a_pin_whose_version_is_not_there_leaves_nothing_to_try() -> None:
    assert in_order(FOUND, {"a": 3, "c": 1}) == {"a": [], "b": [ModelVersion("b", 1, HERE)], "c": []}


def wait_for_the_next_tick(probe: Path) -> None:
    """Wait until what is changed from now on has a later time: the system's clock of files goes in steps."""
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        probe.touch()


def test_a_stamp_tells_of_every_change(tmp_path: Path) -> None:
    (tmp_path / "variables").mkdir()
    file = tmp_path / "variables" / "data"
    file.write_bytes(b"12")
    seen = [stamp(tmp_path)]
    assert stamp(tmp_path) == seen[0]

    def same_size_and_time() -> None:
        before = file.stat()
        file.write_bytes(b"21")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    changes = [
        same_size_and_time,
        lambda: file.chmod(0o600),
        lambda: (tmp_path / "more").write_bytes(b""),
        lambda: (tmp_path / "dangling").symlink_to("nowhere"),
        file.unlink,
        lambda: shutil.rmtree(tmp_path),
    ]
    for change in changes:
        wait_for_the_next_tick(tmp_path.with_name("probe"))
        change()
        assert stamp(tmp_path) not in seen, change
        seen.append(stamp(tmp_path))
    assert stamp(tmp_path) == ()
