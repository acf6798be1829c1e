"""From a Keras model to the ONNX model that ships, pass by pass, with what is proved of it on the way.

marking         one custom node a BLN, recurrent or embedding call
coupling        what couples the rows of the marked model
recurrent       Recurrent            -> LSTM, GRU, RNN
layout          Transposes out of the way
decomposition   BatchLayerNormalization -> standard operators
embedding       Embedding            -> Gather, and the tables come in
coupling        what couples the rows of the model that ships
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from numpy.typing import NDArray

from bln_serve.errors import RunError, UnsupportedModelError, UsageError
from bln_serve.export import coupling, decomposition, embedding, index_ranges, layout, marking, recurrent
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, is_op
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.graphs import copy_of
from bln_serve.export.row_analysis import require_own_rows
from bln_serve.export.saved_model import Callee
from bln_serve.export.standard import require_standard
from bln_serve.export.tf_to_onnx import CONVERTER_OPSET
from bln_serve.manifest import MINI_BATCHES
from bln_serve.runtime import OnnxSession
from bln_serve.statistics import LayerStatistics, RowCoupling


@dataclass(frozen=True)
class Conversion:
    """The ONNX model, and what was found out about it.

    Attributes:
        model: standard operators only.
        marked: the same before its custom nodes were lowered, without the embeddings' tables.
        layers: the BLN layers.
        coupling: how the model couples rows: the strongest of what was proved of both models.
        index_ranges: lowest and highest value of each input that indexes a table.
        several_mini_batches: whether one run may hold several mini-batches.
        notes: what was left to the plain conversion, a sentence each.
    """

    model: onnx.ModelProto = field(repr=False)
    marked: onnx.ModelProto = field(repr=False)
    layers: tuple[LayerStatistics, ...]
    coupling: coupling.GraphCoupling
    index_ranges: Mapping[str, tuple[int, int]]
    several_mini_batches: bool
    notes: tuple[str, ...]


def convert(callee: Callee, frozen: Sequence[FrozenLayer], opset: int = CONVERTER_OPSET) -> Conversion:
    """Convert a model whose layers have their export policies applied.

    Raises:
        UnsupportedModelError: it cannot be converted, or a layer's rows are not proved to be the request's.
        UsageError: no installed ONNX Runtime loads a model of this opset.
    """
    marked = marking.to_marked_onnx(callee, frozen)
    before = coupling.analyse(marked.model)
    layers = tuple(_layer(item, marked.rows_per_row[item.name]) for item in frozen if item.name in marked.rows_per_row)
    unused = [item.name for item in frozen if item.name not in marked.rows_per_row]
    require_own_rows(marked.model, before, layers)
    model = layout.sink_transposes(recurrent.lower(marked.model))
    # A run can hold several mini-batches where BLN layers alone couple rows: they know how to keep them apart.
    foreign = coupling.analyse(_with_independent_layers(marked.model))
    alone = foreign.row_coupling is RowCoupling.INDEPENDENT
    model = decomposition.decompose(model, several_mini_batches=alone)
    embedding.lower(model)
    require_standard(model)
    _require_fits(model, marked.tables)
    embedding.inject(model, marked.tables)
    model = _at_opset(model, opset)
    after = coupling.analyse(model)
    return Conversion(
        model=model,
        marked=marked.model,
        layers=layers,
        coupling=max(before, after, key=lambda each: each.row_coupling.strength),
        index_ranges=index_ranges.index_ranges(model),
        several_mini_batches=any(value.name == MINI_BATCHES for value in model.graph.input),
        notes=(*marked.notes, *_notes(unused, foreign)),
    )


def _notes(unused: Sequence[str], foreign: coupling.GraphCoupling) -> Iterator[str]:
    for name in unused:
        yield f"{name} is not called at inference, and is not exported"
    if foreign.row_coupling is not RowCoupling.INDEPENDENT:
        yield f"one run holds one mini-batch: {foreign.reason}"


def _layer(item: FrozenLayer, rows_per_row: int) -> LayerStatistics:
    return replace(item.statistics, rows_per_row=rows_per_row)


def _require_fits(model: onnx.ModelProto, tables: Mapping[str, NDArray[Any]]) -> None:
    """Make sure that the model is one file: protobuf, which ONNX is written in, ends at 2 GB."""
    sizes = {item.name: item.ByteSize() for item in model.graph.initializer}
    sizes |= {name: table.nbytes for name, table in tables.items()}
    if sum(sizes.values()) >= onnx.checker.MAXIMUM_PROTOBUF:
        largest = max(sizes, key=lambda name: sizes[name])
        raise UnsupportedModelError(
            f"Expected weights of less than 2 GB, the most that an ONNX file holds. Received: "
            f"{sum(sizes.values()) / 1e9:.1f} GB, {sizes[largest] / 1e9:.1f} of them in {largest!r}. Make the table "
            "smaller, or look its rows up before the model."
        )


def _with_independent_layers(marked: onnx.ModelProto) -> onnx.ModelProto:
    model = copy_of(marked)
    for node in model.graph.node:
        if is_op(node, BATCH_LAYER_NORMALIZATION):
            next(item for item in node.attribute if item.name == "policy").s = b"PPMM"
    return model


def _at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    try:
        if opset > CONVERTER_OPSET:
            model = onnx.version_converter.convert_version(model, opset)
            OnnxSession(model.SerializeToString(), threads=1)
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedModelError(
            f"Expected a model that is valid ONNX once it is converted. Received: {error}. A model that computes in "
            "bfloat16 needs a float32 policy."
        ) from error
    except RunError as error:
        raise UsageError(
            f"Expected an opset that the installed ONNX Runtime loads. Received: {opset}. {error}"
        ) from error
    return model
