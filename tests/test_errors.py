"""The tree that errors.py draws is the tree that it defines, and nothing in it is dead."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import bln_serve
from bln_serve import errors
from bln_serve.errors import BlnServeError, MissingExtraError

SOURCES = sorted(Path(bln_serve.__file__).parent.rglob("*.py"))


def defined() -> dict[str, str]:
    """Return each class of errors.py with its parent."""
    classes = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
    return {item.__name__: item.__base__.__name__ for item in classes}


def drawn() -> dict[str, str]:
    """Return each class of the docstring's tree with its parent, told by the depth of its branch."""
    parents = {}
    path = ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:│   |    )*)(├── |└── )?(\w+Error)\b", line):
            bars, branch, name = found.groups()
            depth = len(bars) // 4 + bool(branch)
            path = [*path[: depth + 1], name]
            parents[name] = path[-2]
    return parents


def called_names() -> set[str]:
    """Return every name that the package calls by itself, such as `ParityError(...)`."""
    return {
        node.func.id
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def test_drawn_tree_is_the_defined_tree() -> None:
    assert len(defined()) >= 20
    assert drawn() == defined()


def test_every_error_is_raised_somewhere() -> None:
    bases = set(defined().values())
    leaves = set(defined()) - bases
    assert leaves - called_names() == set()


def test_every_error_is_a_bln_serve_error_with_a_docstring() -> None:
    for name in defined():
        kind = getattr(errors, name)
        assert issubclass(kind, BlnServeError), name
        assert kind.__doc__, name


def test_errors_module_knows_nothing_of_http_or_of_other_rooms() -> None:
    tree = ast.parse(Path(errors.__file__).read_text("utf-8"))
    assert [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)] == []


def test_missing_extra_error_gives_the_install_command() -> None:
    with pytest.raises(MissingExtraError, match=r"bln-export needs .* pip install 'bln-serve\[export\]'"):
        raise MissingExtraError("bln-export", "export")
