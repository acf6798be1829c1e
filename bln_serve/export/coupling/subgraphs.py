"""Loop, Scan and If: a body is followed until what is known of its carried tensors no longer changes.

A loop must run equally often whatever the rows are, and an If must decide without them: else a row's answer depends on
when the others are done. Bodies read tensors of the graphs around them without naming them as inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx

from bln_serve.export.coupling.calls import NodeCall, normal
from bln_serve.export.coupling.sizes import Size
from bln_serve.export.coupling.states import Cause, Tensor, UnprovedError, join, lost

Run = Callable[[onnx.GraphProto, Sequence[Tensor]], list[Tensor]]
"""Follows a body from its inputs to its outputs."""

_NUMBER = Tensor(onnx.TensorProto.INT64, ())
_FLAG = Tensor(onnx.TensorProto.BOOL, ())


def loop(call: NodeCall, run: Run, cause: Cause) -> list[Tensor]:
    """Follow a Loop(trip count, condition, carried...) to its last carried tensors and what it collects.

    Raises:
        UnprovedError: how often it runs may depend on the rows.
    """
    body: onnx.GraphProto = call.attributes["body"]
    if any(tensor is not None and not tensor.is_constant for tensor in call.inputs[:2]):
        raise UnprovedError("runs as often as the rows say")
    states = [call.input(index) for index in range(2, len(call.inputs))]
    states, (condition, *collected) = _settle(states, lambda carried: run(body, [_NUMBER, _FLAG, *carried]), cause, 1)
    if not condition.is_constant:
        raise UnprovedError("goes on until the rows say otherwise")
    return states + [_stacked(each, 0) for each in collected]


def scan(call: NodeCall, run: Run, cause: Cause) -> list[Tensor]:
    """Follow a Scan(carried..., scanned...).

    Raises:
        UnprovedError: it runs along the rows.
    """
    if call.version < 9:
        raise UnprovedError("is of a version with a batch axis of its own")
    body: onnx.GraphProto = call.attributes["body"]
    count = call.attributes["num_scan_inputs"]
    tensors = [call.input(index) for index in range(len(call.inputs))]
    states, scanned = tensors[: len(tensors) - count], tensors[len(tensors) - count :]
    axes = call.attributes.get("scan_input_axes") or [0] * count
    steps = [_step(tensor, normal(axis, tensor.rank)) for tensor, axis in zip(scanned, axes, strict=True)]
    states, collected = _settle(states, lambda carried: run(body, [*carried, *steps]), cause, 0)
    places = call.attributes.get("scan_output_axes") or [0] * len(collected)
    return states + [
        _stacked(each, place if place >= 0 else place + each.rank + 1)
        for each, place in zip(collected, places, strict=True)
    ]


def branch(call: NodeCall, run: Run, cause: Cause) -> list[Tensor]:
    """Follow both branches of an If, or the one that is taken where that is known.

    Raises:
        UnprovedError: rows decide.
    """
    condition = call.input(0)
    if not condition.is_constant:
        raise UnprovedError("decides by the rows")
    numbers = condition.numbers
    if numbers is not None and len(numbers) == 1:
        return run(call.attributes["then_branch" if numbers[0] else "else_branch"], [])
    then, otherwise = (run(call.attributes[name], []) for name in ("then_branch", "else_branch"))
    return [join(*pair, cause) for pair in zip(then, otherwise, strict=True)]


def _settle(
    states: list[Tensor], run: Callable[[list[Tensor]], list[Tensor]], cause: Cause, ahead: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Follow a body until the carried tensors are what they were before it.

    Args:
        states: the carried tensors before the first round.
        run: follows the body.
        cause: what to blame where a carried tensor does not keep its layout.
        ahead: how many outputs of the body stand ahead of the carried ones.

    Returns:
        The carried tensors, and the other outputs.
    """
    states = [replace(state, array=None) for state in states]
    while True:
        outputs = run(states)
        carried = outputs[ahead : ahead + len(states)]
        joined = [join(*pair, cause) for pair in zip(states, carried, strict=True)]
        if joined == states:
            return joined, outputs[:ahead] + outputs[ahead + len(states) :]
        states = joined


def _step(tensor: Tensor, axis: int) -> Tensor:
    """Return one step of a scanned tensor."""
    if tensor.axis == axis:
        raise UnprovedError("runs along the row axis")
    place = None if tensor.axis is None else tensor.axis - (axis < tensor.axis)
    dims = tensor.sizes[:axis] + tensor.sizes[axis + 1 :]
    return replace(tensor, dims=dims, axis=place, values=None, array=None)


def _stacked(tensor: Tensor, axis: int) -> Tensor:
    """Return what the rounds collect, on a new axis."""
    if tensor.dims is None or tensor.is_sequence:
        return (
            tensor if tensor.is_lost else lost(tensor.cause or Cause("a loop collects what has no shape", tensor.trail))
        )
    length: Size | None = None
    dims = (*tensor.dims[:axis], length, *tensor.dims[axis:])
    place = None if tensor.axis is None else tensor.axis + (axis <= tensor.axis)
    return replace(tensor, dims=dims, axis=place, values=None, array=None)
