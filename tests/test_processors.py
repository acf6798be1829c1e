"""How many processors there are: written into made-up roots, and asked of the real kernel."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bln_serve.artifact import ONNX_MODEL
from bln_serve.processors import Processors, available

CGROUP = Path("/sys/fs/cgroup")
REFUSED = 125  # what the shell ends with where it may not enter the group
SAY = "from bln_serve.processors import available; print(available())"
# The thread that asks is one of a run's, the others are made with the session.
SAY_THREADS = """
import os, sys
from pathlib import Path
from bln_serve.runtime import OnnxSession
before = len(os.listdir("/proc/self/task"))
session = OnnxSession(Path(sys.argv[1]), *map(int, sys.argv[2:]))
print(1 + len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize(
    ("affinity", "quota", "count", "text"),
    [
        (2, None, 2, "2 processors"),
        (1, None, 1, "1 processor"),
        (8, 0.5, 1, "1 processor (a CPU quota of 0.5; 8 by affinity)"),
        (2, 1.0, 1, "1 processor (a CPU quota of 1; 2 by affinity)"),
        (8, 1.5, 1, "1 processor (a CPU quota of 1.5; 8 by affinity)"),
        (8, 1.999, 1, "1 processor (a CPU quota of 1.999; 8 by affinity)"),
        (8, 2.0, 2, "2 processors (a CPU quota of 2; 8 by affinity)"),
        (8, 7.25, 7, "7 processors (a CPU quota of 7.25; 8 by affinity)"),
        (2, 16.0, 2, "2 processors (a CPU quota of 16; 2 by affinity)"),
    ],
)
def test_the_count_is_what_both_allow_rounded_down(affinity: int, quota: float | None, count: int, text: str) -> None:
    processors = Processors(affinity, quota)
    assert processors.count == count
    assert str(processors) == text


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def v2(group: str | bytes, quotas: dict[str, str]) -> dict[str, str | bytes]:
    """Return a version 2 root: the process's group, and cpu.max in folders of sys/fs/cgroup."""
    files: dict[str, str | bytes] = {"proc/self/cgroup": b"0::" + os.fsencode(group) + b"\n"}
    return files | {f"sys/fs/cgroup/{folder}/cpu.max": f"{quota}\n" for folder, quota in quotas.items()}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (v2("/", {"": "150000 100000"}), 1.5),
        (v2("/a/b", {"a/b": "50000 100000"}), 0.5),
        (v2("/a/b", {"a": "max 100000", "a/b": "400000 200000"}), 2.0),
        (v2("/a/b", {"a": "100000 100000", "a/b": "400000 100000"}), 1.0),
        (v2("/a/b", {"": "max 100000", "a": "400000 100000", "a/b": "300000 100000"}), 3.0),
        (v2("/a/b", {"a": "100000 100000", "a/b": "max 100000"}), 1.0),
        (v2("/a/b", {"a": "max 100000", "a/b": "max 100000"}), None),
        (v2("/a/b", {"a": "300000 100000", "c": "100000 100000", "a/b/c": "100000 100000"}), 3.0),
    ],
)
def test_version_2_counts_the_smallest_quota_from_the_own_group_up(
    tmp_path: Path, files: dict[str, str | bytes], quota: float | None
) -> None:
    assert available(write(tmp_path, files)).quota == quota


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max",
        "100000",
        "x 100000",
        "100000 x",
        "100000 0",
        "0 100000",
        "-1 100000",
        "1 2 3",
        "1.5 1",
        "² 1",
        f"{9:9>5000} 1",
    ],
)
def test_what_is_no_quota_counts_as_none_and_hides_no_other(tmp_path: Path, text: str) -> None:
    assert available(write(tmp_path / "alone", v2("/a", {"a": text}))).quota is None
    assert available(write(tmp_path / "beside", v2("/a/b", {"a": "300000 100000", "a/b": text}))).quota == 3.0


def v1(group: str, quotas: dict[str, tuple[str, str]], controllers: str = "cpu,cpuacct") -> dict[str, str | bytes]:
    """Return a version 1 root: quota and period in folders of sys/fs/cgroup, beside what else such a machine has."""
    lines = ["9:name=systemd:/s", "8:cpuset:/other", f"4:{controllers}:{group}", "0::/s"]
    files: dict[str, str | bytes] = {"proc/self/cgroup": "\n".join(lines) + "\n"}
    for folder, (quota, period) in quotas.items():
        files[f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"sys/fs/cgroup/{folder}/cpu.cfs_period_us"] = f"{period}\n"
    return files


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (v1("/a", {"cpu,cpuacct/a": ("150000", "100000")}), 1.5),
        (v1("/a", {"cpu/a": ("50000", "100000")}), 0.5),
        (v1("/a", {"cpu/a": ("20000", "10000")}, "cpu"), 2.0),
        (v1("/a", {"cpu/a": ("20000", "10000")}, "cpuacct,cpu"), 2.0),
        (v1("/a", {"cpu": ("-1", "100000"), "cpu/a": ("-1", "100000")}), None),
        (v1("/a/b", {"cpu/a": ("100000", "100000"), "cpu/a/b": ("300000", "100000")}), 1.0),
        (v1("/a/b", {"cpu/a": ("100000", "100000"), "cpu/a/b": ("-1", "100000")}), 1.0),
        (v1("/a", {"cpu/a": ("100000", "")}), None),
        (v1("/a", {"cpuset/other": ("100000", "100000"), "cpu/other": ("100000", "100000")}), None),
    ],
)
def test_version_1_counts_the_smallest_quota_from_the_own_group_up(
    tmp_path: Path, files: dict[str, str | bytes], quota: float | None
) -> None:
    assert available(write(tmp_path, files)).quota == quota


def test_version_2_beside_version_1_is_read_too(tmp_path: Path) -> None:
    both = {**v1("/a", {"cpu/a": ("300000", "100000")}), "sys/fs/cgroup/unified/s/cpu.max": "200000 100000\n"}
    assert available(write(tmp_path, both)).quota == 2.0


@pytest.mark.parametrize(
    "files",
    [
        v2("/system.slice/docker-1f.scope", {"": "150000 100000"}),
        v1("/docker/1f", {"cpu,cpuacct": ("150000", "100000")}),
        v2("/gone (deleted)", {"": "150000 100000"}),
    ],
)
def test_a_group_of_the_hosts_name_is_the_mounts_own(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    assert available(write(tmp_path, files)).quota == 1.5


@pytest.mark.parametrize("group", ["/../../../secret", "/..", "/a/../../../../secret", "//../../../secret"])
def test_a_group_outside_the_mount_is_not_looked_for(tmp_path: Path, group: str) -> None:
    quotas = {"../../../secret/cpu.max": "100000 100000", "cpu.max": "100000 100000"}
    files: dict[str, str | bytes] = {f"sys/fs/cgroup/{name}": text for name, text in quotas.items()}
    root = write(tmp_path, {**v2(group, {"a": "100000 100000"}), **files})
    assert available(root).quota is None
    write(tmp_path, v2("/a", {}))
    assert available(root).quota == 1.0


@pytest.mark.parametrize("group", [b"/a:b", b"/caf\xe9", b"/a b", "/größe".encode()])
def test_a_group_has_whatever_name_a_folder_can_have(tmp_path: Path, group: bytes) -> None:
    root = write(tmp_path, v2(group, {}))
    folder = os.fsencode(root / "sys" / "fs" / "cgroup") + group
    os.makedirs(folder)
    Path(os.fsdecode(folder), "cpu.max").write_text("150000 100000\n")
    assert available(root).quota == 1.5


def test_without_control_groups_the_affinity_alone_counts(tmp_path: Path) -> None:
    assert available(tmp_path).quota is None
    write(tmp_path, {"sys/fs/cgroup/cpu.max": "100000 100000", "proc/self/cgroup": b"\xff\n0\n1:\n:cpu\n\n"})
    assert available(tmp_path).quota is None


def test_a_folder_in_a_files_place_counts_as_none(tmp_path: Path) -> None:
    (write(tmp_path, v2("/a", {})) / "sys/fs/cgroup/a/cpu.max").mkdir(parents=True)
    assert available(tmp_path).quota is None


def test_the_affinity_comes_from_the_kernel_or_else_from_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert available(tmp_path) == Processors(3, None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available(tmp_path) == Processors(12, None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available(tmp_path) == Processors(1, None)


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def on_one_processor(program: str, *arguments: str | Path) -> str:
    """Return what a fresh interpreter prints that may use one processor."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity to set")
    one = str(min(os.sched_getaffinity(0)))
    if shutil.which("taskset"):
        return said("taskset", "-c", one, sys.executable, "-c", program, *arguments)
    return said(sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{one}}})\n{program}", *arguments)


def test_a_real_process_on_one_processor_says_so() -> None:
    here = available()
    assert on_one_processor(SAY) == str(Processors(1, here.quota))
    assert said(sys.executable, "-c", SAY) == str(here)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
def test_a_session_on_one_processor_makes_no_threads(golden_artifacts: Path) -> None:
    model = golden_artifacts / "tiny_mpmm" / "1" / ONNX_MODEL
    assert on_one_processor(SAY_THREADS, model) == "1"
    assert on_one_processor(SAY_THREADS, model, "3") == "3"
    assert said(sys.executable, "-c", SAY_THREADS, model) == str(available().count)


@pytest.fixture
def group_of_one_and_a_half() -> Iterator[Path]:
    """A control group of the real kernel that grants one and a half processors, its group's folder."""
    mount = next((CGROUP / name for name in ("cpu", "cpu,cpuacct") if (CGROUP / name).is_dir()), CGROUP)
    group = mount / f"bln-serve-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_period_us").write_text("100000")
                (group / "cpu.cfs_quota_us").write_text("150000")
            elif (group / "cpu.max").exists():
                (group / "cpu.max").write_text("150000 100000")
            else:
                pytest.skip(f"control groups under {mount} have no CPU quota here")
        except OSError as error:
            pytest.skip(f"no CPU quota can be set here: {error}")
        yield group
    finally:
        remove(group)


def remove(group: Path) -> None:
    """Remove a control group, which the kernel may think busy for a moment after its last process has ended."""
    for _ in range(3000):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)
    group.rmdir()


def within(group: Path, program: str, *arguments: str | Path) -> str:
    """Return what a fresh interpreter prints that is in a control group from its start."""
    enter = f'echo $$ > "$0/cgroup.procs" || exit {REFUSED}; exec "$@"'
    command = ["sh", "-c", enter, group, sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == REFUSED:
        pytest.skip(f"no process can enter a control group here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_quota_of_the_real_kernel_is_seen_and_followed(group_of_one_and_a_half: Path, golden_artifacts: Path) -> None:
    here = available()
    expected = Processors(here.affinity, min(1.5, here.quota or 1.5))
    assert within(group_of_one_and_a_half, SAY) == str(expected)
    model = golden_artifacts / "tiny_mpmm" / "1" / ONNX_MODEL
    assert within(group_of_one_and_a_half, SAY_THREADS, model) == "1"
    assert within(group_of_one_and_a_half, SAY_THREADS, model, "2") == "2"
    (inner := group_of_one_and_a_half / "inner").mkdir()
    try:
        assert within(inner, SAY) == str(expected)
    finally:
        remove(inner)
