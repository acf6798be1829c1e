"""bln-export --select beside the reference's search: the paper's CNN, the 16 policies on 5,000 rows, m = 25.

The reference builds, loads, compiles and evaluates a Keras model for each policy. Both are processes of their own, take
turns, and are timed from their start without their imports: ours until the policies are ranked, and until the best is
exported and verified. Both must find the same losses.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from support import paper

ROWS, TURNS, AT_LEAST = 5_000, 3, 4.0
# Both compute in float32 with other sums: a mean of 5,000 losses of about 3, far within this.
RTOL = 1e-5

_REFERENCE = """
import itertools, json, sys, time
import keras, numpy as np, tensorflow as tf
from bln_serve.layers import BatchLayerNormalization
from support import paper
began = time.monotonic()
with np.load(sys.argv[2]) as data:
    x, y = data["x"], data["y"]
losses = {}
for flags in itertools.product([True, False], repeat=4):
    model = paper.cnn(lambda: BatchLayerNormalization(paper.M, *flags))
    model.load_weights(sys.argv[1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"], jit_compile=False)
    losses["".join("P" if flag else "M" for flag in flags)] = model.evaluate(x, y, batch_size=paper.M, verbose=0)[0]
print(json.dumps({"seconds": time.monotonic() - began, "losses": losses}))
"""


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn of both."""

    reference: float
    ranked: float
    exported: float


def rows() -> Iterator[str]:
    """Yield the lines of the table."""
    with tempfile.TemporaryDirectory() as folder:
        model, weights, data = _prepare(Path(folder))
        turns = [_turn(model, weights, data, f"{folder}/{turn}") for turn in range(TURNS)]
    yield "| | s | the reference's search takes | at least | met |"
    yield "|---|---|---|---|---|"
    yield f"| the reference's search | {_median(turns, 'reference'):.1f} | | | |"
    for name, words in (("ranked", "--select, ranked"), ("exported", "--select, ranked, exported and verified")):
        ratio = statistics.median(turn.reference / getattr(turn, name) for turn in turns)
        target = f"{AT_LEAST:.1f}x | {'yes' if ratio >= AT_LEAST else '**no**'}" if name == "ranked" else "|"
        yield f"| {words} | {_median(turns, name):.1f} | {ratio:.1f}x | {target} |"


def _median(turns: list[Turn], name: str) -> float:
    return statistics.median(getattr(turn, name) for turn in turns)


def _prepare(folder: Path) -> tuple[Path, Path, Path]:
    generator = np.random.default_rng(0)
    data = folder / "validation.npz"
    x = generator.normal(size=(ROWS, 32, 32, 3)).astype(np.float32)
    np.savez(data, x=x, y=generator.integers(0, 10, ROWS))
    model = paper.under(paper.cnn, "MMMM")
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return folder / "model.keras", folder / "model.weights.h5", data


def _turn(model: Path, weights: Path, data: Path, out: str) -> Turn:
    reference = json.loads(_said(sys.executable, "-c", _REFERENCE, str(weights), str(data)).splitlines()[-1])
    command = Path(sys.executable).with_name("bln-export")
    said = _said(str(command), str(model), "--select", str(data), "-o", out)
    stages = re.search(r"took ([0-9.]+) s: (.*)", said)
    assert stages is not None, said
    seconds = {name: float(value) for name, value in re.findall(r"([A-Za-z][A-Za-z' ]*) ([0-9.]+)", stages[2])}
    (ranking,) = Path(out).glob("*/1/selection.json")
    for entry in json.loads(ranking.read_text())["entries"]:
        expected = reference["losses"][entry["policy"]]
        if abs(entry["loss"] - expected) > RTOL * expected:
            raise RuntimeError(f"{entry['policy']}: expected the loss {expected}. Received: {entry['loss']}")
    imports = seconds["importing TensorFlow"]
    until_ranked = list(seconds)[: list(seconds).index("selecting") + 1]
    ranked = sum(seconds[name] for name in until_ranked) - imports
    return Turn(reference["seconds"], ranked, float(stages[1]) - imports)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
