"""The gate of bln-verify: alter every stored tensor of model.onnx in turn, and see whether replaying notices.

Hashes are made right each time, so that nothing but the answers can tell. The artifacts are golden ones, and ones that
are exported now.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import models
from support.artifacts import NAMES, copy_of, rehash

from bln_serve.artifact import ONNX_MODEL, Artifact
from bln_serve.errors import RunError
from bln_serve.export import export
from bln_serve.export.samples import Spread, draw
from bln_serve.manifest import MINI_BATCHES, Manifest
from bln_serve.runtime import Model, replay
from bln_serve.signature import Arrays
from bln_serve.verification import VerificationReport, compare_all

ROOT = Path(__file__).parents[2]

# Of the fresh inputs of each seed: as the samples' and, for the digits, as bright as an image.
SPREADS = {11: Spread(0.0, 1.0), 12: Spread(0.5, 2.0), 13: Spread(8.0, 6.0)}

# What is exported now: recurrent operators and the input `mini_batches`, live statistics and slots.
FRESH: dict[str, Callable[[], Any]] = {
    "digits_rnn": lambda: ROOT / "models" / "digits_rnn.keras",
    "tiny_pppp": lambda: models.tiny("PPPP", 5, "tiny_pppp"),
}


@dataclass(frozen=True)
class Alteration:
    """What became of one altered tensor of model.onnx.

    Attributes:
        label: the tensor's name.
        is_float: whether it holds floats.
        size: how many numbers it holds.
        noticed: how far the samples' answers moved, in tolerances; infinity where the model did not load or run.
        hidden: how far answers to fresh requests moved, in tolerances; looked at only where the samples' did not.
    """

    label: str
    is_float: bool
    size: int
    noticed: float
    hidden: float

    @property
    def caught(self) -> bool:
        """Whether bln-verify fails."""
        return self.noticed > 1

    @property
    def irrelevant(self) -> bool:
        """Whether nobody could notice."""
        return not self.caught and self.hidden <= 1


def tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield every stored tensor, also those of Constant nodes and inside the bodies of loops and branches."""
    yield from ((item.name, item) for item in graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            assert node.op_type != "Constant" or attribute.type == onnx.AttributeProto.TENSOR, node
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield f"{node.name}.{attribute.name}", attribute.t
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from tensors(attribute.g)


def altered(model: bytes, index: int) -> tuple[bytes, str, np.ndarray]:
    """Return the model with one tensor changed (floats by 1 %, integers by 1), its name and what it was."""
    proto = onnx.load_from_string(model)
    label, tensor = list(tensors(proto.graph))[index]
    values = numpy_helper.to_array(tensor)
    other = values * values.dtype.type(1.01) if values.dtype.kind == "f" else values + values.dtype.type(1)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(other, values.dtype).reshape(values.shape), tensor.name))
    return proto.SerializeToString(), label, values


def fresh_requests(manifest: Manifest) -> Iterator[tuple[Arrays, tuple[int, ...] | None]]:
    """Yield requests that no sample holds, each with its mini-batches: three seeds, several row counts."""
    m, rule = manifest.mini_batch_rows or 1, manifest.rule
    for seed, spread in SPREADS.items():
        for rows in (manifest.min_mini_batch_rows, m - 1, m, 2 * m):
            inputs = draw(manifest.signature.inputs, rows, np.random.default_rng([seed, rows]), spread)
            yield inputs, rule.cut(rows) if rule else None


def moved(report: VerificationReport) -> float:
    """Return the largest difference in tolerances."""
    return max(check.difference / check.limit for check in report.checks)


def noticed(artifact: Artifact) -> float:
    """Replay the samples of an artifact whose hashes are right."""
    artifact.check_hashes()
    try:
        report = replay(artifact, Model(artifact, threads=1))
    except RunError:
        return np.inf
    assert report.passed == (moved(report) <= 1)
    return moved(report)


def hidden(intact: Artifact, suspect: Artifact) -> float:
    """Compare answers to fresh requests."""
    tolerance = intact.manifest.tolerance
    before, after = (Model(artifact, threads=1) for artifact in (intact, suspect))
    return moved(
        VerificationReport(
            tuple(
                check
                for inputs, sizes in fresh_requests(intact.manifest)
                for check in compare_all("", before.run(inputs, sizes), after.run(inputs, sizes), tolerance)
            )
        )
    )


def alter_each(intact: Artifact, folder: Path) -> list[Alteration]:
    """Alter every tensor of an artifact in turn, in a copy of its folder."""
    copy_of(intact.path, folder)
    model = intact.onnx_path.read_bytes()
    found = []
    for index in range(len(list(tensors(onnx.load_from_string(model).graph)))):
        content, label, values = altered(model, index)
        (folder / ONNX_MODEL).write_bytes(content)
        rehash(folder)
        suspect = Artifact.open(folder)
        seen = noticed(suspect)
        unseen = hidden(intact, suspect) if seen <= 1 else 0.0
        found.append(Alteration(label, values.dtype.kind == "f", values.size, seen, unseen))
    return found


@pytest.fixture(scope="module")
def golden(golden_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Alteration]]:
    """What became of every tensor of every golden artifact."""
    return {
        name: alter_each(Artifact.open(golden_artifacts / name / "1"), tmp_path_factory.mktemp(name) / "1")
        for name in NAMES
    }


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Alteration]]:
    """What became of every tensor of what is exported now."""
    return {
        name: alter_each(export(make(), tmp_path_factory.mktemp("models")), tmp_path_factory.mktemp(name) / "1")
        for name, make in FRESH.items()
    }


EVERY = [("golden", name) for name in NAMES] + [("fresh", name) for name in FRESH]


@pytest.fixture(params=EVERY, ids="-".join)
def alterations(request: pytest.FixtureRequest) -> list[Alteration]:
    """What became of every tensor of one artifact."""
    fixture, name = request.param
    return request.getfixturevalue(fixture)[name]


def test_every_tensor_altered_by_one_percent_is_caught_or_proved_irrelevant(
    alterations: list[Alteration], record_property: Callable[[str, object], None]
) -> None:
    irrelevant = [item.label for item in alterations if item.irrelevant]
    record_property("irrelevant", irrelevant)
    print(f"{sum(item.caught for item in alterations)} of {len(alterations)} caught; irrelevant: {irrelevant}")
    missed = [item for item in alterations if not (item.caught or item.irrelevant)]
    assert missed == []


def test_every_table_of_floats_is_caught(alterations: list[Alteration]) -> None:
    tables = [item for item in alterations if item.is_float and item.size > 1]
    assert len(tables) >= 7
    assert [item for item in tables if not item.caught] == []


@pytest.mark.parametrize("made", ["golden", "fresh"])
def test_most_tensors_are_caught(made: str, request: pytest.FixtureRequest) -> None:
    every = [item for found in request.getfixturevalue(made).values() for item in found]
    floats = [item for item in every if item.is_float]
    assert sum(item.caught for item in floats) >= 0.8 * len(floats)
    assert sum(item.caught for item in every) >= 0.8 * len(every)


def test_tensors_inside_loops_were_altered_too(golden: dict[str, list[Alteration]]) -> None:
    assert any("/while/" in item.label for item in golden["digits_rnn"])


@pytest.mark.parametrize("name", FRESH)
def test_another_number_of_mini_batches_is_caught(fresh: dict[str, list[Alteration]], name: str) -> None:
    (count,) = (item for item in fresh[name] if item.label == MINI_BATCHES)
    assert count.caught


def test_fresh_requests_would_show_an_alteration_that_matters(golden_artifacts: Path, tmp_path: Path) -> None:
    intact = Artifact.open(golden_artifacts / "tiny_mpmm" / "1")
    folder = copy_of(intact.path, tmp_path / "1")
    content, _, values = altered(intact.onnx_path.read_bytes(), 0)
    (folder / ONNX_MODEL).write_bytes(content)
    assert values.size > 1
    assert hidden(intact, Artifact.open(folder)) > 100
    assert hidden(intact, intact) == 0


def test_the_walk_enters_branches_and_constants() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (bool c) => (float[1] y) <float[1] a = {1.0}> {
            y = If (c) <
                then_branch = t () => (float[1] p) <float[1] b = {2.0}> { p = Add (a, b) },
                else_branch = e () => (float[1] q) { q = Constant <value = float[1] {3.0}> () }
            >
        }""")
    assert sorted(float(numpy_helper.to_array(tensor)[0]) for _, tensor in tensors(model.graph)) == [1, 2, 3]
