"""What the rooms promise of each other, seen from outside: what is imported, and that the README names every room."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING = {"tensorflow", "keras", "onnx", "tf2onnx"}
WEB = {"fastapi", "pydantic", "starlette", "uvicorn"}


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after a statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import bln_serve", TRAINING | WEB | {"onnxruntime", "numpy"}),
        ("import bln_serve.runtime", TRAINING | WEB),
        ("import bln_serve.cli.verify", TRAINING | WEB),
        ("import bln_serve.cli.export", TRAINING | WEB | {"onnxruntime"}),
        ("import bln_serve.cli.serve", TRAINING | WEB | {"onnxruntime"}),
        ("import bln_serve.serving.server", TRAINING),
        ("import bln_serve.serving.batching", TRAINING | WEB | {"onnxruntime"}),
        ("import bln_serve.reference", TRAINING | WEB | {"onnxruntime"}),
    ],
)
def test_a_room_does_not_pull_in_what_belongs_to_another(statement: str, never: set[str]) -> None:
    assert not imported_by(statement) & never


def test_the_check_of_imports_can_fail() -> None:
    assert "fastapi" in imported_by("import bln_serve.serving.app")


def test_the_readme_has_a_line_for_every_room() -> None:
    organization = (ROOT / "README.md").read_text().partition("## Code organization")[2].partition("\n## ")[0]
    rooms = [
        path for path in (ROOT / "bln_serve").iterdir() if not path.name.startswith("_") and path.suffix != ".typed"
    ]
    missing = [room.name for room in rooms if f"bln_serve/{room.name}" not in organization]
    modules = [path for room in ("export", "serving") for path in (ROOT / "bln_serve" / room).glob("[a-z]*.py")]
    missing += [str(path.name) for path in modules if path.stem not in organization]
    assert not missing


def test_the_top_level_has_no_other_folders() -> None:
    tracked = subprocess.run(
        ["git", "ls-tree", "-d", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    visible = {name for name in tracked.stdout.split() if not name.startswith(".")}
    assert visible <= {"bln_serve", "models", "tests", "docker"}
