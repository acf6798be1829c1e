"""What becomes of a model's rows, found out before anything is estimated, evaluated or chosen.

The model is converted once with its BLN layers marked. On that graph it is proved, in milliseconds and under any
policies, how the whole model couples rows: its BLN layers and everything else in it.
"""

from collections.abc import Sequence
from dataclasses import replace

import onnx

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import coupling, freezing, marking
from bln_serve.export.coupling import GraphCoupling
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, attributes_of, is_op
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.saved_model import Callee
from bln_serve.statistics import LayerStatistics, RowCoupling, StatisticsPolicy


class RowAnalysis:
    """The rows of one model.

    Args:
        callee: the model; it is as it was afterwards.
        frozen: its BLN layers, pooled as they are to be exported; their policies do not matter.

    Raises:
        UnsupportedModelError: the model cannot be converted: a layer answers inside a loop, for one.
    """

    def __init__(self, callee: Callee, frozen: Sequence[FrozenLayer]) -> None:
        with freezing.applied(callee.model, frozen):
            marked = marking.to_marked_onnx(callee, frozen)
        self._model, self._rows_per_row = marked.model, marked.rows_per_row
        self._nodes = [node for node in marked.model.graph.node if is_op(node, BATCH_LAYER_NORMALIZATION)]
        independent = StatisticsPolicy.from_code("PPMM")
        self.rest = self.coupling([replace(item, policy=independent) for item in frozen])
        """How rows are coupled by everything but the BLN layers."""

    def placed(self, frozen: Sequence[FrozenLayer]) -> tuple[FrozenLayer, ...]:
        """Say of each layer how many rows it has for one of a request's, and whether it is called at all."""
        return tuple(
            replace(item, rows_per_row=self._rows_per_row.get(item.name, 1), called=item.name in self._rows_per_row)
            for item in frozen
        )

    def coupling(self, frozen: Sequence[FrozenLayer]) -> GraphCoupling:
        """Prove how rows are coupled under these policies."""
        codes = {item.name: item.policy.code for item in frozen}
        for node in self._nodes:  # in place: the weights of a model need no copy
            policy = next(attribute for attribute in node.attribute if attribute.name == "policy")
            policy.s = codes[attributes_of(node)["layer"]].encode()
        return coupling.analyse(self._model)

    def is_independent(self, frozen: Sequence[FrozenLayer]) -> bool:
        """Whether it is proved that an answer depends on its own row alone."""
        return self.coupling(frozen).row_coupling is RowCoupling.INDEPENDENT

    def require_own_rows(self, frozen: Sequence[FrozenLayer]) -> None:
        """Make sure of what the export needs to prove of layers whose rows meet.

        Raises:
            UnsupportedModelError: it cannot be proved.
        """
        layers = [item.statistics for item in self.placed(frozen) if item.name in self._rows_per_row]
        require_own_rows(self._model, self.coupling(frozen), layers)


def require_own_rows(marked: onnx.ModelProto, proved: GraphCoupling, layers: Sequence[LayerStatistics]) -> None:
    """Make sure that a layer whose rows meet has each request row's entries side by side, and slots for one.

    Raises:
        UnsupportedModelError: that is not proved, or there are too few slots.
    """
    by_name = {layer.name: layer for layer in layers}
    for node in marked.graph.node:
        if not is_op(node, BATCH_LAYER_NORMALIZATION):
            continue
        layer = by_name[attributes_of(node)["layer"]]
        if layer.row_coupling is RowCoupling.INDEPENDENT:
            continue
        if proved.layer_rows.get(node.name) != layer.rows_per_row:
            raise UnsupportedModelError(
                f"Expected axis 0 of layer {layer.name!r} to hold each row's own entries side by side, since its rows "
                f"meet ({layer.reason}). Received: a model where that cannot be proved. Move the layer before the "
                "reshape, or take a policy under which rows stay apart: --statistics PPMM."
            )
        if layer.slots == 0:
            raise UnsupportedModelError(
                f"Expected layer {layer.name!r} to have slots for one row of a request. Received: {layer.m} slots, and "
                f"{layer.rows_per_row} entries for each row. Take a policy without slots: --statistics PPMM."
            )
