"""An environment for each peer and for the plot, in `.bench-peers`, of the exact packages that are locked here."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from support.engine import ROOT, run_loudly

STATE = ROOT / ".bench-peers"
REQUIREMENTS = Path(__file__).parent / "requirements"

DEBIAN_PYTHON = Path("/usr/bin/python3.11")
"""Triton's Python back end links the libpython of this name, which must be the one that its packages are made for."""


def provide(name: str) -> Path:
    """Make an environment, or take the one that is there if it has what is locked; return its folder.

    Raises:
        RuntimeError: Debian's Python 3.11 is missing and cannot be had, or a package could not be installed.
    """
    folder, locked = STATE / name, REQUIREMENTS / f"{name}.txt"
    stamp, digest = folder / ".installed", hashlib.sha256(locked.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    python = debian_python() if name == "triton" else Path(sys.executable)
    print(f"Installing what {locked.relative_to(ROOT)} locks into {folder.relative_to(ROOT)}.", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    _run(python, "-m", "venv", folder)
    quietly = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes")
    _run(folder / "bin" / "python", "-m", "pip", "install", *quietly, "-r", locked)
    stamp.write_text(digest)
    return folder


def debian_python() -> Path:
    """Return Debian's own Python 3.11, with its shared library and its venv module; as root on Debian, install them."""
    libraries = list(Path("/usr/lib").glob("*-linux-gnu/libpython3.11.so.1.0"))
    if not (DEBIAN_PYTHON.exists() and libraries and Path("/usr/lib/python3.11/ensurepip").exists()):
        if shutil.which("apt-get") is None:
            raise RuntimeError(
                f"Expected {DEBIAN_PYTHON} with libpython3.11 and its venv module, which Triton's Python back end "
                "needs. Received: a system without apt-get. Run this on Debian 12."
            )
        run_loudly("apt-get", "update", "--quiet")
        packages = ("python3.11", "libpython3.11", "python3.11-venv")
        run_loudly("apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages)
    return DEBIAN_PYTHON


def version(folder: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return _run(folder / "bin" / "python", "-c", code, package).strip()


def site_packages(folder: Path) -> Path:
    """Return where an environment's packages lie."""
    return next(folder.glob("lib/python3*/site-packages"))


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        words = " ".join(str(part) for part in command)
        raise RuntimeError(f"Expected {words} to succeed. Received: exit {result.returncode}\n{result.stderr[-2000:]}")
    return result.stdout
