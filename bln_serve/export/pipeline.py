"""An export as a caller orders it: made and verified in a folder of its own, then put in its place.

Nothing is seen at its place before everything is written and verified; on any error nothing is left behind.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import onnx

from bln_serve.artifact import ONNX_MODEL, Artifact, write_atomically
from bln_serve.errors import ArtifactExistsError, UsageError
from bln_serve.export import deployment, places
from bln_serve.export.choosing import Wish
from bln_serve.export.making import OnProgress, OnStage, Order, make
from bln_serve.export.selection import scoring
from bln_serve.export.selection.record import Selection
from bln_serve.export.staging import exists, put_in_place, staging
from bln_serve.export.tf_to_onnx import CONVERTER_OPSET
from bln_serve.manifest import Manifest
from bln_serve.repository import check_name, next_version
from bln_serve.verification import Tolerance

DEFAULT_OPSET = CONVERTER_OPSET


class ExportOptions(TypedDict, total=False):
    """How a model is to be exported; each may be left out.

    Attributes:
        architecture: for an `.h5` file of weights alone, as `loading.load` takes it.
        name: of the model; by default the file's stem or the model's name.
        statistics: the policy of every BLN layer, as `StatisticsPolicy.parse` reads it; by default each layer's flags.
        calibrate: data to estimate the stored statistics from, as `data.read` takes it; by default what training
            estimated is kept.
        reference_batch: the rows of one mini-batch, at whose own values live batch statistics are frozen.
        feature_slots: "keep" the feature statistics stored by slot, or "pool" them to one for every row; by default
            what each layer says.
        select: labelled validation data, on which the best policy is searched, among calibrated variants and those of
            the reference mini-batch too if their data is given; instead of `statistics`.
        loss: a Keras loss to select by; by default the one that the model was compiled with.
        metrics: Keras metrics to show beside it; by default those that the model was compiled with.
        coupling: the strongest row coupling that may be selected: "independent", "positional" or "any".
        save_model: a `.keras` file to write, with the statistics that are exported, to train on; not the one that
            the model is read from. It is written last, and not if the export fails.
        mini_batch_rows: rows of a mini-batch where a request names none; by default what makes every layer's m, and
            needed where rows are coupled and there is no such number.
        opset: of the ONNX model's standard operators, 18 or higher.
        tolerance: how far an answer may be from Keras's; a wider one than the default needs `force`.
        labels: what the entries of the output's last dimension mean.
        force: replace what is there already, and allow a wider tolerance.
        on_stage: is told what begins, for a progress display.
        on_progress: is told how many of how many steps of it are done, where that is known.
        on_selection: is told how the candidates of `select` rank, which an artifact keeps.
    """

    architecture: str | Path | Callable[[], Any] | None
    name: str | None
    statistics: str | None
    calibrate: Any
    reference_batch: Any
    feature_slots: str | None
    select: Any
    loss: str | None
    metrics: Sequence[str]
    coupling: str
    save_model: str | Path | None
    mini_batch_rows: int | None
    opset: int
    tolerance: Tolerance
    labels: Sequence[str] | None
    force: bool
    on_stage: OnStage
    on_progress: OnProgress
    on_selection: Callable[[Selection], None]


def export(
    model_or_path: Any, out: str | Path = "models", *, version: int | None = None, **options: Unpack[ExportOptions]
) -> Artifact:
    """Export a Keras model as a verified artifact, OUT/NAME/VERSION.

    Args:
        model_or_path: a `.keras` or `.h5` file, or a built Keras model, which is not changed.
        out: the model repository.
        version: positive; by default the one after the latest.
        **options: see `ExportOptions`.

    Returns:
        The artifact, verified and in its place.

    Raises:
        UsageError: an argument is wrong, or data for it is.
        ModelError: the model cannot be loaded or exported.
        ParityError: the exported model does not answer as Keras does; the message has a line for each check.
        ArtifactExistsError: the version is there already, and `force` is not given.
    """
    if Path(out).suffix == ".onnx":
        raise UsageError(f"Expected a model repository's folder. Received: {out}. export_onnx writes a single file.")
    if version is not None and version < 1:
        raise UsageError(f"Expected a version of 1 or more. Received: {version}")
    order = _order(model_or_path, options)
    folder = Path(out) / order.name
    deployment.sweep(folder)
    version = next_version(folder) if version is None else version
    target = folder / str(version)
    force = options.get("force", False)
    if target.exists() and not force:
        raise exists(target)
    if order.save_model and target.absolute() in order.save_model.absolute().parents:
        raise UsageError(
            f"Expected --save-model outside of the version's folder, {target}. Received: {order.save_model}"
        )
    with places.made(Path(out)), places.coming(order.save_model) as saved, staging(target) as stage:
        manifest = make(replace(order, version=version, save_model=saved), stage)
        with deployment.publishing(folder, manifest):
            put_in_place(stage, target, replace=force)
    return Artifact.open(target)


def export_onnx(model_or_path: Any, path: str | Path, **options: Unpack[ExportOptions]) -> Manifest:
    """Export a Keras model as one verified ONNX file, which explains itself in its metadata (`bln.`).

    Args:
        model_or_path: as for `export`.
        path: of the file; its folder is made if need be.
        **options: see `ExportOptions`.

    Returns:
        What a manifest beside it would say.

    Raises:
        UsageError, ModelError, ParityError: as `export`.
        ArtifactExistsError: the file is there already, and `force` is not given.
    """
    path = Path(path)
    order = replace(_order(model_or_path, options), as_artifact=False)
    if path.exists() and not options.get("force", False):
        raise ArtifactExistsError(f"Expected no file at {path}. Received: one. Replace it with --force.")
    with (
        places.made(path.parent),
        places.coming(order.save_model) as saved,
        tempfile.TemporaryDirectory(prefix="bln-export-") as folder,
    ):
        manifest = make(replace(order, save_model=saved), Path(folder))
        write_atomically(path, (Path(folder) / ONNX_MODEL).read_bytes())
    return manifest


def _order(model_or_path: Any, options: ExportOptions) -> Order:
    """Check the options, and bring them into the form that `make` takes.

    Raises:
        TypeError: there is no such option.
        UsageError, ArtifactExistsError: as `export`.
    """
    if unknown := options.keys() - ExportOptions.__annotations__.keys():
        raise TypeError(f"Expected options of ExportOptions. Received: {', '.join(sorted(unknown))}")
    opset, mini_batch_rows = options.get("opset", DEFAULT_OPSET), options.get("mini_batch_rows")
    tolerance, force = options.get("tolerance", Tolerance()), options.get("force", False)
    _check_arguments(opset, tolerance, mini_batch_rows, force)
    name, labels = options.get("name"), options.get("labels")
    chosen: dict[str, Any] = {key: value for key, value in options.items() if key in Wish.__annotations__}
    wish = Wish(**chosen)
    wish.check()
    source = Path(model_or_path) if isinstance(model_or_path, str | Path) else None
    save_model = places.keras_file(options.get("save_model"), source, force)
    if wish.select is not None:
        scoring.compiled(source or model_or_path, wish.loss, wish.metrics)  # before anything that takes time
    return Order(
        model_or_path=model_or_path,
        architecture=options.get("architecture"),
        name=check_name(_name(model_or_path) if name is None else name),
        version=1,
        wish=wish,
        mini_batch_rows=mini_batch_rows,
        opset=opset,
        tolerance=tolerance,
        labels=tuple(labels) if labels else None,
        on_stage=options.get("on_stage", lambda _: None),
        on_progress=options.get("on_progress", lambda *_: None),
        on_selection=options.get("on_selection", lambda _: None),
        save_model=save_model,
    )


def _name(model_or_path: Any) -> str:
    return Path(model_or_path).stem if isinstance(model_or_path, str | Path) else str(model_or_path.name)


def _check_arguments(opset: int, tolerance: Tolerance, mini_batch_rows: int | None, force: bool) -> None:
    if mini_batch_rows is not None and mini_batch_rows < 1:
        raise UsageError(f"Expected --mini-batch-rows 1 or more. Received: {mini_batch_rows}")
    highest = onnx.defs.onnx_opset_version()
    if not CONVERTER_OPSET <= opset <= highest:
        raise UsageError(f"Expected an opset from {CONVERTER_OPSET} to {highest}. Received: {opset}")
    if tolerance.wider_than(Tolerance()) and not force:
        raise UsageError(
            f"Expected a tolerance of at most rtol {Tolerance().rtol:g} and atol {Tolerance().atol:g}. "
            f"Received: rtol {tolerance.rtol:g}, atol {tolerance.atol:g}. A wider one needs --force, and shows in the "
            "manifest."
        )
