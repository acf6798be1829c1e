"""One call of a layer as one operation of the traced graph, that the converter makes one custom node.

While the graph is traced a marked call becomes one `PyFuncStateless` operation, which TensorFlow carries through
freezing and optimisation untouched, and whose string attribute says which call it is. What the node needs beside its
input, attributes and tables, is kept here and put into the ONNX model later: no optimiser ever touches it, and a large
table never passes through the converter.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

Attribute = int | str | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class Mark:
    """What a custom node says.

    Attributes:
        op_type: in the domain `com.bln`.
        layer: the Keras layer's name.
        attributes: of the node, beside `layer`.
        tables: by a name of their own, in the order of the node's inputs behind the tensors.
        shape: of the output, None for the rows.
        dtype: of the output.
        more_shapes: of further outputs, in the same dtype.
    """

    op_type: str
    layer: str
    attributes: Mapping[str, Attribute]
    tables: Mapping[str, NDArray[Any]] = field(repr=False)
    shape: tuple[int | None, ...]
    dtype: str
    more_shapes: tuple[tuple[int | None, ...], ...] = ()


@dataclass(frozen=True)
class Call:
    """One marked call.

    Attributes:
        mark: what its node says.
        rows: the length of its first input's axis 0 while it was traced, or None if that was open.
    """

    mark: Mark
    rows: int | None


class Recorder:
    """Marks calls while a graph is traced, and remembers them in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._prefixes: dict[str, Any] = {}  # the layers themselves: an id alone may be given away again

    def mark(self, x: Any, mark: Mark) -> Any:
        """Return the tensor that stands for a layer's answer to x."""
        return self.mark_all([x], mark)[0]

    def mark_all(self, inputs: Sequence[Any], mark: Mark) -> tuple[Any, ...]:
        """Return the tensors that stand for a layer's answers to several; the rows are the first one's."""
        # The index makes each call's token its own: equal stateless operations would be merged into one.
        token = json.dumps({"call": len(self.calls)})
        rows = inputs[0].shape[0]
        self.calls.append(Call(mark, rows))
        shapes = (mark.shape, *mark.more_shapes)
        outputs = tf.raw_ops.PyFuncStateless(input=list(inputs), token=token, Tout=[mark.dtype] * len(shapes))
        return tuple(tf.ensure_shape(y, (rows, *shape[1:])) for y, shape in zip(outputs, shapes, strict=True))

    def prefix(self, layer: Any) -> str:
        """Return a name for a layer's tables, the same at each of its calls and no other layer's.

        Layers of different nested models may have the same path.
        """
        name, number = str(layer.path), 1
        while self._prefixes.setdefault(name, layer) is not layer:
            number += 1
            name = f"{layer.path}_{number}"
        return name


def call_index(token: str) -> int:
    """Return which call a marked operation is."""
    return int(json.loads(token)["call"])


def table(variable: Any, dtype: Any) -> NDArray[Any]:
    """Return a Keras variable's values, also while a graph is traced."""
    with tf.init_scope():
        return np.asarray(variable.numpy(), dtype)
