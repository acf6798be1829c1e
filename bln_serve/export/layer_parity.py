"""Every BLN layer by itself, lowered against Keras's, on rows that hardly differ from each other.

There a live variance is no larger than epsilon, so that a wrong epsilon or a variance taken in one pass shows in full:
left at ONNX's own 1e-5, LayerNormalization's epsilon moves the answers of a layer with m = 256 by 3e-6 of the largest
on standardised inputs, which passes, and by 6e-4 here. A whole model cannot be asked there: it raises the rounding of
everything before its layers as well (`samples`). One layer alone keeps the two apart to 4e-6.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import helper

from bln_serve.export.custom_ops import BATCH_LAYER_NORMALIZATION, attributes_of, is_op
from bln_serve.export.decomposition import decompose
from bln_serve.export.freezing import FrozenLayer
from bln_serve.export.graphs import tables_of
from bln_serve.export.samples import SEED
from bln_serve.export.standard import require_standard
from bln_serve.runtime import OnnxSession
from bln_serve.verification import Check, Tolerance, compare

# Far enough from 0 to show a variance of one pass, near enough that two passes lose no more than a third of 1e-5.
_MEAN, _DEVIATION = 2.0, 0.05
_MOST_ROWS = 32


def verify(marked: onnx.ModelProto, frozen: Sequence[FrozenLayer], tolerance: Tolerance) -> Iterable[Check]:
    """Compare each layer's lowered node with the layer.

    Args:
        marked: the model with custom nodes.
        frozen: its BLN layers, which have their export policies applied.
        tolerance: how far an answer may be off.

    Returns:
        One check a layer.
    """
    layers = {item.name: item.layer for item in frozen}
    for node in marked.graph.node:
        if not is_op(node, BATCH_LAYER_NORMALIZATION) or attributes_of(node)["layer"] not in layers:
            continue
        name = attributes_of(node)["layer"]
        layer = layers.pop(name)
        rows = min(layer.batch_size, _MOST_ROWS) if layer.batch_size > 1 else 2
        shape = layer.population["batch_mean"].shape[1:]
        x = np.random.default_rng(SEED).normal(_MEAN, _DEVIATION, (rows, *shape)).astype(layer.compute_dtype)
        answer = OnnxSession(_alone(marked, node, shape).SerializeToString(), threads=1).run({"x": x})["y"]
        yield compare(f"ONNX: {name} alone, rows alike", np.asarray(layer(x)), answer, tolerance)


def _alone(marked: onnx.ModelProto, node: onnx.NodeProto, shape: Sequence[int]) -> onnx.ModelProto:
    """Return a model that is one lowered layer."""
    tables = tables_of(marked.graph)
    lone = onnx.NodeProto()
    lone.CopyFrom(node)
    lone.input[0], lone.output[0] = "x", "y"
    for attribute in lone.attribute:
        if attribute.name == "rows_per_row":
            attribute.i = 1  # its rows are the model's own here
    element = helper.np_dtype_to_tensor_dtype(np.dtype(attributes_of(node)["dtype"]))
    x, y = (helper.make_tensor_value_info(name, element, ["rows", *shape]) for name in "xy")
    graph = helper.make_graph([lone], "layer", [x], [y], [tables[name] for name in node.input[1:]])
    model = helper.make_model(graph, opset_imports=marked.opset_import, ir_version=marked.ir_version)
    lowered = decompose(model)
    require_standard(lowered)
    return lowered
