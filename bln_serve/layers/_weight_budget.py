"""How much a config from a file may make Keras allocate: a bound that is asked before each weight is made."""

import inspect
from math import prod
from typing import Any

import keras

from bln_serve.errors import ModelLoadError
from bln_serve.layers._reference_config import WAY_OUT


class Budget(keras.initializers.Initializer):  # type: ignore[misc]  # keras publishes no types
    """How many numbers the variables of a model may still hold; as an initializer it takes them off and gives zeros."""

    def __init__(self, numbers: int) -> None:
        self.left = numbers

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """Return zeros of a shape that the budget allows."""
        self.take(prod(shape), tuple(shape))
        return keras.ops.zeros(shape, dtype)

    def take(self, numbers: int, shape: Any) -> None:
        """Take numbers off.

        Raises:
            ModelLoadError: there are not so many left.
        """
        if numbers > self.left:
            raise ModelLoadError(
                f"Expected the layers to have the weights that the file stores. Received: a weight of shape {shape}, "
                f"{numbers} numbers where {self.left} are left. {WAY_OUT}"
            )
        self.left -= numbers

    def leave(self, model: Any) -> None:
        """Put Keras's own initializers back in the model's layers, so that it can be saved."""
        for layer in model._flatten_layers():
            for name in [name for name, value in vars(layer).items() if value is self]:
                default = inspect.signature(type(layer).__init__).parameters[name].default
                setattr(layer, name, keras.initializers.get(default))
