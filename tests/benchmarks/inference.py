"""One run of the exported ONNX model against the plain tf2onnx conversion and the SavedModel, on one thread."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from support import paper

from bln_serve.export import export, freezing, loading, saved_model
from bln_serve.runtime import OnnxSession

from . import floor
from .timing import side_by_side

MODELS = Path(__file__).parents[2] / "models"
OURS, PLAIN, TENSORFLOW = "bln-export", "plain tf2onnx", "SavedModel in TensorFlow"


@dataclass(frozen=True)
class Subject:
    """A model to time: what it is, under which policy, and at how many rows."""

    name: str
    policy: str
    model: Callable[[str], Any]
    rows: tuple[int, ...]


SUBJECTS = (
    Subject("paper's CNN", "PPPP", lambda policy: paper.under(paper.cnn, policy), (1, 25)),
    Subject("paper's CNN", "PPMM", lambda policy: paper.under(paper.cnn, policy), (1, 25, 256)),
    Subject("paper's CNN", "MMMM", lambda policy: paper.under(paper.cnn, policy), (2, 25, 256)),
    Subject("paper's RNN", "PPMM", lambda policy: paper.under(paper.rnn, policy), (1, 25, 256)),
    Subject("paper's RNN", "MMMM", lambda policy: paper.under(paper.rnn, policy), (2, 25, 256)),
    Subject("digits_cnn", "PPMM", lambda _: loading.load(MODELS / "digits_cnn.keras"), (1, 25, 256)),
    Subject("digits_rnn", "MMMM", lambda _: loading.load(MODELS / "digits_rnn.keras"), (2, 25, 256)),
)


def plain_conversion(model: Any, policy: str) -> bytes:
    """Convert without marking, as any Keras model would be."""
    callee = saved_model.describe(model)
    with freezing.applied(model, freezing.freeze(model, policy)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function = tf.function(callee, input_signature=callee.tensor_specs(), autograph=False)
        converted, _ = tf2onnx.convert.from_function(function, input_signature=callee.tensor_specs(), opset=18)
    return bytes(converted.SerializeToString())


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    machine = floor.machine()
    yield f"One thread of this machine: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s."
    yield ""
    yield "| model | policy | rows | ours, ms | plain tf2onnx takes | SavedModel takes | floor, ms | of it reached |"
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for subject in SUBJECTS:
            yield from _timed(subject, Path(folder), machine)


def _timed(subject: Subject, folder: Path, machine: floor.Machine) -> Iterator[str]:
    model = subject.model(subject.policy)
    artifact = export(model, folder / subject.policy, statistics=subject.policy)
    ours = OnnxSession(artifact.onnx_path, threads=1)
    plain = OnnxSession(plain_conversion(model, subject.policy), threads=1)
    serve = saved_model.read(artifact.path)
    (spec,) = artifact.manifest.signature.inputs
    for size in subject.rows:
        inputs = {spec.name: _draw(spec, size)}
        own, converted = partial(ours.run, inputs), partial(plain.run, inputs)
        turns = {"rounds": 60, "calls": 20} if size < 25 else {"rounds": 40, "calls": 4}
        turns = {"rounds": 12, "calls": 1} if size >= 256 else turns
        # In pairs: TensorFlow's threads go on spinning for a while, which whoever comes next would pay for.
        timing = side_by_side({OURS: own, PLAIN: converted}, **turns)
        beside = side_by_side({OURS: own, TENSORFLOW: partial(serve, inputs)}, **turns)
        ground = floor.work(onnx.load(artifact.onnx_path), size).seconds(machine)
        yield (
            f"| {subject.name} | {subject.policy} | {size} | {timing.median(OURS) * 1e3:.3f} | "
            f"{timing.ratio(PLAIN, OURS):.2f}x | {beside.ratio(TENSORFLOW, OURS):.1f}x | {ground * 1e3:.3f} | "
            f"{ground / timing.median(OURS):.0%} |"
        )


def _draw(spec: Any, rows: int) -> np.ndarray:
    generator = np.random.default_rng(rows)
    shape = (rows, *spec.shape[1:])
    if spec.value_range:
        return generator.integers(*spec.value_range, shape, endpoint=True).astype(spec.dtype)
    low, high = spec.typical_range or (-1, 1)
    return generator.uniform(low, high, shape).astype(spec.dtype)
