"""The gate of bln-verify: alter every stored tensor of model.onnx in turn, and see whether replaying notices.

Hashes are made right each time, so that nothing but the answers can tell.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.artifacts import NAMES, copy_of, rehash

from bln_serve.artifact import ONNX_MODEL, Artifact
from bln_serve.errors import RunError
from bln_serve.export.parity import draw
from bln_serve.manifest import Manifest
from bln_serve.runtime import Model, replay
from bln_serve.signature import Arrays
from bln_serve.verification import VerificationReport, compare_all

# Mean and deviation of the fresh inputs of each seed: as the samples' and, for the digits, as bright as an image.
SPREADS = {11: (0.0, 1.0), 12: (0.5, 2.0), 13: (8.0, 6.0)}


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
            inputs = draw(manifest.signature.inputs, rows, np.random.default_rng([seed, rows]), *spread)
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


@pytest.fixture(scope="module")
def alterations(golden_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Alteration]]:
    """Alter every tensor of every golden artifact in turn."""
    found: dict[str, list[Alteration]] = {}
    for name in NAMES:
        intact = Artifact.open(golden_artifacts / name / "1")
        folder = copy_of(intact.path, tmp_path_factory.mktemp(name) / "1")
        model = intact.onnx_path.read_bytes()
        found[name] = []
        for index in range(len(list(tensors(onnx.load_from_string(model).graph)))):
            content, label, values = altered(model, index)
            (folder / ONNX_MODEL).write_bytes(content)
            rehash(folder)
            suspect = Artifact.open(folder)
            seen = noticed(suspect)
            unseen = hidden(intact, suspect) if seen <= 1 else 0.0
            found[name].append(Alteration(label, values.dtype.kind == "f", values.size, seen, unseen))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_altered_by_one_percent_is_caught_or_proved_irrelevant(
    alterations: dict[str, list[Alteration]], name: str, record_property: Callable[[str, object], None]
) -> None:
    found = alterations[name]
    irrelevant = [item.label for item in found if item.irrelevant]
    record_property("irrelevant", irrelevant)
    print(f"{name}: {sum(item.caught for item in found)} of {len(found)} caught; irrelevant: {irrelevant}")
    missed = [item for item in found if not (item.caught or item.irrelevant)]
    assert missed == []


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_floats_is_caught(alterations: dict[str, list[Alteration]], name: str) -> None:
    tables = [item for item in alterations[name] if item.is_float and item.size > 1]
    assert len(tables) >= 7
    assert [item for item in tables if not item.caught] == []


def test_most_tensors_are_caught_and_those_inside_loops_were_altered_too(
    alterations: dict[str, list[Alteration]],
) -> None:
    every = [item for found in alterations.values() for item in found]
    floats = [item for item in every if item.is_float]
    assert sum(item.caught for item in floats) >= 0.8 * len(floats)
    assert sum(item.caught for item in every) >= 0.8 * len(every)
    assert any("/while/" in item.label for item in alterations["digits_rnn"])


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
