"""From a Keras model to a verified artifact (extra: export).

    export(model_or_path, out, statistics=...) -> Artifact
    export_onnx(model_or_path, path, statistics=...) -> Manifest      one ONNX file alone

The stages, in order, each importing earlier ones only:

    reading     loading            a model file, safely
                saved_model        the signature, and the SavedModel as TensorFlow Serving reads it
                typical_ranges     where the values of an input are expected to lie
                freezing           the policy of each BLN layer, and whether its stored statistics are usable
    choosing    data               rows from outside
                estimates          what a layer has stored, as arrays
                observing          what goes into each BLN layer while a model answers
                calibration        stored statistics estimated anew
                reference_batch    live statistics frozen at a mini-batch's own
                selection          the search of a policy on validation data
                choosing           which of them, as a caller orders
    marking     calls, marks       a model run layer by layer, and a layer's call as one operation of the graph
                recurrent_layers   recurrent layers as custom ops; recurrent_cells packs their weights
                marking            every BLN layer as one custom op
                tf_to_onnx         what was traced, in ONNX; tf_operators helps the converter
    lowering    recurrent          -> LSTM, GRU, RNN
                layout             Transposes out of the way
                decomposition      Batch Layer Normalization -> standard operators; layer_node reads the custom op
                embedding          -> Gather, and the tables come in
                standard           nothing but the standard's operators is left
                conversion         all of it in order, and what is proved on the way
    verifying   samples            the requests, drawn so that rounding does not hide what is looked for
                probe              what coupling of the rows shows in the answers
                parity             Keras against SavedModel against ONNX
                layer_parity       each BLN layer by itself
    writing     request_rows       how a request's rows are coupled and cut
                making             all of it in order, in one folder
                staging            a version on its way to its place
                deployment         config.pbtxt for Triton
                pipeline           what a caller orders, put in its place
    beside      inspection         what a model file says of its BLN layers, before any of it

What reads an ONNX graph alone needs no TensorFlow, and importing it imports none:

    custom_ops, graphs    the names of our own operators, and what the passes share
    coupling              how a graph couples rows, proved
    index_ranges          which inputs index a table, and with what values
    onnx_file             an ONNX file, read safely and described
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bln_serve.export.pipeline import export, export_onnx

__all__ = ["export", "export_onnx"]

# TensorFlow prints its build's details at import; a person who exports a model has no use for them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

_NEEDED = ("keras", "tensorflow", "tf2onnx")


def __getattr__(name: str) -> Any:
    """Import the export, and with it TensorFlow, when it is asked for.

    Raises:
        MissingExtraError: the packages of the extra are not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra()
    return getattr(import_module("bln_serve.export.pipeline"), name)


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
