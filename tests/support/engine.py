"""A Docker engine for the tests: the one that answers, or else, as root on Debian, one of their own.

Tests type the commands that an operator types, so the engine is spoken to by its command line.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the tests' own engine keeps between runs: images, build caches, the compose plugin. `make clean` removes it.
STATE = ROOT / ".docker-engine"
BASE_IMAGE = "python:3.11-slim-bookworm"
# In the certificates that the test's builds are given, to be looked for in the images.
SECRET_LINE = "this line is in the secret and nowhere else"

START_S = 60
COMMAND_S = 600
PULL_S = 240

PACKAGES = {
    "curl": "curl",
    "dockerd": "docker.io",
    "iptables": "iptables",
    "mmdebstrap": "mmdebstrap",
    "wrk": "wrk",
}


@dataclass(frozen=True)
class Engine:
    """An engine that answers. `environment` is what its command line needs."""

    environment: Mapping[str, str]

    def run(
        self, *command: str | Path, timeout_s: float = COMMAND_S, cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, such as `docker ps`, to its end, whatever that is."""
        return subprocess.run(
            [str(part) for part in command],
            check=False,
            cwd=cwd,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def docker(self, *arguments: str | Path, timeout_s: float = COMMAND_S) -> str:
        """Run a docker command that must succeed, and return what it printed."""
        result = self.run("docker", *arguments, timeout_s=timeout_s)
        command = " ".join(str(argument) for argument in arguments)
        assert result.returncode == 0, f"docker {command} ended with {result.returncode}:\n{result.stderr[-4000:]}"
        return result.stdout.strip()

    def build(self, target: str, tag: str, ca_bundle: Path) -> str:
        """Build one target of docker/Dockerfile as the README says, and return its tag."""
        secret = f"id=ca_bundle,src={ca_bundle}"
        file = ROOT / "docker" / "Dockerfile"
        self.docker("build", "-f", file, "--target", target, "-t", tag, "--secret", secret, ROOT)
        return tag

    def has_image(self, image: str) -> bool:
        return self.run("docker", "image", "inspect", image).returncode == 0


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """Give the engine that answers, or start one and end it afterwards.

    Raises:
        RuntimeError: none answers, and none can be started here.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    with contextlib.ExitStack() as stack:
        if not _answers(environment):
            environment = stack.enter_context(_own_engine(environment))
        yield Engine(_with_compose(environment))


def _answers(environment: Mapping[str, str]) -> bool:
    if shutil.which("docker", path=environment["PATH"]) is None:
        return False
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, check=False, env=environment, capture_output=True, timeout=START_S).returncode == 0


@contextlib.contextmanager
def _own_engine(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    install("dockerd", "iptables")
    (STATE / "bin").mkdir(parents=True, exist_ok=True)
    client = STATE / "bin" / "docker"
    client.unlink(missing_ok=True)
    # Debian's own client: a newer one without its buildx plugin would build without BuildKit.
    client.symlink_to("/usr/bin/docker")
    # A socket's path may have 107 bytes, which a checkout's folder can exceed.
    with tempfile.TemporaryDirectory(prefix="bln-docker-") as folder, (STATE / "log").open("w") as log:
        host = f"unix://{folder}/docker.sock"
        environment = {**environment, "DOCKER_HOST": host, "PATH": f"{client.parent}{os.pathsep}{environment['PATH']}"}
        daemon = subprocess.Popen(
            [
                "dockerd",
                "--data-root",
                STATE / "data",
                "--exec-root",
                f"{folder}/exec",
                "-p",
                f"{folder}/pid",
                "-H",
                host,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: _answers(environment) or daemon.poll() is not None, START_S)
            if daemon.poll() is not None:
                raise RuntimeError(f"dockerd ended with {daemon.returncode}:\n{(STATE / 'log').read_text()[-2000:]}")
            yield environment
        finally:
            daemon.terminate()
            daemon.wait(START_S)


def _with_compose(environment: Mapping[str, str]) -> dict[str, str]:
    command = ["docker", "compose", "version"]
    if subprocess.run(command, check=False, env=environment, capture_output=True, timeout=START_S).returncode == 0:
        return dict(environment)
    plugin = Path("usr/libexec/docker/cli-plugins/docker-compose")
    if not (STATE / "compose" / plugin).exists():
        # Debian 12 has compose 1 alone; the file of Debian 13 needs nothing of its system.
        install("mmdebstrap")
        STATE.mkdir(exist_ok=True)
        run_loudly("mmdebstrap", "--variant=extract", "--include=docker-compose", "trixie", STATE / "compose")
    plugins = STATE / "config" / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    shutil.copy(STATE / "compose" / plugin, plugins)
    return {**environment, "DOCKER_CONFIG": str(plugins.parent)}


def install(*programs: str) -> None:
    """Install Debian's packages for the programs that are missing.

    Raises:
        RuntimeError: this is no Debian, or not root.
    """
    missing = [PACKAGES[program] for program in programs if shutil.which(program) is None]
    if not missing:
        return
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RuntimeError(
            f"Expected {', '.join(missing)}, or root on Debian to install it. Received: neither. Install it; where a "
            "Docker engine is meant, start one, or set DOCKER_HOST."
        )
    run_loudly("apt-get", "update", "--quiet")
    run_loudly("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *missing)


def run_loudly(*command: str | Path) -> None:
    """Run a command that changes this machine, and say so."""
    sys.stderr.write(f"\n{' '.join(str(part) for part in command)}\n")
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=COMMAND_S)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.1) -> None:
    """Ask until it is so.

    Raises:
        TimeoutError: it was not so in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(every_s)
