"""The weights and activations of Keras's recurrent cells, as ONNX's operators want them.

A cell's gates lie side by side in its kernel (features, g u), recurrent kernel (u, g u) and bias, u units each. ONNX
wants them one below the other, W (directions, g u, features), R (directions, g u, u), B (directions, 2 g u), the
biases of x W above those of h R, and some in another order:

                Keras         ONNX          Keras's bias     B
    LSTM        i, f, c, o    i, o, f, c    (4u,)            bias, 0
    GRU         z, r, h       z, r, h       (2, 3u)          bias[0], bias[1]    reset_after: r * (h R + bias[1])
                                            (3u,)            bias, 0             else: (r * h) R
    SimpleRNN   h             h             (u,)             bias, 0

A direction's activations are the recurrent activation for the gates, then the activation for the candidate and, in an
LSTM, for the output. Dropout does nothing at inference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from bln_serve.export.marks import Attribute, table


@dataclass(frozen=True)
class Kind:
    """What ONNX makes of a cell.

    Attributes:
        op_type: the operator, also the node's `kind`.
        gates: in ONNX's order, as indices into Keras's.
        states: how many it carries from step to step.
        activations: the cell's attributes, in ONNX's order.
    """

    op_type: str
    gates: tuple[int, ...]
    states: int
    activations: tuple[str, ...]


KINDS: Mapping[Any, Kind] = {
    keras.layers.LSTMCell: Kind("LSTM", (0, 3, 1, 2), 2, ("recurrent_activation", "activation", "activation")),
    keras.layers.GRUCell: Kind("GRU", (0, 1, 2), 1, ("recurrent_activation", "activation")),
    keras.layers.SimpleRNNCell: Kind("RNN", (0,), 1, ("activation",)),
}
"""By the cell's class. What is not Keras's own may compute something else."""


@dataclass(frozen=True)
class _Activation:
    """An activation by ONNX's name, with the parameters that it has there."""

    name: str
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()


# What is missing ONNX does not have inside a recurrent operator; and softplus, whose exponential ONNX Runtime takes
# there without a limit, so that it answers NaN from 89 on.
_ACTIVATIONS: Mapping[Any, _Activation] = {
    keras.activations.tanh: _Activation("Tanh"),
    keras.activations.sigmoid: _Activation("Sigmoid"),
    keras.activations.relu: _Activation("Relu"),
    keras.activations.leaky_relu: _Activation("LeakyRelu", (0.2,)),
    keras.activations.elu: _Activation("Elu", (1.0,)),
    keras.activations.softsign: _Activation("Softsign"),
    keras.activations.hard_sigmoid: _Activation("HardSigmoid", (1 / 6,), (0.5,)),
    keras.activations.linear: _Activation("Affine", (1.0,), (0.0,)),
}


def unknown_activation(cell: Any) -> str | None:
    """Return the name of an activation that ONNX Runtime's operator cannot have, if the cell has one."""
    for function in _functions(cell):
        if _activation(function) is None:
            return str(getattr(function, "__name__", type(function).__name__))
    return None


def alike(cell: Any, other: Any) -> bool:
    """Whether one ONNX operator can be both cells, one for each direction."""
    facts = [(type(each), each.units, getattr(each, "reset_after", False)) for each in (cell, other)]
    return facts[0] == facts[1]


def attributes_of(cells: Sequence[Any]) -> dict[str, Attribute]:
    """Return what a node says of its cells, one for each direction, all alike."""
    found = [_activation(function) for cell in cells for function in _functions(cell)]
    known = [each for each in found if each]
    parameters: dict[str, Attribute] = {
        "activation_alpha": [value for each in known for value in each.alpha],
        "activation_beta": [value for each in known for value in each.beta],
    }
    return {
        "kind": KINDS[type(cells[0])].op_type,
        "hidden_size": cells[0].units,
        "linear_before_reset": int(getattr(cells[0], "reset_after", False)),
        "activations": [each.name for each in known],
        **{name: values for name, values in parameters.items() if values},
    }


def tables_of(cells: Sequence[Any], dtype: str) -> dict[str, NDArray[Any]]:
    """Return W, R and B of a node's cells, one for each direction, all alike."""
    packed = zip(*(_packed(cell, dtype) for cell in cells), strict=True)
    return {name: np.stack(each) for name, each in zip("WRB", packed, strict=True)}


def _functions(cell: Any) -> list[Any]:
    return [getattr(cell, name) for name in KINDS[type(cell)].activations]


def _activation(function: Any) -> _Activation | None:
    # Not by hash, which a function of somebody's own need not have.
    return next((known for each, known in _ACTIVATIONS.items() if each is function), None)


def _packed(cell: Any, dtype: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return a cell's W (g u, features), R (g u, u) and B (2 g u,)."""
    kernel, recurrent_kernel = table(cell.kernel, dtype), table(cell.recurrent_kernel, dtype)
    biases = np.zeros((2, kernel.shape[1]), dtype)
    if cell.bias is not None:
        bias = np.atleast_2d(table(cell.bias, dtype))
        biases[: len(bias)] = bias
    order = KINDS[type(cell)].gates
    halves = [_in_order(bias, order) for bias in biases]
    return _in_order(kernel.T, order), _in_order(recurrent_kernel.T, order), np.concatenate(halves)


def _in_order(values: NDArray[Any], gates: Sequence[int]) -> NDArray[Any]:
    blocks = np.split(values, len(gates))
    return np.concatenate([blocks[gate] for gate in gates])
