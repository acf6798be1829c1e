"""The built wheel carries everything the service needs, and runs from itself; the locks pin all of it."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.server import Server

from bln_serve.artifact import Artifact
from bln_serve.verification import Tolerance, compare

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("requirements-*.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("bln_serve-*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    written = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "bln_serve").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == written
    assert "bln_serve/py.typed" in packed


def test_the_wheel_verifies_and_answers_from_itself(wheel: Path, tmp_path: Path, golden_artifacts: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import sys, numpy as np, bln_serve\n"
        "from bln_serve.cli.verify import main\n"
        "assert bln_serve.__file__.startswith(sys.argv[1]), bln_serve.__file__\n"
        "assert main([sys.argv[2]]) == 0\n"
        "import bln_serve.serving.server\n"
        "assert bln_serve.load(sys.argv[2]).predict(np.zeros((2, 8, 8))).shape == (2, 10)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "site", golden_artifacts / "digits_cnn" / "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
    )


@pytest.mark.wheel
def test_the_wheel_installs_in_an_empty_environment_and_serves(
    wheel: Path, tmp_path: Path, golden_artifacts: Path
) -> None:
    """What a user's `pip install` gives: the commands, with what the serving lock says and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    commands = tmp_path / "venv" / "bin"
    for what in (["--require-hashes", "-r", ROOT / "requirements-serve.txt"], ["--no-deps", "--no-index", wheel]):
        subprocess.run([commands / "pip", "install", "--quiet", "--disable-pip-version-check", *what], check=True)
    artifact = golden_artifacts / "digits_cnn" / "1"
    subprocess.run([commands / "bln-verify", artifact], cwd=tmp_path, env={}, check=True, capture_output=True)
    server = Server(str(artifact), command=[str(commands / "bln-serve")])
    try:
        asyncio.run(ready(server))
        sample = Artifact.open(artifact).samples()[-1]
        answer = httpx.post(f"{server.url}/predict", json={"instances": sample.inputs["image"].tolist()}, timeout=60)
        (expected,) = sample.outputs.values()
        assert compare("", expected, np.asarray(answer.json()["predictions"]), Tolerance()).passed
    finally:
        server.end()


async def ready(server: Server) -> None:
    async with server.client() as client:
        await server.wait_until_ready(client)


def test_every_command_is_declared_and_importable() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"bln-export", "bln-inspect", "bln-serve", "bln-verify"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_pins_exact_versions_with_hashes_and_names_no_address(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert "--index-url" not in text
    entries = re.split(r"\n(?=[a-zA-Z0-9])", text.strip())
    assert len(entries) > 20
    assert all(re.match(r"[A-Za-z0-9_.-]+(\[[a-z,-]+\])?==", entry) and "--hash=sha256:" in entry for entry in entries)


def test_the_locks_agree_and_build_on_one_another() -> None:
    def pins(name: str) -> set[tuple[str, str]]:
        text = (ROOT / f"requirements-{name}.txt").read_text()
        return set(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", text, re.MULTILINE))

    assert pins("serve") < pins("export") < pins("dev")
    assert pins("serve") < pins("test") < pins("dev")
    assert not {name for name, _ in pins("serve")} & {"tensorflow", "keras", "onnx", "tf2onnx"}
