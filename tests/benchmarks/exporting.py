"""The export of the paper's full RNN as a process: seconds beyond importing TensorFlow, and its peak of memory.

Beside it the plain way to a SavedModel and an ONNX file, which verifies nothing: model.export and tf2onnx.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import paper

_PLAIN = """
import time, sys, warnings
warnings.simplefilter("ignore")
import keras, tensorflow as tf, tf2onnx, bln_serve.layers
began = time.monotonic()
model = keras.saving.load_model(sys.argv[1], compile=False)
model.export(sys.argv[2], verbose=False)
spec = [tf.TensorSpec((None, *x.shape[1:]), x.dtype, name=x.name) for x in model.inputs]
function = tf.function(lambda x: model(x, training=False), input_signature=spec, autograph=False)
tf2onnx.convert.from_function(function, input_signature=spec, opset=18, output_path=sys.argv[2] + ".onnx")
print(f"took {time.monotonic() - began:.1f}")
"""


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds beyond its imports, and the most memory it held, in GB."""

    seconds: float
    peak_gb: float


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| policy | bln-export, verified, s | peak, GB | model.export and tf2onnx, unverified, s | peak, GB |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for policy in ("PPMM", "MMMM"):
            path = Path(folder) / f"{policy}.keras"
            paper.under(paper.rnn, policy).save(path)
            command = Path(sys.executable).with_name("bln-export")
            ours = _run(str(command), str(path), "-o", folder)
            plain = _run(sys.executable, "-c", _PLAIN, str(path), f"{folder}/plain_{policy}")
            yield (
                f"| {policy} | {ours.seconds:.1f} | {ours.peak_gb:.2f} | {plain.seconds:.1f} | {plain.peak_gb:.2f} |"
            )


def _run(*command: str) -> Cost:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"Expected {command[0]} to succeed. Received: exit code {process.returncode}.")
    whole = re.search(r"took ([0-9.]+)", said)
    imports = re.search(r"importing TensorFlow ([0-9.]+)", said)
    assert whole is not None, said
    return Cost(float(whole[1]) - (float(imports[1]) if imports else 0.0), usage.ru_maxrss * 1024 / 1e9)
