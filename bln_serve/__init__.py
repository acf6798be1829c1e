"""Inference export and serving for Keras models that use Batch Layer Normalization (arXiv 2209.08898).

bln_serve.load(path).predict(x)     answers as the Keras model would, without TensorFlow
bln_serve.layers                    the Keras layer and its callback        (extra: keras)
bln_serve.export                    .keras -> SavedModel, ONNX, manifest    (extra: export)
bln_serve.serving                   the HTTP service                        (extra: serve)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bln_serve.runtime import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # ONNX Runtime takes half a second to import: training code, which needs only the layer, does not pay for it.
    if name == "load":
        from bln_serve.runtime import load  # noqa: PLC0415 - see above

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
