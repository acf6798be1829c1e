"""The manifest: what an artifact says of itself, as a frozen dataclass and as manifest.json.

Whoever reads an artifact, this package or another program, needs nothing but this file to know what may be sent, how
rows are coupled, how exactly the export was checked, and whether the other files are the ones that were checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from bln_serve.errors import ArtifactError, UsageError
from bln_serve.signature import ModelSignature
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling, mini_batch_rule, strongest
from bln_serve.verification import Check, Tolerance

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
MINI_BATCHES = "mini_batches"
"""How many mini-batches of equal size one run holds: an input of the ONNX model, int64 (1,), 1 unless given."""


@dataclass(frozen=True)
class StoredStatistics:
    """Where an export's stored statistics come from, if not from the model's training.

    Attributes:
        origin: "calibrated" (estimated anew from these rows) or "reference batch" (the own statistics of a mini-batch).
        source: the data's file, without its folder, or the function that returned it.
        sha256: of that file, or of the arrays.
        rows: how many of them were used: whole mini-batches.
    """

    origin: str
    source: str
    sha256: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """One exported version of a model.

    Attributes:
        format_version: of this layout; readers refuse what they do not know.
        name: of the model.
        version: positive.
        created: when it was exported, ISO 8601 in UTC.
        source_sha256: of the .keras file it was made from, or None where it was made from a model in memory.
        signature: inputs and outputs.
        layers: each BLN layer with its policy and m.
        mini_batch_rows: rows of a mini-batch where a request names none: the common m. None without BLN layers.
        min_mini_batch_rows: the fewest rows a mini-batch may have.
        max_mini_batch_rows: the most rows a mini-batch may have (the number of slots), or None for no limit.
        row_coupling: what an answer depends on, as proved on the graph.
        row_coupling_reason: which layer couples the rows, and by which statistic; or which other operation.
        tolerance: what the verification allowed.
        checks: what the verification measured.
        tools: the versions that made the artifact.
        files: SHA-256 of every other file in the folder, by its relative path.
        row_coupling_path: the nodes of the ONNX model from an input to the first that couples rows.
        several_mini_batches: whether one run may hold several mini-batches of equal size, each with its own statistics:
            the ONNX model then has the input `mini_batches`.
        sensitivity: how far Keras's own answers move when each weight moves by one unit in its last place, relative to
            the largest answer; the largest over the samples. No other engine can be nearer than about this.
        notes: what else there is to know of the export, a sentence each.
        stored_statistics: the data that what is stored was taken from; None for the model's training.
    """

    format_version: int
    name: str
    version: int
    created: str
    source_sha256: str | None
    signature: ModelSignature
    layers: tuple[LayerStatistics, ...]
    mini_batch_rows: int | None
    min_mini_batch_rows: int
    max_mini_batch_rows: int | None
    row_coupling: RowCoupling
    row_coupling_reason: str
    tolerance: Tolerance
    checks: tuple[Check, ...]
    tools: Mapping[str, str]
    files: Mapping[str, str]
    row_coupling_path: tuple[str, ...] = ()
    several_mini_batches: bool = False
    sensitivity: float | None = None
    notes: tuple[str, ...] = ()
    stored_statistics: StoredStatistics | None = None

    @cached_property
    def statistics(self) -> str | None:
        """The policy's code where every layer has the same, `mixed` where they differ, None without BLN layers."""
        codes = {layer.policy for layer in self.layers}
        if len(codes) > 1:
            return "mixed"
        return next(iter(codes), None)

    @cached_property
    def rule(self) -> MiniBatchRule | None:
        """How rows may be cut, or None where they are independent."""
        return mini_batch_rule(self.layers, self.mini_batch_rows or 1, (self.row_coupling, self.row_coupling_reason))

    def _check_rows(self) -> None:
        """Recompute from the layers what the manifest says of rows: whoever serves it relies on both."""
        counts = [self.version, *(count for layer in self.layers for count in (layer.m, layer.rows_per_row))]
        if self.mini_batch_rows is not None:
            counts.append(self.mini_batch_rows)
        if min(counts) < 1:
            raise ArtifactError(
                f"Expected m, rows_per_row, mini_batch_rows and version to be at least 1 in {FILE_NAME}."
            )
        if self.mini_batch_rows is None and self.row_coupling is not RowCoupling.INDEPENDENT:
            raise ArtifactError(f"Expected mini_batch_rows in {FILE_NAME}, since rows are coupled. Received: none.")
        expected = row_facts(self.layers, self.mini_batch_rows)
        del expected["row_coupling_reason"]  # a sentence, which later versions may word otherwise
        # Something else than the layers may couple rows, but nothing takes their coupling away.
        expected["row_coupling"] = max(self.row_coupling, expected["row_coupling"], key=lambda each: each.strength)
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ArtifactError(
                    f"Expected {name} in {FILE_NAME} to be {value!r}, as its layers say. "
                    f"Received: {getattr(self, name)!r}. Export the model again."
                )

    def to_json(self) -> bytes:
        """Return the text of manifest.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Read the text of manifest.json.

        Raises:
            ArtifactError: it is not JSON, a field is missing or of the wrong type, or the format is another version's.
        """
        try:
            format_version = msgspec.json.decode(text, type=_Format).format_version
            if format_version != FORMAT_VERSION:
                raise ArtifactError(
                    f"Expected a manifest of format version {FORMAT_VERSION}. Received: {format_version}. "
                    "Export the model again, or use the bln-serve version that wrote it."
                )
            manifest = msgspec.json.decode(text, type=cls)
            manifest._check_rows()
            return manifest
        except (msgspec.MsgspecError, UsageError, RecursionError) as error:
            raise ArtifactError(f"Expected {FILE_NAME} as bln-export writes it. Received: {error}") from error


def row_facts(
    layers: tuple[LayerStatistics, ...],
    mini_batch_rows: int | None,
    proved: tuple[RowCoupling, str] | None = None,
) -> dict[str, Any]:
    """Return the manifest's fields that follow from a model's BLN layers, by name.

    Args:
        layers: the model's.
        mini_batch_rows: where a request names none.
        proved: the coupling that the whole model has, with the reason; by default what the layers make of it.
    """
    coupling, reason = proved or strongest(layers)
    rule = mini_batch_rule(layers, mini_batch_rows or 1, proved)
    return {
        "mini_batch_rows": mini_batch_rows,
        "min_mini_batch_rows": rule.min_rows if rule else 1,
        "max_mini_batch_rows": rule.max_rows if rule else None,
        "row_coupling": coupling,
        "row_coupling_reason": reason,
    }


@dataclass(frozen=True)
class _Format:
    format_version: int


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact's folder.

    Raises:
        ArtifactError: there is none, or it is not one.
    """
    path = folder / FILE_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        versions = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))
        received = f"a folder with the versions {', '.join(versions)}" if versions else error.strerror
        way_out = f"Give one of them: {folder / versions[-1]}" if versions else "Make one with bln-export MODEL.keras"
        raise ArtifactError(
            f"Expected an exported version with a {FILE_NAME} at {folder}. Received: {received}. {way_out}."
        ) from error
    return Manifest.from_json(text)
