"""The names of the reference implementation, as drop-ins: only the import line of code written for it changes."""

from typing import Any

import keras

from bln_serve.layers.batch_layer_normalization import BatchLayerNormalization
from bln_serve.layers.population import PopulationStatistics


@keras.saving.register_keras_serializable(package="bln_serve")
class bln_layer(BatchLayerNormalization):  # noqa: N801 - the reference's name
    """`BatchLayerNormalization` with the reference's arguments.

    Args:
        stateful: kept and ignored. In the reference False left the running sums of one epoch in the next.
        batchsize: m.
        batch_moving_mean: as in `BatchLayerNormalization`, and so are the other flags.
        batch_moving_var: see there.
        feature_moving_mean: see there.
        feature_moving_var: see there.
        **kwargs: as every Keras layer takes, and `epsilon`.
    """

    def __init__(  # noqa: PLR0917 - the reference takes them by position
        self,
        stateful: bool,
        batchsize: int,
        batch_moving_mean: bool = True,
        batch_moving_var: bool = True,
        feature_moving_mean: bool = False,
        feature_moving_var: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            batchsize, batch_moving_mean, batch_moving_var, feature_moving_mean, feature_moving_var, **kwargs
        )
        self.stateful = stateful

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs."""
        config = super().get_config()
        config["batchsize"] = config.pop("batch_size")
        return {**config, "stateful": self.stateful}


# The callback that `fit(..., callbacks=[bln_callback()])` takes; a class there too, so it may be subclassed.
bln_callback = PopulationStatistics
