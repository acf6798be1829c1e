"""One run of the exported ONNX model against the plain tf2onnx conversion and the SavedModel, on one thread."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf2onnx

from bln_serve.export import export, freezing, loading, saved_model
from bln_serve.runtime import OnnxSession

from .timing import side_by_side

MODELS = Path(__file__).parents[2] / "models"
ROWS = {"digits_cnn": (1, 25, 256), "digits_rnn": (2, 25, 256)}
OURS, PLAIN, TENSORFLOW = "bln-export", "plain tf2onnx", "SavedModel in TensorFlow"


def plain_conversion(path: Path) -> bytes:
    """Convert without marking, as any Keras model would be."""
    model = loading.load(path)
    callee = saved_model.describe(model)
    with freezing.applied(model, freezing.freeze(model, None)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = tf.function(callee, input_signature=callee.tensor_specs(), autograph=False)
        converted, _ = tf2onnx.convert.from_function(function, input_signature=callee.tensor_specs(), opset=18)
    return bytes(converted.SerializeToString())


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| model | rows | bln-export, ms | plain tf2onnx takes | SavedModel in TensorFlow takes |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in ROWS.items():
            path = MODELS / f"{name}.keras"
            artifact = export(path, folder)
            ours = OnnxSession(artifact.onnx_path, threads=1)
            plain = OnnxSession(plain_conversion(path), threads=1)
            serve = saved_model.read(artifact.path)
            for size in sizes:
                x = np.random.default_rng(size).uniform(0, 16, (size, 8, 8)).astype(np.float32)
                contestants = {
                    OURS: lambda x=x, ours=ours: ours.run({"image": x}),
                    PLAIN: lambda x=x, plain=plain: plain.run({"image": x}),
                    TENSORFLOW: lambda x=x, serve=serve: serve(image=tf.constant(x)),
                }
                timing = side_by_side(contestants, rounds=40, calls=5)
                yield (
                    f"| {name} | {size} | {timing.median(OURS) * 1e3:.3f} | {timing.ratio(PLAIN, OURS):.2f}x | "
                    f"{timing.ratio(TENSORFLOW, OURS):.1f}x |"
                )
