"""Serve a model of make reproduce over HTTP and compare all of CIFAR-10's test images with Keras. Takes a minute.

BLN_DATA=... PYTHONPATH=tests python -m reproduction.served

results/served/NAME-POLICY.json     how many predictions differ, and how far the logits are apart
"""

import argparse
import asyncio
import datetime
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
from support.server import Server

import bln_serve
from bln_serve.artifact import Artifact
from bln_serve.export import export
from bln_serve.export.freezing import applied, freeze
from bln_serve.verification import Tolerance

from .runs import FILES, KEPT, RESULTS

POLICIES = ("PPMM", "MMMM")
M, REQUEST_ROWS = 25, 250


def model_file() -> Path | None:
    """Return the model of the first finished run, in the paper's order, or None."""
    found = sorted(KEPT.glob("cifar10_cnn-20pct-m25-same-bln-s*/cifar10_cnn.keras"))
    return next((path for path in found if (path.parent / "history.json").exists()), None)


def test_set(folder: Path | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the test images, (10000, 32, 32, 3) float32 of 0 to 255, and labels, (10000,); None if they are not there.

    Args:
        folder: with cifar10_20pct.npz; None for what keras.datasets has downloaded.
    """
    if folder is not None:
        path = folder / FILES["cifar10_cnn"]
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as data:
            return data["x_test"].astype(np.float32), data["y_test"].reshape(-1)
    downloaded = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets"
    if not list(downloaded.glob("cifar-10-batches-py*")):
        return None
    x, y = keras.datasets.cifar10.load_data()[1]
    return x.astype(np.float32), y.reshape(-1)


def keras_answers(model_file: Path, policy: str, images: np.ndarray) -> np.ndarray:
    """Return what Keras's own `predict` answers with the layers under a policy."""
    model = keras.saving.load_model(model_file, compile=False)
    with applied(model, freeze(model, policy)):
        return model.predict(images, batch_size=M, verbose=0)


def served_answers(model_file: Path, policy: str, images: np.ndarray) -> tuple[np.ndarray, Tolerance]:
    """Export under a policy, serve, and return what npy requests of 250 rows get, with the artifact's tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        made = export(model_file, folder, name="cifar10_cnn", statistics=policy)
        assert isinstance(made, Artifact)
        server = Server(folder)
        try:
            return asyncio.run(_over_http(server, images)), made.manifest.tolerance
        finally:
            server.end()


async def _over_http(server: Server, images: np.ndarray) -> np.ndarray:
    headers = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
    found = []
    async with server.client() as client:
        await server.wait_until_ready(client)
        for start in range(0, len(images), REQUEST_ROWS):
            body = io.BytesIO()
            np.save(body, images[start : start + REQUEST_ROWS])
            answer = await client.post("/predict", content=body.getvalue(), headers=headers)
            assert answer.status_code == 200, answer.text
            found.append(np.load(io.BytesIO(answer.content), allow_pickle=False))
    return np.concatenate(found)


def allowed(tolerance: Tolerance, expected: np.ndarray) -> np.ndarray:
    """Return how far a row's logits may be off: the tolerance, of the largest logit of the same request."""
    starts = range(0, len(expected), REQUEST_ROWS)
    return np.concatenate(
        [np.full(len(part), tolerance.limit(part)) for part in (expected[s:][:REQUEST_ROWS] for s in starts)]
    )


def differing(served: np.ndarray, expected: np.ndarray) -> list[tuple[int, float]]:
    """Return the rows whose predictions differ, and how near Keras's two largest logits are to each other there."""
    rows = np.flatnonzero(served.argmax(axis=1) != expected.argmax(axis=1))
    two = np.sort(expected[rows], axis=1)[:, -2:]
    return [(int(row), float(gap)) for row, gap in zip(rows, two[:, 1] - two[:, 0], strict=True)]


def compare(policy: str, served: np.ndarray, expected: np.ndarray, labels: np.ndarray, limits: np.ndarray) -> Any:
    """Return what results/served holds of a policy."""
    off = np.abs(served - expected).max(axis=1)
    right = {"keras": expected, "http": served}
    return {
        "policy": policy,
        "rows": len(labels),
        "accuracy": {name: float((logits.argmax(axis=1) == labels).mean()) for name, logits in right.items()},
        "differing": differing(served, expected),
        "largest_logit_difference": float(off.max()),
        "of_the_tolerance": float((off / limits).max()),
    }


def carry_out(path: Path, policy: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare one policy's answers, and write what was found."""
    expected = keras_answers(path, policy, images)
    served, tolerance = served_answers(path, policy, images)
    found = {"name": path.parent.name, **compare(policy, served, expected, labels, allowed(tolerance, expected))}
    versions = {each.__name__: each.__version__ for each in (bln_serve, keras, np, onnxruntime, tf)}
    found["versions"] = {"python": platform.python_version(), **versions}
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    target = RESULTS / "served" / f"{path.parent.name}-{policy}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare under both policies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("BLN_DATA"), metavar="DIR")
    folder = parser.parse_args(arguments).data
    path, rows = model_file(), test_set(Path(folder) if folder else None)
    if path is None or rows is None:
        parser.error(
            "Expected a finished run of cifar10_cnn with BLN, and its data (--data, BLN_DATA). Received: "
            f"{'no run' if path is None else 'no data'}. Train it first: make reproduce."
        )
    for policy in POLICIES:
        found = carry_out(path, policy, *rows)
        print(f"{policy}: {len(found['differing'])} other predictions of {found['rows']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
