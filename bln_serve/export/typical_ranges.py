"""Which integer inputs index an embedding, and with what values.

A negative index is taken from the end of the table by Keras 3 and ONNX, and refused by TensorFlow; one behind the end
fails the whole run. So the range belongs into the signature, where a request is checked before anything runs.
"""

from collections.abc import Iterator
from dataclasses import replace

import keras

from bln_serve.export.saved_model import Callee
from bln_serve.layers.population import layers_of


def with_index_ranges(callee: Callee) -> Callee:
    """Return the callee with the value range, 0 to input_dim - 1, of each input that an Embedding takes directly."""
    rows: dict[str, int] = {}
    for name, size in _indexed_inputs(callee):
        rows[name] = min(size, rows.get(name, size))
    inputs = tuple(
        replace(spec, value_range=(0, rows[spec.name] - 1)) if spec.name in rows else spec
        for spec in callee.signature.inputs
    )
    return replace(callee, signature=replace(callee.signature, inputs=inputs))


def _indexed_inputs(callee: Callee) -> Iterator[tuple[str, int]]:
    """Yield each input that feeds an Embedding, with the number of rows of its table."""
    names = {id(tensor): spec.name for tensor, spec in zip(callee.flat_inputs(), callee.signature.inputs, strict=True)}
    for layer in layers_of(callee.model, keras.layers.Embedding):
        tensors = (tensor for node in layer._inbound_nodes for tensor in node.input_tensors)
        yield from ((names[id(tensor)], layer.input_dim) for tensor in tensors if id(tensor) in names)
