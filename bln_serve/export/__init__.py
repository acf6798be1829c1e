"""From a Keras model to a verified artifact (extra: export).

    export(model_or_path, out, statistics=...) -> Artifact

The stages, in order, each importing earlier ones only:

    loading        a .keras file, safely
    freezing       the policy of each BLN layer, and whether its stored statistics are usable
    saved_model    the signature, and the SavedModel as TensorFlow Serving reads it
    typical_ranges where the values of an input are expected to lie
    marking        trace with each BLN layer as one custom op, and convert to ONNX
    decomposition  lower the custom op to standard ops
    deployment     config.pbtxt for Triton
    parity         Keras against SavedModel against ONNX
    pipeline       all of it, written atomically
    inspection     what a model file says of its BLN layers, before any of it

What reads an ONNX graph alone needs no TensorFlow, and importing it imports none:

    custom_ops     the names of our own operators
    coupling       how a graph couples rows, proved
    index_ranges   which inputs index a table, and with what values
    onnx_file      an ONNX file, read safely and described
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bln_serve.export.pipeline import export

__all__ = ["export"]

# TensorFlow prints its build's details at import; a person who exports a model has no use for them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_NEEDED = ("keras", "tensorflow", "tf2onnx")


def __getattr__(name: str) -> Any:
    """Import the export, and with it TensorFlow, when it is asked for.

    Raises:
        MissingExtraError: the packages of the extra are not installed.
    """
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra()
    return import_module("bln_serve.export.pipeline").export


def require_extra() -> None:
    """Import what the export of a Keras model needs.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        for package in _NEEDED:
            import_module(package)
    except ModuleNotFoundError as error:
        from bln_serve.errors import MissingExtraError  # noqa: PLC0415 - asked for when all else is missing

        raise MissingExtraError("bln-export", "export") from error
