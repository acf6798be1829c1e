"""Running a Keras model layer by layer, so that something else may stand in for a layer's call.

Nothing of Keras is changed and nothing is remembered: two threads may run the same model with different stand-ins.
Layers that are called inside another layer's own `call`, as in a subclassed model or a wrapper, are out of reach here
and compute as they are.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras.src.models.functional import Functional

StandIn = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]
"""Takes a layer and the arguments of its call; returns what the call answers, or None to let the layer answer."""


def run(model: Any, inputs: Any, stand_in: StandIn) -> Any:
    """Run inference on tensors, as `model(inputs, training=False)` does.

    Args:
        model: any Keras model; nested functional and Sequential models are entered.
        inputs: as the model takes them.
        stand_in: is asked at each layer's call.

    Returns:
        The outputs, in the model's own structure.
    """
    graph = graph_of(model)
    if graph is None:
        return model(inputs, training=False)
    # Keras's own way through the graph: the order, the arguments and shared layers are its business.
    outputs = graph._run_through_graph(
        graph._standardize_inputs(inputs), operation_fn=lambda operation: _Call(operation, stand_in)
    )
    return outputs[0] if isinstance(outputs, list) and len(outputs) == 1 else outputs


def graph_of(model: Any) -> Any:
    """Return the functional model that a functional or Sequential one is, or None for another."""
    # A subclass may have a call of its own.
    if type(model).call is keras.Sequential.call:
        return model._functional
    return model if type(model).call is Functional.call else None


class _Call:
    """One operation of the graph, to be called in the operation's place."""

    def __init__(self, operation: Any, stand_in: StandIn) -> None:
        self._operation = operation
        self._stand_in = stand_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        operation = self._operation
        # Called with a mask of its own, or by keyword, a nested model computes as it is.
        by_inputs = len(args) == 1 and all(value is None for name, value in kwargs.items() if name != "training")
        if by_inputs and isinstance(operation, keras.Model) and graph_of(operation) is not None:
            return run(operation, args[0], self._stand_in)
        if isinstance(operation, keras.Layer):
            answer = self._stand_in(operation, args, kwargs)
            if answer is not None:
                return answer
            if operation._call_has_training_arg:
                kwargs = {**kwargs, "training": False}
        return operation(*args, **kwargs)
