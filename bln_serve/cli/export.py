"""bln-export: from a .keras or .h5 file to a verified artifact."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bln_serve.cli import _command
from bln_serve.manifest import Manifest
from bln_serve.repository import versions_in
from bln_serve.statistics import RowCoupling
from bln_serve.verification import Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

    from bln_serve.artifact import Artifact


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    return _command.run(lambda: _export(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bln-export",
        description="Export a Keras model that uses Batch Layer Normalization as a verified SavedModel and ONNX model.",
    )
    parser.add_argument(
        "model", metavar="MODEL.keras|MODEL.h5", help="the trained model; .h5: a file of the reference implementation"
    )
    parser.add_argument(
        "--architecture",
        metavar="MODEL.keras|MODULE:FUNCTION",
        help="for an .h5 file of weights alone: the model they belong to, or the function of yours that builds it",
    )
    parser.add_argument("-o", "--out", default="models", help="the model repository (default: %(default)s)")
    parser.add_argument("--name", help="the model's name (default: the file's)")
    parser.add_argument("--version", type=int, metavar="V", help="the version (default: the next)")
    parser.add_argument(
        "--statistics",
        metavar="POLICY",
        help="where statistics come from at inference: four letters P (stored) or M (live) for batch mean, batch "
        "variance, feature mean, feature variance, such as PPMM; 'population' or 'mini-batch' for all four; or "
        "batch_mean=population,... (default: the flags in the model)",
    )
    parser.add_argument(
        "--mini-batch-rows", type=int, metavar="R", help="rows of a mini-batch where a request names none (default: m)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="the ONNX opset, 18 or higher (default: 18)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=Tolerance().rtol,
        metavar="RTOL",
        help="allowed difference from Keras's answers, relative to the largest of them; wider than the default needs "
        "--force (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON instead of the report")
    parser.add_argument("--force", action="store_true", help="replace an existing version; allow a wider tolerance")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    # As SystemExit it passes through the clean-up of what is half written.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _export_and_report(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _export_and_report(arguments: argparse.Namespace) -> int:
    before = versions_in(Path(arguments.out) / (arguments.name or Path(arguments.model).stem))
    with _progress() as on_stage:
        on_stage("importing TensorFlow")
        with _command.quiet_import():
            from bln_serve.export import export  # noqa: PLC0415 - takes seconds, and --help should not
            from bln_serve.export.pipeline import DEFAULT_OPSET  # noqa: PLC0415 - as above

        artifact = export(
            arguments.model,
            arguments.out,
            architecture=arguments.architecture,
            name=arguments.name,
            version=arguments.version,
            statistics=arguments.statistics,
            mini_batch_rows=arguments.mini_batch_rows,
            opset=DEFAULT_OPSET if arguments.opset is None else arguments.opset,
            tolerance=Tolerance(rtol=arguments.tolerance),
            force=arguments.force,
            on_stage=on_stage,
        )
    replaced = artifact.manifest.version in before
    print(artifact.manifest.to_json().decode() if arguments.json else _report(artifact, replaced), end="")
    return 0


@contextlib.contextmanager
def _progress() -> "Iterator[Callable[[str], None]]":
    """Show what is being done, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - comes with Keras, and only a terminal needs it

    with Console(stderr=True).status("starting") as status:
        yield status.update


def _report(artifact: "Artifact", replaced: bool) -> str:
    manifest = artifact.manifest
    lines = [f"{manifest.name} version {manifest.version}: {_layers(manifest)}"]
    lines += [check.line() for check in manifest.checks]
    lines.append(f"{'--force replaced' if replaced else 'wrote'} {artifact.path}")
    if manifest.tolerance.wider_than(Tolerance()):
        lines.append(f"note: --force allowed a wider tolerance than usual: rtol {manifest.tolerance.rtol:g}")
    lines.append(f"row coupling: {manifest.row_coupling} ({manifest.row_coupling_reason}).")
    lines.append(what_may_be_sent(manifest))
    return "\n".join(lines) + "\n"


def _layers(manifest: Manifest) -> str:
    if not manifest.layers:
        return "no Batch Layer Normalization layer"
    sizes = sorted({layer.m for layer in manifest.layers})
    policies = sorted({layer.policy for layer in manifest.layers})
    count = f"{len(manifest.layers)} BLN layer{'s' if len(manifest.layers) > 1 else ''}"
    return f"{count}, trained with m = {', '.join(map(str, sizes))}, statistics {', '.join(policies)}"


def what_may_be_sent(manifest: Manifest) -> str:
    """Return in plain words what a request may hold."""
    rule = manifest.rule
    if rule is None:
        return "Requests may have any number of rows, and may be batched together."
    limit = f" and at most {rule.max_rows}" if rule.max_rows else ""
    words = [f"Rows are taken in mini-batches of {rule.default_rows}; each needs at least {rule.min_rows}{limit}."]
    if rule.min_rows > 1:
        words.append(f"To serve single rows: --statistics {_single_rows(manifest)}.")
    if manifest.row_coupling is RowCoupling.POSITIONAL:
        words.append("A row's answer depends on its place in its mini-batch.")
    return " ".join(words)


def _single_rows(manifest: Manifest) -> str:
    """Return the choice nearest to the model's own policies that makes rows independent of other rows."""
    features = {layer.policy[2:] for layer in manifest.layers}
    return f"PP{features.pop()}" if len(features) == 1 else "batch_mean=population,batch_var=population"
