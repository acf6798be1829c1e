"""bln-inspect: what is in a model file, or in an artifact."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bln_serve.cli import _command
from bln_serve.manifest import read_manifest
from bln_serve.statistics import Source, in_words

if TYPE_CHECKING:
    from bln_serve.export.inspection import LayerState, ModelState, StatisticState


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="bln-inspect",
        description="Show the Batch Layer Normalization layers of a Keras model file or of an exported version: m, "
        "policy, whether each stored statistic is usable, and what row coupling they make.",
    )
    parser.add_argument("path", type=Path, metavar="FILE", help="a Keras model file, or a version's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    return _command.run(lambda: _inspect(arguments.path, arguments.json))


def _inspect(path: Path, as_json: bool) -> int:
    if path.is_dir():
        manifest = read_manifest(path)
        lines = [f"{layer.name}: m = {layer.m}, policy {layer.policy}" for layer in manifest.layers]
        lines.append(f"row coupling: {manifest.row_coupling} ({manifest.row_coupling_reason})")
        print(manifest.to_json().decode() if as_json else "\n".join(lines))
        return 0
    with _command.quiet_import():
        from bln_serve.export.inspection import inspect  # noqa: PLC0415 - TensorFlow takes seconds to import

    state = inspect(path)
    print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode() if as_json else _report(state))
    return 0


def _report(state: "ModelState") -> str:
    lines = [line for layer in state.layers for line in _layer_lines(layer)]
    return "\n".join([*lines, f"row coupling: {state.row_coupling} ({state.row_coupling_reason})"])


def _layer_lines(state: "LayerState") -> list[str]:
    layer = state.layer
    heading = [f"{layer.name}: m = {layer.m}, policy {layer.policy}", _line("statistic", "source", "stored estimate")]
    return heading + [_statistic_line(each) for each in state.statistics]


def _statistic_line(state: "StatisticState") -> str:
    steps = f"{state.max_steps} step{'' if state.max_steps == 1 else 's'}"
    if state.min_steps != state.max_steps:
        steps = f"{state.min_steps} to {steps}"
    stored = f"NOT usable: {state.problem}" if state.problem else f"usable, {steps}"
    return _line(in_words(state.statistic), Source(state.source).adjective, stored)


def _line(statistic: str, source: str, stored: str) -> str:
    return f"  {statistic:<17} {source:<7} {stored}"
