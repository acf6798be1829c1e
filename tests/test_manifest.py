"""manifest.json says everything that the manifest holds, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifacts import NAMES
from support.laws import law

from bln_serve.errors import ArtifactError
from bln_serve.manifest import FILE_NAME, FORMAT_VERSION, Manifest, StoredStatistics, read_manifest, row_facts
from bln_serve.signature import ModelSignature, TensorSpec
from bln_serve.statistics import ALL_POLICIES, LayerStatistics, RowCoupling
from bln_serve.verification import Check, Tolerance

WORDS = st.text(max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 10**6)
MAYBE = st.none() | COUNTS

SPECS = st.builds(
    TensorSpec,
    name=WORDS,
    dtype=st.sampled_from(["float32", "int64", "bool"]),
    shape=st.lists(COUNTS, max_size=3).map(lambda sizes: (None, *sizes)),
    value_range=st.none() | st.tuples(st.integers(-9, 0), st.integers(0, 9)),
    typical_range=st.none() | st.tuples(FINITE, FINITE),
    labels=st.none() | st.lists(WORDS, max_size=3).map(tuple),
)
LAYERS = st.builds(
    LayerStatistics,
    name=WORDS,
    policy=st.sampled_from([policy.code for policy in ALL_POLICIES]),
    m=COUNTS,
    rows_per_row=st.integers(1, 9),
    pooled=st.booleans(),
)
STORED = st.builds(StoredStatistics, origin=WORDS, source=WORDS, sha256=WORDS, rows=COUNTS)
CHECKS = st.builds(Check, name=WORDS, difference=FINITE, limit=FINITE, largest=FINITE, worst=WORDS)


def tuples_of(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=3).map(tuple)


def consistent(layers: tuple[LayerStatistics, ...], mini_batch_rows: int | None, **fields: Any) -> Manifest:
    facts = row_facts(layers, mini_batch_rows)
    if mini_batch_rows is None and facts["row_coupling"] is not RowCoupling.INDEPENDENT:
        facts = row_facts(layers, 5)
    return Manifest(layers=layers, **facts, **fields)


MANIFESTS = st.builds(
    consistent,
    format_version=st.just(FORMAT_VERSION),
    name=WORDS,
    version=COUNTS,
    created=WORDS,
    source_sha256=st.none() | WORDS,
    signature=st.builds(ModelSignature, inputs=tuples_of(SPECS), outputs=tuples_of(SPECS)),
    layers=tuples_of(LAYERS),
    mini_batch_rows=MAYBE,
    tolerance=st.builds(Tolerance, atol=FINITE.map(abs), rtol=FINITE.map(abs)),
    checks=tuples_of(CHECKS),
    tools=st.dictionaries(WORDS, WORDS, max_size=3),
    files=st.dictionaries(WORDS, WORDS, max_size=3),
    row_coupling_path=tuples_of(WORDS),
    several_mini_batches=st.booleans(),
    sensitivity=st.none() | FINITE,
    stored_statistics=st.none() | STORED,
    notes=tuples_of(WORDS),
)


@law
@given(MANIFESTS)
def test_manifest_survives_json(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


@pytest.mark.parametrize("name", NAMES)
def test_golden_manifest_is_read_and_says_the_rule_its_layers_make(golden_artifacts: Path, name: str) -> None:
    folder = golden_artifacts / name / "1"
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.version) == (name, 1)
    assert manifest.to_json() == (folder / FILE_NAME).read_bytes()
    rule = manifest.rule
    assert (rule is None) == (manifest.row_coupling is RowCoupling.INDEPENDENT)
    if rule:
        assert (rule.default_rows, rule.min_rows, rule.max_rows, rule.reason) == (
            manifest.mini_batch_rows,
            manifest.min_mini_batch_rows,
            manifest.max_mini_batch_rows,
            manifest.row_coupling_reason,
        )


@pytest.mark.parametrize(
    ("policies", "statistics"),
    [((), None), (("PPMM",), "PPMM"), (("PPMM", "PPMM"), "PPMM"), (("PPMM", "MMMM"), "mixed")],
)
def test_statistics_is_the_common_policy(
    golden_artifacts: Path, policies: tuple[str, ...], statistics: str | None
) -> None:
    fields = golden_fields(golden_artifacts)
    layers = tuple(LayerStatistics("bn", policy, 5) for policy in policies)
    fields |= {"layers": [vars(layer) for layer in layers], **row_facts(layers, 5)}
    assert Manifest.from_json(json.dumps(fields).encode()).statistics == statistics


def golden_fields(golden_artifacts: Path) -> dict[str, Any]:
    """Return a valid manifest.json as plain values, to be spoilt."""
    fields: dict[str, Any] = json.loads((golden_artifacts / "tiny_mpmm" / "1" / FILE_NAME).read_bytes())
    return fields


def test_another_format_version_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(
        ArtifactError, match=r"format version 1\. Received: 2\. Export the model again, or use the bln-serve version"
    ):
        Manifest.from_json(b'{"format_version": 2, "name": ["a form that this reader does not know"]}')


ADDED = {
    "row_coupling_path": (),
    "several_mini_batches": False,
    "sensitivity": None,
    "notes": (),
    "stored_statistics": None,
}
"""Fields that the first manifests of format version 1 do not have, with what their absence means."""


@pytest.mark.parametrize("field", [name for name in Manifest.__dataclass_fields__ if name not in ADDED])
def test_a_manifest_without_one_of_its_fields_is_refused(golden_artifacts: Path, field: str) -> None:
    fields = golden_fields(golden_artifacts)
    del fields[field]
    with pytest.raises(ArtifactError, match=f"as bln-export writes it. Received: .*missing required field `{field}`"):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize("field", ADDED)
def test_a_manifest_from_before_a_field_was_added_is_read(golden_artifacts: Path, field: str) -> None:
    fields = golden_fields(golden_artifacts)
    assert field not in fields
    assert getattr(Manifest.from_json(json.dumps(fields).encode()), field) == ADDED[field]


def test_what_else_couples_rows_may_be_stronger_than_the_layers_and_makes_the_rule(golden_artifacts: Path) -> None:
    layers = (LayerStatistics("bn", "PPMM", 5),)
    facts = row_facts(layers, 5, (RowCoupling.MINI_BATCH, "ReduceMean 'pool' reduces the row axis"))
    fields = golden_fields(golden_artifacts) | {"layers": [vars(layer) for layer in layers], **facts}
    manifest = Manifest.from_json(json.dumps(fields).encode())
    assert manifest.rule is not None
    assert (manifest.rule.default_rows, manifest.rule.min_rows) == (5, 1)
    assert "ReduceMean" in manifest.rule.reason
    with pytest.raises(ArtifactError, match="Expected mini_batch_rows in manifest.json, since rows are coupled"):
        Manifest.from_json(json.dumps(fields | {"mini_batch_rows": None}).encode())


@pytest.mark.parametrize(
    ("field", "value", "received"),
    [
        ("version", "1", "Expected `int`, got `str`"),
        ("row_coupling", "loose", "Invalid enum value 'loose'"),
        ("files", {"model.onnx": 5}, "Expected `str`, got `int`"),
        ("layers", [{"name": "bn", "policy": "PXMM", "m": 5}], "four letters, each P or M.*'PXMM'"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(golden_artifacts: Path, field: str, value: Any, received: str) -> None:
    fields = golden_fields(golden_artifacts) | {field: value}
    with pytest.raises(ArtifactError, match=f"Received: .*{received}"):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": "1"}', b'{"format_version":1,"a":' + b"[" * 10**5],
)
def test_text_that_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match="Expected manifest.json as bln-export writes it. Received: ."):
        Manifest.from_json(text)


def test_a_folder_without_a_manifest_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    message = r"an exported version with a manifest.json at .*nowhere. Received: No such file.* bln-export MODEL.keras"
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path / "nowhere")


def test_a_folder_in_the_manifests_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ArtifactError, match="Received: Is a directory"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("row_coupling", "independent"), ("min_mini_batch_rows", 1), ("max_mini_batch_rows", 99)],
)
def test_what_contradicts_the_layers_is_refused(golden_artifacts: Path, name: str, value: Any) -> None:
    fields = golden_fields(golden_artifacts) | {name: value}
    with pytest.raises(ArtifactError, match=f"Expected {name} in manifest.json to be .*, as its layers say. "):
        Manifest.from_json(json.dumps(fields).encode())


@pytest.mark.parametrize(("name", "value"), [("mini_batch_rows", -3), ("mini_batch_rows", 0), ("version", 0)])
def test_counts_below_one_are_refused(golden_artifacts: Path, name: str, value: int) -> None:
    with pytest.raises(ArtifactError, match="to be at least 1 in manifest.json"):
        Manifest.from_json(json.dumps(golden_fields(golden_artifacts) | {name: value}).encode())


@pytest.mark.parametrize("count", ["m", "rows_per_row"])
def test_a_layer_of_no_rows_is_refused(golden_artifacts: Path, count: str) -> None:
    fields = golden_fields(golden_artifacts)
    fields["layers"][0][count] = 0
    with pytest.raises(ArtifactError, match="to be at least 1 in manifest.json"):
        Manifest.from_json(json.dumps(fields).encode())
