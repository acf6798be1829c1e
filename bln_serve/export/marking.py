"""Tracing with each BLN call as one recognisable custom op.

A BLN call becomes one node

    y = com.bln::BatchLayerNormalization(x, gamma, beta, batch_mean, batch_var, feature_mean, feature_var)
        <m, epsilon, w_b, w_f, policy, layer, dtype, rows_per_row>

with the six tables as initializers in float64, from the layer's own weights. x and y have the shape (rows, ..., d).
Feature tables have a row for each slot, or, where the slots are pooled, one for all: nothing but their shape says so.
Recurrent layers and embeddings are marked too, since the converter makes loops of the ones and takes seconds and
gigabytes over the tables of the others:

    y = com.bln::Recurrent(x, ...)          as recurrent_layers says
    y = com.bln::Embedding(ids)             ids of any shape, y with one axis more
        <table, input_dim, output_dim, element_type>    the table goes by its name

No runtime executes such a model: `recurrent`, `embedding` and `decomposition` lower it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bln_serve.errors import UnsupportedModelError
from bln_serve.export import calls, recurrent_layers, tf_to_onnx
from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, DOMAIN, EMBEDDING, TABLES
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.marks import Call, Mark, Recorder, table
from bln_serve.export.saved_model import Callee, require_rows
from bln_serve.layers import BatchLayerNormalization
from bln_serve.layers.batch_layer_normalization import marked_calls
from bln_serve.layers.pooling import pooled

_PROBE_ROWS = 7  # a number that no layer has by chance


@dataclass(frozen=True)
class MarkedModel:
    """A model with custom nodes.

    Attributes:
        model: its graph, without the embeddings' tables.
        tables: these, by name.
        notes: what could not be marked and is left to the plain conversion, a sentence each.
        rows_per_row: how many rows of its own each BLN layer has for one row of a request, by the layer's name.
    """

    model: onnx.ModelProto
    tables: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    rows_per_row: Mapping[str, int] = field(default_factory=dict)


class _Marking:
    """Decides which calls are marked, while a graph is traced."""

    def __init__(self, frozen: Sequence[FrozenLayer], rows_per_row: Mapping[str, int] = MappingProxyType({})) -> None:
        self.recorder = Recorder()
        self.asked: list[Any] = []
        self.fallbacks: dict[str, None] = {}  # in order, each once
        self._frozen = {item.layer: item for item in frozen}
        self._rows_per_row = rows_per_row

    @contextmanager
    def active(self) -> Iterator[None]:
        """Mark the BLN calls of this thread, at any depth."""
        with marked_calls(self._batch_layer_normalization):
            yield

    def stand_in(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Mark the call of a recurrent layer or an embedding, or return None."""
        self.asked.append(layer)
        if isinstance(layer, keras.layers.Embedding):
            return self._embedding(layer, args[0] if args else kwargs["inputs"])
        made = recurrent_layers.call(layer, args, kwargs, self.recorder)
        if isinstance(made, recurrent_layers.Fallback):
            self.fallbacks[made.note(layer.name)] = None
            return None
        return made

    def notes(self, model: Any) -> tuple[str, ...]:
        """Return what was left to the plain conversion, a sentence each."""
        return (*self.fallbacks, *recurrent_layers.unmarked(model, self.asked))

    def _batch_layer_normalization(self, layer: BatchLayerNormalization, x: Any) -> Any:
        x = tf.cast(x, layer.compute_dtype)
        w_b, w_f = layer.branch_weights
        frozen, prefix = self._frozen.get(layer), self.recorder.prefix(layer)
        if frozen is None:
            raise UnsupportedModelError(
                f"Expected every layer to be an attribute of the layer that calls it. Received: {layer.name!r}, which "
                "Keras does not know of. Make it one, so that it is saved too."
            )
        tables = _tables(frozen)
        mark = Mark(
            BATCH_LAYER_NORMALIZATION,
            frozen.name,
            {
                "m": layer.batch_size,
                # Written as text: an ONNX float attribute is float32, and the tables are folded in float64.
                "epsilon": repr(layer.epsilon),
                "w_b": repr(w_b),
                "w_f": repr(w_f),
                "policy": frozen.policy.code,
                "dtype": layer.compute_dtype,
                "rows_per_row": self._rows_per_row.get(frozen.name, 1),
            },
            {f"{prefix}/{name}": tables[name] for name in TABLES},
            tuple(x.shape),
            layer.compute_dtype,
        )
        return self.recorder.mark(x, mark)

    def _embedding(self, layer: Any, ids: Any) -> Any:
        if type(layer).call is not keras.layers.Embedding.call or layer.lora_enabled or layer.quantization_mode:
            return None
        mask = layer.compute_mask(ids)
        if ids.dtype not in (tf.int32, tf.int64):
            ids = tf.cast(ids, tf.int32)
        values = table(layer.embeddings, layer.compute_dtype)
        shape = (*ids.shape, layer.output_dim)
        name = f"{self.recorder.prefix(layer)}/embeddings"
        facts = {
            "table": name,
            "input_dim": layer.input_dim,
            "output_dim": layer.output_dim,
            "element_type": helper.np_dtype_to_tensor_dtype(values.dtype),
        }
        mark = Mark(EMBEDDING, layer.name, facts, {name: values}, shape, layer.compute_dtype)
        y = self.recorder.mark(ids, mark)
        if mask is not None:
            y._keras_mask = mask
        return y


def _tables(item: FrozenLayer) -> Mapping[str, NDArray[np.float64]]:
    layer = item.layer
    values = {"gamma": layer.gamma, "beta": layer.beta, **layer.population}
    tables = {name: table(variable, np.float64) for name, variable in values.items()}
    if item.statistics.pooled:
        steps = table(layer.slot_steps, np.float64)
        tables |= {name: pooled(tables[name], steps) for name in ("feature_mean", "feature_var")}
    return tables


def to_marked_onnx(callee: Callee, frozen: Sequence[FrozenLayer]) -> MarkedModel:
    """Trace a model and convert it to ONNX with one custom node a marked call.

    Args:
        callee: the model, whose layers have their export policies applied.
        frozen: its BLN layers with their policies.

    Returns:
        The marked model. Inputs and outputs are named as in the signature, the batch dimension `rows`.

    Raises:
        UnsupportedModelError: a layer's axis 0 is not made of the request's rows, a BLN call was lost on the way, or
            the converter does not know an operator.
    """
    rows_per_row = _rows_of_layers(callee, frozen)
    marking = _Marking(frozen, rows_per_row)
    function = _traced(callee, marking)
    with marking.active():
        function.get_concrete_function()
    model = tf_to_onnx.convert(function, callee)
    tables = _fill_in(model, marking.recorder.calls)
    return MarkedModel(model, tables, marking.notes(callee.model), rows_per_row)


def _rows_of_layers(callee: Callee, frozen: Sequence[FrozenLayer]) -> Mapping[str, int]:
    """Trace with a known number of rows, and see how many each BLN layer makes of them: as many, or a multiple."""
    marking = _Marking(frozen)
    with marking.active():
        try:
            traced = _traced(callee, marking, _PROBE_ROWS).get_concrete_function()
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever the model's layers raise
            raise UnsupportedModelError(
                f"Expected a model that takes any number of rows. Received: {error} for {_PROBE_ROWS} rows. "
                "If this is about shapes: a stateful recurrent layer, for one, keeps the batch size that it was built "
                "with."
            ) from error
    for name, output in traced.structured_outputs.items():
        require_rows(name, output.shape[0], _PROBE_ROWS)
    shares: dict[str, int] = {}
    for call in marking.recorder.calls:
        if call.mark.op_type != BATCH_LAYER_NORMALIZATION:
            continue
        whole, left = divmod(call.rows or 0, _PROBE_ROWS)
        if left or not whole or shares.setdefault(call.mark.layer, whole) != whole:
            raise UnsupportedModelError(
                f"Expected axis 0 of layer {call.mark.layer!r} to be the request's rows, or the same whole number of "
                f"entries for each. Received: {call.rows} for {_PROBE_ROWS} rows. Move the layer before the reshape."
            )
    return shares


def _traced(callee: Callee, marking: _Marking, rows: int | None = None) -> Any:
    def run(*tensors: Any) -> dict[str, Any]:
        return callee.by_name(calls.run(callee.model, callee.pack(tensors), marking.stand_in))

    return tf.function(run, input_signature=callee.tensor_specs(rows), autograph=False)


def marked_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the custom nodes of the main graph, in order."""
    return [node for node in model.graph.node if node.domain == DOMAIN]


def _fill_in(model: onnx.ModelProto, recorded: Sequence[Call]) -> Mapping[str, NDArray[Any]]:
    """Give each custom node its name, attributes and tables; as many nodes as calls, or a BLN layer was lost.

    Returns:
        The embeddings' tables, which are not put into the model yet.
    """
    nodes = marked_nodes(model)
    found = sorted(helper.get_node_attr_value(node, "call") for node in nodes)
    if found != list(range(len(recorded))):
        raise UnsupportedModelError(
            f"Expected {len(recorded)} marked nodes in the main graph, one a call of a Batch Layer Normalization, "
            f"recurrent or embedding layer. Received: {len(nodes)}, without {_lost(recorded, found)}. A layer inside a "
            "loop, or one whose output is not used, cannot be exported: unroll the loop (unroll=True), or take the "
            "layer out."
        )
    small: dict[str, NDArray[Any]] = {}
    embeddings: dict[str, NDArray[Any]] = {}
    for node in nodes:
        mark = recorded[helper.get_node_attr_value(node, "call")].mark
        node.op_type = mark.op_type
        del node.attribute[:]
        attributes = {"layer": mark.layer, **mark.attributes}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        if mark.op_type == EMBEDDING:
            embeddings.update(mark.tables)
        else:
            node.input.extend(mark.tables)
            small.update(mark.tables)
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in small.items())
    return embeddings


def _lost(recorded: Sequence[Call], found: Sequence[int]) -> str:
    return ", ".join(sorted({repr(call.mark.layer) for index, call in enumerate(recorded) if index not in found}))
