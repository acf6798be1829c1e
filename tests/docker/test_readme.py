"""Every console block of docker/README.md is run, in order, in a copy of the checkout, as an operator would."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from support.engine import BASE_IMAGE, COMMAND_S, ROOT, Engine, install
from support.images import EXPORT_USER, hand_to_export_user
from support.readme import assert_shown, blocks, commands, free_port

README = ROOT / "docker" / "README.md"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


class Operator:
    """Someone who types what docker/README.md says, in the folder that it names."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def type(self, command: str, shown: list[str]) -> None:
        command = command.replace(":8000/", f":{self.environment['BLN_PORT']}/")
        result = subprocess.run(
            command,
            shell=True,
            check=False,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
        printed = result.stdout.splitlines()
        assert_shown(shown, printed)
        if shown and shown[0].startswith('{"ready"'):  # which version is served is what these are about
            assert printed == shown


@pytest.fixture
def operator(engine: Engine, serve_image: str, export_image: str, tmp_path: Path) -> Iterator[Operator]:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    hand_to_export_user(tmp_path / "models")
    environment = {
        **{name: value for name, value in engine.environment.items() if not name.startswith("BLN_")},
        # A stack and images of one's own that have the usual names are left alone.
        "COMPOSE_PROJECT_NAME": f"bln-serve-test-{os.getpid()}",
        "BLN_TAG": "test",
        "BLN_PORT": str(free_port()),
        "BLN_USER": EXPORT_USER,
    }
    yield Operator(tmp_path / "docker", environment)
    down = ["docker", "compose", "down", "--remove-orphans"]
    subprocess.run(down, cwd=tmp_path / "docker", env=environment, check=True, capture_output=True)


@pytest.mark.docker
def test_every_block_does_what_it_shows(operator: Operator) -> None:
    install("curl")
    for kind, block in blocks(README):
        assert kind == "console"
        for command, shown in commands(block):
            operator.type(command, shown)


@pytest.mark.docker
def test_a_folder_of_somebody_else_is_refused_with_the_way_out(operator: Operator) -> None:
    operator.environment = {**operator.environment, "BLN_USER": "4321:4321"}
    (operator.folder.parent / "models").chmod(0o755)
    with pytest.raises(
        AssertionError, match=r"Expected permission for models/\S+ Received: .* \(in a container: --user\)"
    ):
        operator.type("docker compose run --rm export models/digits_cnn.keras", ["..."])


def test_every_variable_of_the_compose_file_is_explained() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    used = {part.split(":-")[0].split("}")[0] for part in text.split("${")[1:]}
    used |= {name for name in COMPOSE["services"]["serve"]["environment"] if "=" not in name}
    assert len(used) > 10
    assert {name for name in used if f"`{name}`" not in README.read_text()} == set()


@pytest.mark.parametrize("name", ["serve", "export"])
def test_a_service_of_the_compose_file_has_limits_and_no_rights(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= service.keys()


def test_the_service_has_more_time_to_end_than_it_takes() -> None:
    service = COMPOSE["services"]["serve"]
    (timeout,) = [name for name in service["environment"] if name.startswith("BLN_SERVE_SHUTDOWN_TIMEOUT_S=")]
    assert int(timeout.partition("=")[2]) + 2 < int(service["stop_grace_period"].removesuffix("s"))


def test_the_dockerfile_stands_on_the_image_that_is_tested() -> None:
    assert f"ARG PYTHON_IMAGE={BASE_IMAGE}\n" in (ROOT / "docker" / "Dockerfile").read_text()
