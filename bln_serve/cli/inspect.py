"""bln-inspect: what is in a Keras model file, in an ONNX file, or in an artifact."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bln_serve.cli import _command
from bln_serve.errors import MissingExtraError
from bln_serve.manifest import read_manifest
from bln_serve.statistics import Source, in_words

if TYPE_CHECKING:
    from bln_serve.export.inspection import LayerState, ModelState, StatisticState
    from bln_serve.export.onnx_file import OnnxState, OnnxTensor


_SAID = "bln.row_coupling"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="bln-inspect",
        description="Show what row coupling a model has, and why. Of a Keras model file or an exported version also "
        "its Batch Layer Normalization layers: m, policy, and whether each stored statistic is usable. Of any ONNX "
        "file also its inputs and outputs, and which inputs index a table; nothing of it is run.",
    )
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="a Keras model file, an .onnx file, or a version's folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    return _command.run(lambda: _inspect(arguments.path, arguments.json))


def _inspect(path: Path, as_json: bool) -> int:
    if path.is_dir():
        manifest = read_manifest(path)
        lines = [f"{layer.name}: m = {layer.m}, policy {layer.policy}" for layer in manifest.layers]
        lines.append(f"row coupling: {manifest.row_coupling} ({manifest.row_coupling_reason})")
        print(manifest.to_json().decode() if as_json else "\n".join(lines))
    elif path.suffix.lower() == ".onnx":
        graph = _of_onnx_file(path)
        print(_json(graph) if as_json else _onnx_report(graph))
    else:
        model = _of_keras_file(path)
        print(_json(model) if as_json else _report(model))
    return 0


def _of_keras_file(path: Path) -> "ModelState":
    with _command.quiet_import():
        from bln_serve.export import require_extra  # noqa: PLC0415 - TensorFlow takes seconds to import

        require_extra()
        from bln_serve.export.inspection import inspect  # noqa: PLC0415 - as above
    return inspect(path)


def _of_onnx_file(path: Path) -> "OnnxState":
    try:
        from bln_serve.export.onnx_file import inspect  # noqa: PLC0415 - a serving install has no onnx
    except ModuleNotFoundError as error:
        raise MissingExtraError("bln-inspect of an ONNX file", "export") from error
    return inspect(path)


def _json(state: "ModelState | OnnxState") -> str:
    return msgspec.json.format(msgspec.json.encode(state), indent=2).decode()


def _onnx_report(state: "OnnxState") -> str:
    opsets = ", ".join(f"{domain} {version}" for domain, version in state.opsets.items())
    lines = [f"ONNX: IR version {state.ir_version}, operators {opsets}"]
    lines.append("runs anywhere: standard operators only" if state.is_standard else f"runs only {_where(state)}")
    lines += [f"input   {_tensor(tensor)}" for tensor in state.inputs]
    lines += [f"output  {_tensor(tensor)}{_without_rows(tensor, state)}" for tensor in state.outputs]
    lines += [f"{key} = {value}" for key, value in state.metadata.items()]
    lines += [f"{name}: {rows or 'an unproved number of'} rows of its own a row" for name, rows in _folded(state)]
    lines.append(f"row coupling: {state.row_coupling} ({state.row_coupling_reason})")
    if state.metadata.get(_SAID, state.row_coupling) != state.row_coupling:
        lines.append(f"  but the file itself says: {state.metadata[_SAID]}")
    if state.row_coupling_path:
        lines.append(f"  by way of: {' -> '.join(_shortened(state.row_coupling_path))}")
    return "\n".join(lines)


def _where(state: "OnnxState") -> str:
    if state.other_operators:
        return f"where these are known: {', '.join(state.other_operators)}"
    return "where so new an operator set is known"


def _tensor(tensor: "OnnxTensor") -> str:
    shape = (
        "of unknown shape"
        if tensor.shape is None
        else f"({', '.join('?' if s is None else str(s) for s in tensor.shape)})"
    )
    text = f"{tensor.name}: {tensor.dtype} {shape}"
    return text if tensor.index_range is None else f"{text}, indices {tensor.index_range[0]} to {tensor.index_range[1]}"


def _without_rows(tensor: "OnnxTensor", state: "OnnxState") -> str:
    return ", axis 0 is not proved to be the rows" if tensor.name in state.outputs_without_rows else ""


def _folded(state: "OnnxState") -> list[tuple[str, int | None]]:
    return [(name, rows) for name, rows in state.layer_rows.items() if rows != 1]


def _shortened(path: Sequence[str]) -> Sequence[str]:
    return path if len(path) <= 8 else (*path[:3], "...", *path[-4:])


def _report(state: "ModelState") -> str:
    lines = [line for layer in state.layers for line in _layer_lines(layer)]
    if any(each.problem for layer in state.layers for each in layer.statistics):
        lines.append("what is not usable can be estimated from data: bln-export --calibrate DATA")
    said = f"row coupling by BLN layers: {state.row_coupling} ({state.row_coupling_reason})"
    return "\n".join([*lines, f"{said}; of the whole model it is proved at export"])


def _layer_lines(state: "LayerState") -> list[str]:
    layer = state.layer
    slots = ", slots pooled" if layer.pooled else ""
    heading = [
        f"{layer.name}: m = {layer.m}, policy {layer.policy}{slots}",
        _line("statistic", "source", "stored estimate"),
    ]
    return heading + [_statistic_line(each) for each in state.statistics]


def _statistic_line(state: "StatisticState") -> str:
    steps = f"{state.max_steps} step{'' if state.max_steps == 1 else 's'}"
    if state.min_steps != state.max_steps:
        steps = f"{state.min_steps} to {steps}"
    stored = f"NOT usable: {state.problem}" if state.problem else f"usable, {steps}"
    return _line(in_words(state.statistic), Source(state.source).adjective, stored)


def _line(statistic: str, source: str, stored: str) -> str:
    return f"  {statistic:<17} {source:<7} {stored}"
