"""From a Keras model to a verified artifact (extra: export).

    export(model_or_path, out, statistics=...) -> Artifact

The stages, in order, each importing earlier ones only:

    loading        a .keras file, safely
    freezing       the policy of each BLN layer, and whether its stored statistics are usable
    saved_model    the signature, and the SavedModel as TensorFlow Serving reads it
    input_ranges   which integer inputs index an embedding
    marking        trace with each BLN layer as one custom op, and convert to ONNX
    decomposition  lower the custom op to standard ops
    deployment     config.pbtxt for Triton
    parity         Keras against SavedModel against ONNX
    pipeline       all of it, written atomically
    inspection     what a model file says of its BLN layers, before any of it
"""

import os

# TensorFlow prints its build's details at import; a person who exports a model has no use for them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:
    import keras  # noqa: F401 - asked for here so that the message below is the first a person sees
    import tensorflow  # noqa: F401
    import tf2onnx  # noqa: F401
except ModuleNotFoundError as error:
    from bln_serve.errors import MissingExtraError

    raise MissingExtraError("bln-export", "export") from error

from bln_serve.export.pipeline import export

__all__ = ["export"]
