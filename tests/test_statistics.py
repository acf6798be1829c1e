"""Policies, and what they make of a model's rows. The oracle says what really depends on what."""

import re

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law

from bln_serve import reference
from bln_serve.errors import UsageError
from bln_serve.statistics import (
    ALL_POLICIES,
    STATISTICS,
    LayerStatistics,
    RowCoupling,
    Source,
    StatisticsPolicy,
    mini_batch_rule,
    strongest,
)

CODES = [policy.code for policy in ALL_POLICIES]

# What each policy means at m = 25: row coupling, slots, fewest rows of a mini-batch.
AT_25 = {
    "PPPP": ("positional", 25, 1),
    "PPPM": ("positional", 25, 1),
    "PPMP": ("positional", 25, 1),
    "PPMM": ("independent", None, 1),
    "PMPP": ("mini-batch", 25, 2),
    "PMPM": ("mini-batch", 25, 2),
    "PMMP": ("mini-batch", 25, 2),
    "PMMM": ("mini-batch", None, 2),
    "MPPP": ("mini-batch", 25, 2),
    "MPPM": ("mini-batch", 25, 2),
    "MPMP": ("mini-batch", 25, 2),
    "MPMM": ("mini-batch", None, 2),
    "MMPP": ("mini-batch", 25, 2),
    "MMPM": ("mini-batch", 25, 2),
    "MMMP": ("mini-batch", 25, 2),
    "MMMM": ("mini-batch", None, 2),
}


def test_all_policies_are_the_sixteen_in_golden_order() -> None:
    assert list(AT_25) == CODES


@pytest.mark.parametrize("code", CODES)
def test_policy_survives_code_flags_and_names(code: str) -> None:
    policy = StatisticsPolicy.from_code(code)
    other = StatisticsPolicy.from_code(code.translate(str.maketrans("PM", "MP")))
    by_name = ",".join(f"{name}={source}" for name, source in policy.sources.items())
    assert policy.code == str(policy) == code
    assert StatisticsPolicy.parse(code, default=other) == policy
    assert StatisticsPolicy.parse(by_name, default=other) == policy
    assert StatisticsPolicy.from_flags(letter == "P" for letter in code) == policy
    assert policy.stored == tuple(name for name, letter in zip(STATISTICS, code, strict=True) if letter == "P")


def test_default_policy_is_the_layers_own_default() -> None:
    assert StatisticsPolicy().code == "PPMM"


@pytest.mark.parametrize(
    ("text", "default", "code"),
    [
        ("population", "MMMM", "PPPP"),
        ("mini-batch", "PPPP", "MMMM"),
        ("batch_mean=population", "MMMM", "PMMM"),
        ("feature_var=population, batch_var=mini-batch", "PPMM", "PMMP"),
        ("batch_mean=mini-batch", "PPMM", "MPMM"),
    ],
)
def test_parse_reads_words_and_keeps_what_is_not_named(text: str, default: str, code: str) -> None:
    assert StatisticsPolicy.parse(text, StatisticsPolicy.from_code(default)).code == code


@pytest.mark.parametrize("text", ["", "PPM", "PPMMM", "ppmm", "PPMX", "PPMM\n", "stored", "Population"])
def test_parse_refuses_what_is_no_code(text: str) -> None:
    with pytest.raises(UsageError, match=f"four letters, each P or M, .* Received: {re.escape(repr(text))}"):
        StatisticsPolicy.parse(text, StatisticsPolicy())


@pytest.mark.parametrize("item", ["batch_median=population", "batch_mean=stored", "batch_mean=", "=population"])
def test_parse_refuses_unknown_statistics_and_sources(item: str) -> None:
    with pytest.raises(UsageError, match=f"Expected STATISTIC=SOURCE, .*batch_mean.*mini-batch. Received: '{item}'"):
        StatisticsPolicy.parse(f"batch_var=population,{item}", StatisticsPolicy())


def test_source_says_itself_in_a_letter_and_in_plain_speech() -> None:
    assert [(source.letter, source.adjective) for source in Source] == [("P", "stored"), ("M", "live")]


@pytest.mark.parametrize(("code", "row"), AT_25.items())
def test_layer_of_many_rows_follows_the_table(code: str, row: tuple[str, int | None, int]) -> None:
    layer = LayerStatistics("bn", code, 25)
    assert (layer.row_coupling, layer.slots, layer.min_mini_batch_rows) == row


@pytest.mark.parametrize("code", CODES)
def test_at_m_1_one_row_is_the_protocol_and_the_single_slot_serves_every_row(code: str) -> None:
    layer = LayerStatistics("bn", code, 1)
    assert layer.slots is None
    assert layer.min_mini_batch_rows == 1
    assert layer.row_coupling == ("independent" if code.startswith("PP") else "mini-batch")


@pytest.mark.parametrize(("code", "row"), AT_25.items())
def test_pooled_slots_are_no_slots_and_nothing_is_positional(code: str, row: tuple[str, int | None, int]) -> None:
    layer = LayerStatistics("bn", code, 25, pooled=True)
    expected = "mini-batch" if row[0] == "mini-batch" else "independent"
    assert (layer.row_coupling, layer.slots, layer.min_mini_batch_rows) == (expected, None, row[2])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("code", CODES)
def test_declared_coupling_is_what_the_equations_do(code: str, m: int, pooled: bool) -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(4, 3))
    population = {
        "batch_mean": generator.normal(size=(1, 3)),
        "batch_var": generator.uniform(0.5, 2, (1, 3)),
        "feature_mean": generator.normal(size=(1 if pooled else m, 1)),
        "feature_var": generator.uniform(0.5, 2, (1 if pooled else m, 1)),
    }

    def answers(rows: np.ndarray) -> np.ndarray:
        return reference.normalize(rows, np.ones(3), np.zeros(3), m=m, policy=code, population=population)

    others_changed = np.concatenate([x[:1], x[1:] + generator.normal(size=(3, 3))])
    depends_on_mates = not np.allclose(answers(x)[0], answers(others_changed)[0])
    depends_on_slot = not np.allclose(answers(x), answers(x[::-1])[::-1])
    observed = (
        RowCoupling.MINI_BATCH
        if depends_on_mates
        else (RowCoupling.POSITIONAL if depends_on_slot else RowCoupling.INDEPENDENT)
    )
    assert LayerStatistics("bn", code, m, pooled=pooled).row_coupling is observed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("PPMM", "bn: nothing in PPMM depends on other rows"),
        ("MPMM", "bn: batch mean is live"),
        ("PMPP", "bn: batch variance is live"),
        ("MMMM", "bn: batch mean and batch variance are live"),
        ("PPMP", "bn: feature variance is stored by slot"),
        ("PPPP", "bn: feature mean and feature variance are stored by slot"),
    ],
)
def test_reason_names_the_layer_and_the_statistics(code: str, reason: str) -> None:
    assert LayerStatistics("bn", code, 25).reason == reason


@pytest.mark.parametrize(
    ("code", "m", "reason"),
    [
        ("PPPP", 25, "bn: feature mean and feature variance are stored, and pooled to serve every row"),
        ("PPMP", 25, "bn: feature variance is stored, and pooled to serve every row"),
        ("PPPP", 1, "bn: nothing in PPPP depends on other rows"),
        ("PPMM", 25, "bn: nothing in PPMM depends on other rows"),
        ("MMPP", 25, "bn: batch mean and batch variance are live"),
    ],
)
def test_reason_of_a_pooled_layer(code: str, m: int, reason: str) -> None:
    assert LayerStatistics("bn", code, m, pooled=True).reason == reason


def test_a_pooled_layer_survives_json_and_one_from_before_there_was_pooling_is_read() -> None:
    layer = LayerStatistics("bn", "PPPP", 25, pooled=True)
    assert msgspec.json.decode(msgspec.json.encode(layer), type=LayerStatistics) == layer
    old = msgspec.json.decode(b'{"name": "bn", "policy": "PPPP", "m": 25, "rows_per_row": 1}', type=LayerStatistics)
    assert old == LayerStatistics("bn", "PPPP", 25)
    assert not old.pooled


def test_strongest_layer_decides_and_the_first_of_equals_gives_the_reason() -> None:
    layers = [LayerStatistics(name, code, 5) for name, code in (("a", "PPPP"), ("b", "MPMM"), ("c", "MMMM"))]
    assert strongest(layers) == (RowCoupling.MINI_BATCH, "b: batch mean is live")
    assert strongest(layers[:1])[0] is RowCoupling.POSITIONAL
    assert strongest([]) == (RowCoupling.INDEPENDENT, "no Batch Layer Normalization layer")


def test_strengths_rise_from_independent_to_mini_batch() -> None:
    assert [RowCoupling(name).strength for name in ("independent", "positional", "mini-batch")] == [0, 1, 2]


def test_rule_takes_the_smallest_slot_count_and_the_largest_minimum() -> None:
    layers = [LayerStatistics("a", "PPPP", 9), LayerStatistics("b", "PPMP", 6), LayerStatistics("c", "MPMM", 4)]
    rule = mini_batch_rule(layers, 5)
    assert rule is not None
    assert (rule.default_rows, rule.min_rows, rule.max_rows) == (5, 2, 6)
    assert rule.reason == "c: batch mean is live"


def test_pooled_layers_set_no_limit_beside_those_with_slots() -> None:
    layers = [LayerStatistics("a", "PPPP", 9), LayerStatistics("b", "PPPP", 4, pooled=True)]
    rule = mini_batch_rule(layers, 5)
    assert rule is not None
    assert (rule.max_rows, rule.reason) == (9, "a: feature mean and feature variance are stored by slot")
    assert mini_batch_rule(layers[1:], 5) is None


def test_independent_rows_have_no_rule() -> None:
    assert mini_batch_rule([LayerStatistics("a", "PPMM", 9), LayerStatistics("b", "PPPP", 1)], 9) is None


@law
@given(st.lists(st.tuples(st.sampled_from(CODES), st.integers(1, 9)), max_size=4))
def test_coupling_never_weakens_when_a_layer_is_added(described: list[tuple[str, int]]) -> None:
    layers = [LayerStatistics(f"bn{i}", code, m) for i, (code, m) in enumerate(described)]
    strengths = [strongest(layers[:count])[0].strength for count in range(len(layers) + 1)]
    assert strengths == sorted(strengths)
