"""A model of make reproduce, exported and served, answers all of CIFAR-10's test images as Keras does.

Needs a finished run (make reproduce) and its data (BLN_DATA). Takes a minute: make test-reproduction.
"""

import asyncio
import io
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from support.server import Server

from bln_serve.artifact import Artifact
from bln_serve.export import export
from bln_serve.export.freezing import applied, freeze
from bln_serve.verification import Tolerance

pytestmark = pytest.mark.reproduction
ROOT = Path(__file__).parents[2]
M, REQUEST_ROWS = 25, 250
DATA = Path(os.environ["BLN_DATA"]) / "cifar10_20pct.npz" if "BLN_DATA" in os.environ else None


@pytest.fixture(scope="module")
def model_file() -> Path:
    found = sorted(ROOT.glob(".reproduction/cifar10_cnn-20pct-m25-same-bln-s*/cifar10_cnn.keras"))
    done = [path for path in found if (path.parent / "history.json").exists()]
    if not done:
        pytest.skip("no finished run of cifar10_cnn with BLN in .reproduction: make reproduce")
    return done[0]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """The test images, (10000, 32, 32, 3), float32 of 0 to 255."""
    if DATA is not None:
        if not DATA.is_file():
            pytest.skip(f"no {DATA.name} in BLN_DATA")
        with np.load(DATA, allow_pickle=False) as data:
            return data["x_test"].astype(np.float32)
    folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets"
    if not list(folder.glob("cifar-10-batches-py*")):
        pytest.skip("no CIFAR-10: name a folder with cifar10_20pct.npz in BLN_DATA")
    return keras.datasets.cifar10.load_data()[1][0].astype(np.float32)


def keras_answers(model_file: Path, policy: str, images: np.ndarray) -> np.ndarray:
    """What Keras's own `predict` answers with the layers under a policy."""
    model = keras.saving.load_model(model_file, compile=False)
    with applied(model, freeze(model, policy)):
        return model.predict(images, batch_size=M, verbose=0)


async def answers_over_http(server: Server, images: np.ndarray) -> np.ndarray:
    """What the service answers to npy requests of 250 rows."""
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
    """How far a row's logits may be off: the artifact's tolerance, of the largest logit of the same request."""
    starts = range(0, len(expected), REQUEST_ROWS)
    return np.concatenate(
        [np.full(len(part), tolerance.limit(part)) for part in (expected[s:][:REQUEST_ROWS] for s in starts)]
    )


def differing(served: np.ndarray, expected: np.ndarray) -> list[tuple[int, float]]:
    """Return the rows whose predictions differ, and how near Keras's two largest logits are to each other there."""
    rows = np.flatnonzero(served.argmax(axis=1) != expected.argmax(axis=1))
    two = np.sort(expected[rows], axis=1)[:, -2:]
    return [(int(row), float(gap)) for row, gap in zip(rows, two[:, 1] - two[:, 0], strict=True)]


def check(served: np.ndarray, expected: np.ndarray, limits: np.ndarray) -> None:
    """See that predictions are the same but where the two largest logits are nearer than both may be moved."""
    beyond = [(row, gap) for row, gap in differing(served, expected) if not gap <= 2 * limits[row]]
    assert not beyond, f"rows with other predictions, and the distance of Keras's two largest logits: {beyond}"


@pytest.mark.parametrize("policy", ["PPMM", "MMMM"])
def test_the_whole_test_set_over_http(policy: str, model_file: Path, images: np.ndarray, tmp_path: Path) -> None:
    made = export(model_file, tmp_path, name="cifar10_cnn", statistics=policy)
    assert isinstance(made, Artifact)
    expected = keras_answers(model_file, policy, images)
    server = Server(str(tmp_path))
    try:
        served = asyncio.run(answers_over_http(server, images))
    finally:
        server.end()
    limits, rows = allowed(made.manifest.tolerance, expected), differing(served, expected)
    farthest = np.abs(served - expected).max(axis=1) / limits
    print(
        f"\n{model_file.parent.name} {policy}: {len(images)} rows, {len(rows)} with another prediction {rows}; a logit "
        f"is at most {np.abs(served - expected).max():.2e} off, {farthest.max():.3f} of what is allowed"
    )
    assert served.shape == expected.shape == (len(images), 10)
    check(served, expected, limits)
    assert farthest.max() <= 1


def test_another_prediction_is_only_let_through_where_logits_are_as_near() -> None:
    expected = np.array([[1.0, 0.5, 0.0], [1.0, 1.0 - 1e-6, 0.0]])
    served = expected[:, [1, 0, 2]]
    assert [row for row, _ in differing(served, expected)] == [0, 1]
    check(served[1:], expected[1:], np.full(1, 1e-5))
    with pytest.raises(AssertionError, match=r"\[\(0, 0\.5\)\]"):
        check(served, expected, np.full(2, 1e-5))
