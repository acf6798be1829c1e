"""Recurrent layers from their equations, in float64: an oracle that shares no code with what it checks.

Its weights are named gate by gate, so that neither Keras's order nor ONNX's is built in. And models to check.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bln_serve.export import freezing, marking, saved_model

GATES = {"LSTM": "ifco", "GRU": "zrh", "RNN": "h"}  # in Keras's order
ONNX_GATES = {"LSTM": "iofc", "GRU": "zrh", "RNN": "h"}

Function = Callable[[np.ndarray], np.ndarray]

FUNCTIONS: Mapping[str, Function] = {
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "linear": lambda x: x,
}


@dataclass(frozen=True)
class Gate:
    """One gate: W (features, u), R (u, u), and the biases of x W and h R (u,)."""

    W: np.ndarray
    R: np.ndarray
    b_w: np.ndarray
    b_r: np.ndarray


@dataclass(frozen=True)
class Answer:
    """y (rows, time, u) in the order of processing, h and an LSTM's c behind the last step (rows, u)."""

    y: np.ndarray
    h: np.ndarray
    c: np.ndarray | None = None


def of_cell(kind: str, cell: Any) -> dict[str, Gate]:
    """Take a Keras cell's weights apart."""
    names, u = GATES[kind], cell.units
    kernel, recurrent = cell.kernel.numpy().astype(float), cell.recurrent_kernel.numpy().astype(float)
    bias = np.zeros((2, len(names) * u))
    if cell.bias is not None:
        given = cell.bias.numpy().astype(float)
        bias = given if given.ndim == 2 else np.stack([given, 0 * given])
    gates = {}
    for i, name in enumerate(names):
        part = slice(i * u, (i + 1) * u)
        gates[name] = Gate(kernel[:, part], recurrent[:, part], bias[0, part], bias[1, part])
    return gates


def of_onnx(kind: str, W: np.ndarray, R: np.ndarray, B: np.ndarray) -> dict[str, Gate]:  # noqa: N803
    """Take the weights of one direction of an ONNX operator apart."""
    names = ONNX_GATES[kind]
    parts = zip(
        *(np.split(each.astype(float), len(names)) for each in (W, R, B[: len(W)], B[len(W) :])),
        strict=True,
    )
    return {name: Gate(w.T, r.T, b_w, b_r) for name, (w, r, b_w, b_r) in zip(names, parts, strict=True)}


def run(
    kind: str,
    gates: Mapping[str, Gate],
    x: np.ndarray,
    *,
    backwards: bool = False,
    reset_after: bool = True,
    f: Function = FUNCTIONS["sigmoid"],
    g: Function = FUNCTIONS["tanh"],
    h: np.ndarray | None = None,
    c: np.ndarray | None = None,
) -> Answer:
    """Run x (rows, time, features) step by step; f is the activation of the gates, g that of the rest."""
    zeros = np.zeros((len(x), next(iter(gates.values())).R.shape[0]))
    h, c = zeros if h is None else h, zeros if c is None else c
    steps = []
    for x_t in np.swapaxes(x.astype(float), 0, 1)[:: -1 if backwards else 1]:
        from_x = {name: x_t @ gate.W + gate.b_w for name, gate in gates.items()}
        from_h = {name: h @ gate.R + gate.b_r for name, gate in gates.items()}
        z = {name: from_x[name] + from_h[name] for name in gates}
        if kind == "LSTM":
            c = f(z["f"]) * c + f(z["i"]) * g(z["c"])
            h = f(z["o"]) * g(c)
        elif kind == "GRU":
            r, gate = f(z["r"]), gates["h"]
            candidate = from_x["h"] + (r * from_h["h"] if reset_after else (r * h) @ gate.R + gate.b_r)
            h = f(z["z"]) * h + (1 - f(z["z"])) * g(candidate)
        else:
            h = g(z["h"])
        steps.append(h)
    return Answer(np.stack(steps, axis=1), h, c if kind == "LSTM" else None)


def with_random_weights(model: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """Give a model random weights and biases, all different, that neither vanish nor explode over time."""
    generator = np.random.default_rng(seed)
    for variable in model.trainable_weights:
        deviation = 0.5 if "bias" in variable.path else 1 / np.sqrt(variable.shape[0])
        variable.assign(generator.normal(0, scale * deviation, variable.shape))
    return model


def exported(model: Any) -> tuple[Any, Any]:
    """Return a model's signature and its marked form."""
    callee = saved_model.describe(model)
    return callee, marking.to_marked_onnx(callee, freezing.freeze(model, None))
