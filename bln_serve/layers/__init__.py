"""Batch Layer Normalization for Keras 3: importing this package registers the layer with Keras (extra: keras).

BatchLayerNormalization        the layer
PopulationStatistics           the callback that starts a new population estimate at each epoch
bln_layers                     every BLN layer of a model, at any depth
with_statistics                the same model under another statistics policy, to evaluate or to train on
bln_layer, bln_callback        the reference implementation's names, as drop-ins
"""

try:
    import keras  # noqa: F401 - asked for here so that the message below is the first a person sees
except ModuleNotFoundError as error:
    from bln_serve.errors import MissingExtraError

    raise MissingExtraError("bln_serve.layers", "keras") from error

from bln_serve.layers.batch_layer_normalization import BatchLayerNormalization
from bln_serve.layers.population import PopulationStatistics, bln_layers
from bln_serve.layers.reference_names import bln_callback, bln_layer
from bln_serve.layers.transform import with_statistics

__all__ = [
    "BatchLayerNormalization",
    "PopulationStatistics",
    "bln_callback",
    "bln_layer",
    "bln_layers",
    "with_statistics",
]
