"""Lowering `com.bln::Recurrent` to ONNX's LSTM, GRU and RNN, as a pure function from model to model.

    y, h[, c] = com.bln::Recurrent(x[, h0[, c0]], W, R, B)

    x    (rows, time, features)
    y    (rows, time, d u)      the output of each step
    h    (rows, d u)            the output behind the last step in the order of processing; h0 that before the first
    c    (rows, d u)            an LSTM's carry, likewise; c0
    W    (d, g u, features)     d is 2 where the attribute `direction` is bidirectional, the ways then side by side in
    R    (d, g u, u)            y, h and c, else 1; u is `hidden_size`; g is 4, 3 or 1 by `kind`, gates in the order
    B    (d, 2 g u)             below, first the biases of W, then those of R

With f, g, h the `activations`, x one step and h, c what the step before left, the `kind` says what one step is:

    LSTM    i, o, f = f(x W' + h R' + b_W + b_R)    c' = f * c + i * g(x W' + h R' + b_W + b_R)    h' = o * h(c')
    GRU     z, r = f(x W' + h R' + b_W + b_R)       h' = (1 - z) * n + z * h
            n = g(x W' + b_W + r * (h R' + b_R)) if `linear_before_reset`, else g(x W' + b_W + (r * h) R' + b_R)
    RNN     h' = f(x W' + h R' + b_W + b_R)

These are ONNX's own definitions, and so are `activation_alpha` and `activation_beta`. Beyond them, `reversed_output`
turns y around in time. ONNX's operators want time first, (time, rows, features), and keep d as an axis of its own:

    X = Transpose(x)                                              (time, rows, features)
    Y, Y_h, Y_c = kind(X, W, R, B, , H0, C0)                      (time, d, rows, u), (d, rows, u)
    y = Transpose(Squeeze(Y))                                     where d is 1
    y = Transpose(Reshape(Transpose(Y)))                          where d is 2

Time is first until the last Transpose, so that it undoes the one before a layer behind this one.

Precondition: each node stands in the main graph with its tables as initializers, in float32, and one of its outputs at
least is used. Result: none is left, one LSTM, GRU or RNN stands for each, and no other node is touched.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from bln_serve.export.custom_ops import RECURRENT, attributes_of, is_op
from bln_serve.export.graphs import Emitter, copy_of, replace_nodes, values_used

_TABLES = 3
_PASSED_ON = ("hidden_size", "direction", "activations", "activation_alpha", "activation_beta")


def lower(marked: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every Recurrent node lowered; `marked` is not changed."""
    model = copy_of(marked)
    graph = model.graph
    used = values_used(graph)
    lowered: list[onnx.NodeProto] = []
    for index, node in enumerate(graph.node):
        if not is_op(node, RECURRENT):
            lowered.append(node)
            continue
        layer = _Layer(node, index, used)
        layer.lower()
        lowered += layer.emit.nodes
        graph.initializer.extend(layer.emit.initializers)
    replace_nodes(graph, lowered)
    return model


class _Layer:
    """One node, and what takes its place."""

    def __init__(self, node: onnx.NodeProto, index: int, used: set[str]) -> None:
        self._attributes = attributes_of(node)
        self._kind = self._attributes["kind"]
        self._units = self._attributes["hidden_size"]
        self._both_ways = self._attributes["direction"] == "bidirectional"
        self._inputs = list(node.input)
        self._outputs = [name if name in used else "" for name in node.output]
        self._name = f"{self._attributes['layer']}_{index}/{self._kind}"
        self.emit = Emitter(self._name)

    def lower(self) -> None:
        """Add the operator, with what brings its inputs and outputs into its own layout."""
        x, *states = self._inputs[:-_TABLES]
        x = self.emit("Transpose", x, perm=[1, 0, 2])
        y, *after = self._operator(x, [self._to_ways(state) for state in states])
        if self._outputs[0]:
            self._sequence(y)
            self.emit.nodes[-1].output[0] = self._outputs[0]
        for state, output in zip(after, self._outputs[1:], strict=True):
            if output:
                self._side_by_side(state)
                self.emit.nodes[-1].output[0] = output

    def _operator(self, x: str, states: Sequence[str]) -> list[str]:
        attributes: dict[str, Any] = {name: self._attributes[name] for name in _PASSED_ON if name in self._attributes}
        if self._kind == "GRU":
            attributes["linear_before_reset"] = self._attributes["linear_before_reset"]
        inputs = [x, *self._inputs[-_TABLES:], *(["", *states] if states else [])]
        outputs = [f"{self._name}:{index}" if output else "" for index, output in enumerate(self._outputs)]
        self.emit.nodes.append(helper.make_node(self._kind, inputs, outputs, name=self._name, **attributes))
        return outputs

    def _sequence(self, y: str) -> str:
        """From (time, d, rows, u) to (rows, time, d u)."""
        emit = self.emit
        if self._attributes["reversed_output"]:
            last, beyond_first = emit.integers(-1), emit.integers(np.iinfo(np.int64).min)
            y = emit("Slice", y, last, beyond_first, emit.integers(0), emit.integers(-1))
        if self._both_ways:
            y = emit("Reshape", emit("Transpose", y, perm=[0, 2, 1, 3]), emit.integers(0, 0, 2 * self._units))
        else:
            y = emit("Squeeze", y, emit.integers(1))
        return emit("Transpose", y, perm=[1, 0, 2])

    def _side_by_side(self, state: str) -> str:
        """From (d, rows, u) to (rows, d u)."""
        if not self._both_ways:
            return self.emit("Squeeze", state, self.emit.integers(0))
        state = self.emit("Transpose", state, perm=[1, 0, 2])
        return self.emit("Reshape", state, self.emit.integers(0, 2 * self._units))

    def _to_ways(self, state: str) -> str:
        """From (rows, d u) to (d, rows, u)."""
        if not self._both_ways:
            return self.emit("Unsqueeze", state, self.emit.integers(0))
        state = self.emit("Reshape", state, self.emit.integers(0, 2, self._units))
        return self.emit("Transpose", state, perm=[1, 0, 2])
