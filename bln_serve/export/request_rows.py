"""What a request's rows are to the artifact: how they are coupled, and how many make a mini-batch unless it says so."""

from dataclasses import dataclass
from typing import Any

from bln_serve.errors import UsageError
from bln_serve.export.conversion import Conversion
from bln_serve.manifest import FORMAT_VERSION, row_facts
from bln_serve.statistics import LayerStatistics, MiniBatchRule, RowCoupling, mini_batch_rule


@dataclass(frozen=True)
class RequestRows:
    """What is known of a model's rows.

    Attributes:
        layers: the BLN layers.
        default: rows of a mini-batch where a request names none.
        proved: the row coupling, with its reason.
    """

    layers: tuple[LayerStatistics, ...]
    default: int | None
    proved: tuple[RowCoupling, str]

    @property
    def rule(self) -> MiniBatchRule | None:
        """How they may be cut, or None where they are independent."""
        return mini_batch_rule(self.layers, self.default or 1, self.proved)

    def facts(self) -> dict[str, Any]:
        """Return the fields that the manifest and the ONNX file's metadata share."""
        facts = row_facts(self.layers, self.default, self.proved)
        return {"format_version": FORMAT_VERSION, "layers": self.layers, **facts}


def choose(converted: Conversion, requested: int | None) -> RequestRows:
    """Find the artifact's rows of a mini-batch: as requested, else what makes every layer's m.

    Raises:
        UsageError: no such number is known, or the layers do not allow it.
    """
    proved = converted.coupling.row_coupling, converted.coupling.reason
    sizes = {layer.default_rows for layer in converted.layers}
    default = requested if requested is not None else next(iter(sizes)) if len(sizes) == 1 else None
    rule = mini_batch_rule(converted.layers, default or 1, proved)
    if rule and default is None:
        trained = sorted({layer.m for layer in converted.layers})
        found = "no layer has an m"
        if trained:
            found = f"the layers were trained with different batch sizes ({trained})"
        if len(trained) == 1:
            found = f"no whole number of rows makes the {trained[0]} that the layer was trained with"
        raise UsageError(
            f"Expected --mini-batch-rows, the rows that a mini-batch has where a request names none. Received: none, "
            f"where rows are coupled ({proved[1]}), and {found}."
        )
    if rule and default and not rule.allows(default, default):
        limits = f"from {rule.min_rows} to {rule.max_rows or 'any number'}"
        raise UsageError(f"Expected --mini-batch-rows {limits} ({proved[1]}). Received: {default}")
    return RequestRows(converted.layers, default, proved)
