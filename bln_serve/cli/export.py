"""bln-export: from a .keras or .h5 file to a verified artifact."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bln_serve.cli import _command
from bln_serve.errors import UsageError
from bln_serve.manifest import Manifest
from bln_serve.repository import versions_in
from bln_serve.statistics import RowCoupling
from bln_serve.verification import Tolerance

_PASSED_ON = (
    *("architecture", "name", "statistics", "calibrate", "reference_batch", "feature_slots"),
    *("select", "loss", "metrics", "coupling", "save_model", "mini_batch_rows", "force"),
)


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
    parser.add_argument(
        "-o",
        "--out",
        default="models",
        metavar="DIRECTORY|FILE.onnx",
        help="the model repository, or a single ONNX file (default: %(default)s)",
    )
    parser.add_argument("--name", help="the model's name (default: the file's)")
    parser.add_argument("--version", type=int, metavar="V", help="the version (default: the next)")
    parser.add_argument(
        "--statistics",
        metavar="POLICY",
        help="where statistics come from at inference: four letters P (stored) or M (live) for batch mean, batch "
        "variance, feature mean, feature variance, such as PPMM; 'population' or 'mini-batch' for all four; or "
        "batch_mean=population,... (default: the flags in the model)",
    )
    data = "DATA.npz|MODULE:FUNCTION"
    parser.add_argument(
        "--calibrate",
        metavar=data,
        help="estimate the stored statistics anew, with the final weights, from these rows: x in an .npz file, an .npy "
        "file, or a function of yours that returns arrays or a tf.data.Dataset",
    )
    parser.add_argument(
        "--reference-batch",
        metavar=data,
        help="freeze live batch statistics at the values of this one mini-batch, so that other rows no longer matter",
    )
    parser.add_argument(
        "--feature-slots",
        choices=["keep", "pool"],
        help="keep the feature statistics that are stored for each place in a mini-batch, or pool them to one for "
        "every row (default: as the model says)",
    )
    parser.add_argument(
        "--select",
        metavar=data,
        help="instead of --statistics: evaluate the 16 policies on these validation rows, x and y, and export the "
        "best; an artifact keeps the ranking as selection.json and selection.png, with FILE.onnx it is only printed",
    )
    parser.add_argument("--loss", help="a Keras loss to select by (default: the one the model was compiled with)")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        dest="metrics",
        help="a Keras metric to show beside it; may be repeated (default: those the model was compiled with)",
    )
    parser.add_argument(
        "--coupling",
        choices=["independent", "positional", "any"],
        default="any",
        help="select only policies whose rows are coupled no more strongly (default: %(default)s)",
    )
    parser.add_argument(
        "--save-model",
        metavar="FILE.keras",
        help="also write the Keras model as it was exported, to train on, to a file other than MODEL.keras",
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
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="what the entries of the output mean: a text file with one label a line, or a JSON list of strings",
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
    as_file = Path(arguments.out).suffix == ".onnx"
    if as_file and arguments.version is not None:
        raise UsageError(f"Expected --version with a model repository. Received: -o {arguments.out}, a single file.")
    labels = _labels(Path(arguments.labels)) if arguments.labels else None
    replaces_model = bool(arguments.save_model) and Path(arguments.save_model).exists()
    before = versions_in(Path(arguments.out) / (arguments.name or Path(arguments.model).stem))
    selections: list[Any] = []
    with _Stages() as stages:
        stages.begin("importing TensorFlow")
        with _command.quiet_import():
            from bln_serve.export.pipeline import (  # noqa: PLC0415 - takes seconds, and --help should not
                DEFAULT_OPSET,
                ExportOptions,
                export,
                export_onnx,
            )
            from bln_serve.export.selection.report import table  # noqa: PLC0415

        options: ExportOptions = {
            "opset": DEFAULT_OPSET if arguments.opset is None else arguments.opset,
            "tolerance": Tolerance(rtol=arguments.tolerance),
            "labels": labels,
            "on_stage": stages.begin,
            "on_progress": stages.advance,
            "on_selection": selections.append,
        }
        for name in _PASSED_ON:
            options[name] = getattr(arguments, name)  # type: ignore[literal-required]
        if as_file:
            existed = Path(arguments.out).exists()
            manifest = export_onnx(arguments.model, arguments.out, **options)
            written = _Written(arguments.out, manifest.name, existed)
        else:
            artifact = export(arguments.model, arguments.out, version=arguments.version, **options)
            manifest = artifact.manifest
            title = f"{manifest.name} version {manifest.version}"
            written = _Written(str(artifact.path), title, manifest.version in before)
    if arguments.json:
        print(manifest.to_json().decode(), end="")
        return 0
    for selection in selections:
        print(table(selection, kept=not as_file), end="\n\n")
    if arguments.save_model:
        print(f"{'--force replaced' if replaces_model else 'wrote'} {arguments.save_model}")
    print(_report(manifest, written, stages), end="")
    return 0


def _labels(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        labels = msgspec.json.decode(text, type=list[str]) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:  # msgspec's and the decoder's errors are ValueErrors
        raise UsageError(
            f"Expected --labels with a text file, one label a line, or a JSON list. Received: {error}"
        ) from error
    if not labels or not all(label.strip() for label in labels):
        raise UsageError(f"Expected a label in each line of {path}. Received: {len(labels)} lines, some of them empty.")
    return [label.strip() for label in labels]


class _Stages:
    """What is being done, shown while it lasts on a terminal only, and how long each stage took."""

    def __init__(self) -> None:
        self._began: list[tuple[str, float]] = []
        self._bar: Any = None

    def __enter__(self) -> "_Stages":
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
        return self

    def begin(self, stage: str) -> None:
        """Note that a stage begins."""
        self._began.append((stage, time.monotonic()))
        if self._bar:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(stage, total=None)

    def advance(self, done: int, total: int) -> None:
        """Note how many of how many steps of the stage are done."""
        if self._bar:
            self._bar.update(self._bar.task_ids[-1], completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._began.append(("", time.monotonic()))
        if self._bar:
            self._bar.stop()

    def summary(self) -> str:
        """Return the seconds of all and of each stage."""
        each = [f"{stage} {end - at:.1f}" for (stage, at), (_, end) in pairwise(self._began)]
        return f"took {self._began[-1][1] - self._began[0][1]:.1f} s: {', '.join(each)}"


def _bar() -> Any:
    """Return a progress bar with the time left, of a stage that knows its steps, which goes when it is done."""
    from rich import progress  # noqa: PLC0415 - comes with Keras, and only a terminal needs it
    from rich.console import Console  # noqa: PLC0415

    columns = progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.BarColumn()
    return progress.Progress(
        *columns, progress.TimeRemainingColumn(compact=True), console=Console(stderr=True), transient=True
    )


@dataclass(frozen=True)
class _Written:
    """Where the export lies, what it is called, and whether it took another's place."""

    path: str
    title: str
    replaced: bool


def _report(manifest: Manifest, written: _Written, stages: _Stages) -> str:
    lines = [f"{written.title}: {_layers(manifest)}"]
    if stored := manifest.stored_statistics:
        words = {"calibrated": "calibrated on", "reference batch": "those of the reference mini-batch"}[stored.origin]
        lines.append(
            f"stored statistics: {words} {stored.source} (sha256 {stored.sha256[:12]}), "
            f"{stored.rows} row{'' if stored.rows == 1 else 's'}"
        )
    lines += [check.line() for check in manifest.checks]
    lines.append(f"{'--force replaced' if written.replaced else 'wrote'} {written.path}")
    lines.append(stages.summary())
    if manifest.tolerance.wider_than(Tolerance()):
        lines.append(f"note: --force allowed a wider tolerance than usual: rtol {manifest.tolerance.rtol:g}")
    lines += [f"note: {note}" for note in manifest.notes]
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
    if rule.min_rows > 1 and any(layer.row_coupling is RowCoupling.MINI_BATCH for layer in manifest.layers):
        words.append(
            f"To serve single rows: --statistics {_single_rows(manifest)} or --reference-batch DATA; --select DATA "
            "says what that costs."
        )
    if manifest.row_coupling is RowCoupling.POSITIONAL:
        words.append("A row's answer depends on its place in its mini-batch.")
    return " ".join(words)


def _single_rows(manifest: Manifest) -> str:
    """Return the choice nearest to the model's own policies that makes rows independent of other rows."""
    features = {layer.policy[2:] for layer in manifest.layers}
    return f"PP{features.pop()}" if len(features) == 1 else "batch_mean=population,batch_var=population"
