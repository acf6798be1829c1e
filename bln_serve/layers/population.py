"""The population estimates of a whole model: finding its BLN layers, and starting a new estimate each epoch."""

from typing import Any, TypeVar

import keras

from bln_serve.layers.batch_layer_normalization import BatchLayerNormalization

LayerT = TypeVar("LayerT")


def layers_of(model: Any, kind: type[LayerT]) -> tuple[LayerT, ...]:
    """Return every layer of a kind in a model, at any depth, each once, in the order Keras tracks them."""
    return tuple(layer for layer in model._flatten_layers() if isinstance(layer, kind))


def bln_layers(model: Any) -> tuple[BatchLayerNormalization, ...]:
    """Return every BLN layer of a model, at any depth, each once, in the order Keras tracks them."""
    return layers_of(model, BatchLayerNormalization)


class PopulationStatistics(keras.callbacks.Callback):  # type: ignore[misc]  # keras publishes no types
    """Start a new population estimate at the beginning of each epoch, so that the stored one is the last epoch's.

    The estimate before stays in place until the first training step of the new epoch. Without this callback an
    estimate runs over all training.
    """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - the signature is Keras's
        """Ask every BLN layer to begin anew with its next training step."""
        for layer in bln_layers(self.model):
            if layer.built:
                layer.start_new_estimate.assign(1.0)
