"""config.pbtxt as Triton's own schema reads it, and true at every moment while versions come and go."""

import importlib.util
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.artifacts import NAMES
from support.laws import law
from support.versions import (
    INDEPENDENT,
    MINI_BATCH,
    POLICIES,
    POSITIONAL,
    fill,
    killed_between_the_renames,
    manifest,
    publish,
    truths,
)

from bln_serve.errors import ArtifactError
from bln_serve.export import deployment, saved_model
from bln_serve.export.staging import put_in_place, staging
from bln_serve.manifest import Manifest, read_manifest
from bln_serve.repository import versions_in
from bln_serve.signature import TensorSpec
from bln_serve.statistics import RowCoupling


def _triton_schema() -> Any:
    """Load Triton's model_config_pb2 by its path: the package around it needs grpc."""
    package = importlib.util.find_spec("tritonclient")
    assert package, "Expected the dev extra: tritonclient brings Triton's schema"
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRITON = _triton_schema()


def parsed(text: str) -> Any:
    return text_format.Parse(text, TRITON.ModelConfig())


def config_of(*manifests: Manifest | None) -> Any:
    config = parsed(deployment.config(manifests))
    check_as_triton_does(config)
    return config


def check_as_triton_does(config: Any) -> None:
    """Check what Triton's ValidateIOShape (core/src/model_config_utils.cc) demands of a config that it loads."""
    for tensor in (*config.input, *config.output):
        assert tensor.name
        assert tensor.data_type != TRITON.TYPE_INVALID
        assert tensor.dims
        assert all(size >= 1 or size == -1 for size in (*tensor.dims, *tensor.reshape.shape))
        if tensor.HasField("reshape"):
            assert config.max_batch_size or tensor.reshape.shape
            assert np.prod(tensor.dims) == np.prod(tensor.reshape.shape)


def allows_batching(folder: Path) -> bool:
    """Whether Triton may join requests: also where no config says so, which it then makes itself, with batching on."""
    path = folder / "config.pbtxt"
    if not path.exists():
        return True
    config = parsed(path.read_text())
    listed = bool(config.input and config.output) or config.version_policy.HasField("specific")
    return config.max_batch_size > 0 or config.HasField("dynamic_batching") or not listed


# The text.


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_artifacts_configs_are_what_triton_reads(golden_artifacts: Path, name: str) -> None:
    text = (golden_artifacts / name / "config.pbtxt").read_text()
    check_as_triton_does(parsed(text))
    assert parsed(text) == config_of(read_manifest(golden_artifacts / name / "1"))


def test_the_schema_refuses_a_field_that_triton_does_not_know() -> None:
    with pytest.raises(text_format.ParseError, match='no field named "max_batchsize"'):
        parsed(deployment.config([manifest()]).replace("max_batch_size", "max_batchsize"))


def test_independent_rows_may_be_batched_and_their_dimension_is_tritons() -> None:
    config = config_of(manifest())
    assert (config.name, config.backend, config.default_model_filename) == ("tiny", "onnxruntime", "model.onnx")
    assert config.max_batch_size == deployment.MAX_BATCH_SIZE
    assert config.HasField("dynamic_batching")
    assert [(item.name, list(item.dims)) for item in config.input] == [("x", [6, 4])]
    assert [(item.name, list(item.dims)) for item in config.output] == [("score", [3])]


@pytest.mark.parametrize("coupling", [POSITIONAL, MINI_BATCH])
def test_coupled_rows_are_never_batched_and_their_dimension_is_the_clients(coupling: RowCoupling) -> None:
    config = config_of(manifest(coupling))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [(item.name, list(item.dims)) for item in config.input] == [("x", [-1, 6, 4])]
    assert [(item.name, list(item.dims)) for item in config.output] == [("score", [-1, 3])]


@pytest.mark.parametrize("coupling", POLICIES)
def test_every_input_and_output_is_listed_also_one_number_a_row(coupling: RowCoupling) -> None:
    inputs = (TensorSpec("age", "float32", (None,)), TensorSpec("tokens", "int32", (None, 5)))
    outputs = (TensorSpec("risk", "float32", (None,)), TensorSpec("class", "int64", (None, 1)))
    config = config_of(manifest(coupling, inputs=inputs, outputs=outputs))
    assert [item.name for item in (*config.input, *config.output)] == ["age", "tokens", "risk", "class"]
    age = config.input[0]
    if coupling is INDEPENDENT:
        # Triton wants a dimension beside its own, and takes it away again before the model sees it.
        assert (list(age.dims), age.HasField("reshape"), list(age.reshape.shape)) == ([1], True, [])
    else:
        assert (list(age.dims), age.HasField("reshape")) == ([-1], False)


@pytest.mark.parametrize("dtype", saved_model._DTYPES)
def test_every_dtype_that_the_export_allows_has_tritons_own_name(dtype: str) -> None:
    from tritonclient.utils import np_to_triton_dtype

    spec = TensorSpec("x", dtype, (None, 2))
    (found,) = config_of(manifest(inputs=(spec,))).input
    assert TRITON.DataType.Name(found.data_type) == f"TYPE_{np_to_triton_dtype(np.dtype(dtype))}"


@law
@given(name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), coupling=st.sampled_from(RowCoupling))
@example(name='a "quoted" \\ one', coupling=INDEPENDENT)
@example(name="'} ] max_batch_size: 8", coupling=MINI_BATCH)
@example(name="two\nlines\tand a tab", coupling=MINI_BATCH)
@example(name="Größe 大きさ 🙂", coupling=INDEPENDENT)
def test_any_tensor_name_is_read_back_as_it_is(name: str, coupling: RowCoupling) -> None:
    spec = TensorSpec(name, "float32", (None, 2))
    config = config_of(manifest(coupling, inputs=(spec,), outputs=(spec,)))
    assert (config.input[0].name, config.output[0].name) == (name, name)


def test_a_layers_name_cannot_end_the_comment_that_quotes_it() -> None:
    reason = "bln\nmax_batch_size: 8\n#: batch variance is live"
    assert config_of(replace(manifest(MINI_BATCH), row_coupling_reason=reason)).max_batch_size == 0


@pytest.mark.parametrize("couplings", list(product(POLICIES, repeat=3)))
def test_the_strongest_coupling_wins_and_the_latest_version_gives_the_tensors(couplings: Any) -> None:
    manifests = [
        manifest(coupling, version, inputs=(TensorSpec(f"x{version}", "float32", (None, 2)),))
        for version, coupling in zip((2, 3, 1), couplings, strict=True)
    ]
    config = config_of(*manifests)
    assert (config.max_batch_size > 0) == (set(couplings) == {INDEPENDENT})
    assert config.input[0].name == "x3"
    unreadable = config_of(*manifests, None)
    assert (unreadable.max_batch_size, unreadable.input[0].name) == (0, "x3")


def test_where_no_manifest_can_be_read_triton_serves_nothing() -> None:
    config = config_of(None, None)
    assert config.version_policy.WhichOneof("policy_choice") == "specific"
    assert list(config.version_policy.specific.versions) == []
    assert config.max_batch_size == 0


# Versions that come and go.


def unsafe(folder: Path) -> list[str]:
    """Return what is wrong at this moment: batching beside a coupled version, or a version that is half written."""
    found = truths(folder)
    wrong = [f"half written: {found}"] if "half written" in found else []
    if set(found) - {INDEPENDENT} and allows_batching(folder):
        wrong.append(f"batching beside {found}")
    return wrong


class Observer:
    """Looks between every two steps in the filesystem, whichever function takes them: Python announces each one."""

    STEPS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open"})
    current: "Observer | None" = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.looks, self.wrong = folder, 0, []

    def look(self) -> None:
        self.looks += 1
        self.wrong += unsafe(self.folder)

    @classmethod
    def hook(cls, event: str, arguments: tuple[Any, ...]) -> None:
        observer = cls.current
        if observer and event in cls.STEPS and threading.current_thread() is threading.main_thread():
            cls.current = None  # its own reading is no step
            try:
                observer.look()
            finally:
                cls.current = observer


sys.addaudithook(Observer.hook)  # it stays until the interpreter ends, and does nothing outside `observed`


@contextmanager
def observed(folder: Path) -> Iterator[Observer]:
    Observer.current = observer = Observer(folder)
    try:
        yield observer
    finally:
        Observer.current = None
    observer.look()


class Versions(RuleBasedStateMachine):
    """Any sequence of exports, replacements, removals, killed exports and hands that delete or damage a version."""

    couplings = st.sampled_from(list(RowCoupling))
    choices = st.integers(0, 20)

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name) / "tiny"
        self.folder.mkdir()

    def teardown(self) -> None:
        self.root.cleanup()

    @contextmanager
    def by_the_tool(self) -> Iterator[None]:
        with observed(self.folder) as observer:
            yield
        assert observer.looks > 1
        assert not observer.wrong
        # Not stricter than needed, either.
        found = truths(self.folder)
        unknown = any(item is None for item in deployment._manifests(self.folder))
        assert (self.folder / "config.pbtxt").exists() == bool(found)
        assert not found or allows_batching(self.folder) == (set(found) == {INDEPENDENT} and not unknown)
        assert not list(self.folder.glob(".[0-9]*"))

    def pick(self, choice: int) -> int:
        versions = versions_in(self.folder)
        return versions[choice % len(versions)]

    @rule(coupling=couplings)
    def export(self, coupling: RowCoupling) -> None:
        with self.by_the_tool():
            deployment.sweep(self.folder)  # or the version that a killed export took away would be taken for free
            publish(self.folder, coupling, max(versions_in(self.folder), default=0) + 1)

    @precondition(lambda self: versions_in(self.folder))
    @rule(coupling=couplings, choice=choices)
    def replace_one(self, coupling: RowCoupling, choice: int) -> None:
        with self.by_the_tool():
            publish(self.folder, coupling, self.pick(choice), force=True)

    @precondition(lambda self: any(deployment._manifests(self.folder)))
    @rule(choice=choices)
    def remove(self, choice: int) -> None:
        version = self.folder / str(self.pick(choice))
        if (version / "manifest.json").exists():
            with self.by_the_tool():
                deployment.remove(version)

    @precondition(lambda self: versions_in(self.folder))
    @rule()
    def roll_back(self) -> None:
        with self.by_the_tool():
            deployment.remove(self.folder / str(versions_in(self.folder)[-1]))

    @precondition(lambda self: versions_in(self.folder))
    @rule(choice=choices)
    def delete_by_hand(self, choice: int) -> None:
        shutil.rmtree(self.folder / str(self.pick(choice)))

    @precondition(lambda self: versions_in(self.folder))
    @rule(choice=choices, text=st.sampled_from(["", "{}", '{"format_version": 2}']))
    def damage_by_hand(self, choice: int, text: str) -> None:
        (self.folder / str(self.pick(choice)) / "manifest.json").write_text(text)

    @precondition(lambda self: versions_in(self.folder) and not list(self.folder.glob(".*.old")))
    @rule(coupling=couplings, choice=choices)
    def kill_an_export(self, coupling: RowCoupling, choice: int) -> None:
        killed_between_the_renames(self.folder, coupling, self.pick(choice))

    @rule()
    def sweep(self) -> None:
        before = [path.name.split(".")[1] for path in self.folder.glob(".*.old")]
        with observed(self.folder) as observer:
            deployment.sweep(self.folder)
        assert not observer.wrong
        assert set(before) <= set(map(str, versions_in(self.folder)))

    @invariant()
    def never_batching_beside_a_coupled_version(self) -> None:
        assert not unsafe(self.folder)


TestVersions = Versions.TestCase
TestVersions.settings = settings(law, max_examples=60, stateful_step_count=12)


def config_only_afterwards(folder: Path) -> None:
    publish(folder, INDEPENDENT, 1)
    with staging(folder / "2") as stage:
        fill(stage, manifest(MINI_BATCH, 2))
        put_in_place(stage, folder / "2", replace=False)
        deployment._write(folder, deployment._manifests(folder))


def config_that_forgets_what_is_replaced(folder: Path) -> None:
    publish(folder, MINI_BATCH, 1)
    with staging(folder / "1") as stage:
        fill(stage, manifest(INDEPENDENT, 1))
        deployment._write(folder, [manifest(INDEPENDENT, 1)])
        put_in_place(stage, folder / "1", replace=True)


def config_before_the_removal(folder: Path) -> None:
    publish(folder, INDEPENDENT, 1)
    publish(folder, MINI_BATCH, 2)
    deployment._write(folder, [manifest(INDEPENDENT, 1)])
    deployment.remove(folder / "2")


def config_that_goes_with_the_last_manifest(folder: Path) -> None:
    publish(folder, MINI_BATCH, 1)
    (folder / "1" / "manifest.json").write_text("")
    (folder / "config.pbtxt").unlink()


def old_version_back_after_the_config(folder: Path) -> None:
    publish(folder, MINI_BATCH, 1)
    killed_between_the_renames(folder, INDEPENDENT, 1)
    deployment._write(folder, [manifest(INDEPENDENT, 2)])
    deployment.sweep(folder)


def written_in_its_place(folder: Path) -> None:
    publish(folder, INDEPENDENT, 1)
    (folder / "2").mkdir()
    fill(folder / "2", manifest(INDEPENDENT, 2))


FAULTS = {
    config_only_afterwards: "batching beside ['independent', 'mini-batch']",
    config_that_forgets_what_is_replaced: "batching beside ['mini-batch']",
    config_before_the_removal: "batching beside ['independent', 'mini-batch']",
    config_that_goes_with_the_last_manifest: "batching beside ['mini-batch']",
    old_version_back_after_the_config: "batching beside ['mini-batch']",
    written_in_its_place: "half written: ['independent', 'half written']",
}


@pytest.mark.parametrize(("fault", "seen"), FAULTS.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_the_observer_sees_a_planted_fault(fault: Callable[[Path], None], seen: str, tmp_path: Path) -> None:
    with observed(tmp_path / "tiny") as observer:
        fault(tmp_path / "tiny")
    assert seen in observer.wrong


# Removing.


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_versions_removal_removes_the_config(tmp_path: Path) -> None:
    publish(tmp_path, MINI_BATCH, 1)
    publish(tmp_path, INDEPENDENT, 2)
    deployment.remove(tmp_path / "1")
    assert files_of(tmp_path) == [".lock", "2", "config.pbtxt"]
    assert allows_batching(tmp_path)
    deployment.remove(tmp_path / "2")
    assert files_of(tmp_path) == [".lock"]


def test_a_version_whose_manifest_cannot_be_read_can_be_removed(tmp_path: Path) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    publish(tmp_path, INDEPENDENT, 2)
    (tmp_path / "2" / "manifest.json").write_text("damaged")
    publish(tmp_path, INDEPENDENT, 3)
    assert not allows_batching(tmp_path)
    deployment.remove(tmp_path / "2")
    assert allows_batching(tmp_path)


def test_a_version_is_removed_from_within_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    monkeypatch.chdir(tmp_path / "1")
    deployment.remove(Path())
    assert versions_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", "2", "0", "01", "backup", "5", "file", "1/..", "1/manifest.json"])
def test_only_an_exported_versions_folder_is_removed(name: str, tmp_path: Path) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    for other in ("01", "backup"):
        shutil.copytree(tmp_path / "1", tmp_path / other)
    (tmp_path / "5").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="Expected the folder of an exported version.* Received: .* by hand"):
        deployment.remove(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    publish(tmp_path / "tiny", INDEPENDENT, 1)
    elsewhere = (tmp_path / "tiny" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "tiny" / "1").symlink_to(elsewhere)
    deployment.remove(tmp_path / "tiny" / "1")
    assert versions_in(tmp_path / "tiny") == []
    assert (elsewhere / "model.onnx").exists()


def test_a_removal_waits_for_an_export_that_puts_a_version_in_place(tmp_path: Path) -> None:
    publish(tmp_path, INDEPENDENT, 1)
    removing = threading.Thread(target=deployment.remove, args=[tmp_path / "1"])
    with deployment.publishing(tmp_path, manifest(MINI_BATCH, 2)):
        removing.start()
        removing.join(0.3)
        assert versions_in(tmp_path) == [1]
    removing.join()
    assert versions_in(tmp_path) == []


def test_a_config_that_stays_the_same_is_not_written_anew(tmp_path: Path) -> None:
    publish(tmp_path, MINI_BATCH, 1)
    before = (tmp_path / "config.pbtxt").stat()
    publish(tmp_path, MINI_BATCH, 2)
    deployment.remove(tmp_path / "2")
    assert (tmp_path / "config.pbtxt").stat() == before
