"""Cutting rows into mini-batches: the laws of the cut, and that every way out which a refusal names is one."""

import re
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.laws import law

from bln_serve.errors import MiniBatchError
from bln_serve.statistics import MiniBatchRule, even_cut, run_length

ROWS = st.integers(1, 120)
REQUESTED = st.none() | st.integers(0, 40)


@st.composite
def rules(draw: st.DrawFn) -> MiniBatchRule:
    """Draw a rule that some model has: the default allowed, and slots only where m >= 2."""
    default = draw(st.integers(1, 30))
    min_rows = draw(st.integers(1, min(2, default)))
    max_rows = draw(st.none() | st.integers(max(default, 2), 40))
    return MiniBatchRule(default, min_rows, max_rows, "bn: batch mean is live")


def ways_out(message: str, requested: int | None) -> list[tuple[int | None, int | None]]:
    """Return what a refusal says to try, as (rows or None for the same, mini_batch_rows)."""
    advice = message.partition("To be answered, ")[2]
    if both := re.search(r"set mini_batch_rows to 0 and send at least (\d+) rows(?:, at most (\d+))?", advice):
        return [(int(rows), 0) for rows in both.groups() if rows]
    ways: list[tuple[int | None, int | None]] = [
        (None, int(size)) for size in re.findall(r"set mini_batch_rows to (\d+)", advice)
    ]
    for counts in re.findall(r"send ([\d or]+) rows", advice):
        ways += [(int(rows), requested) for rows in re.findall(r"\d+", counts)]
    return ways


def refusal_or_none(rule: MiniBatchRule, rows: int, requested: int | None = None) -> str | None:
    """Return the message with which a cut is refused, or None."""
    try:
        rule.cut(rows, requested)
    except MiniBatchError as error:
        return str(error)
    return None


@law
@given(rules(), ROWS, REQUESTED)
def test_cut_adds_up_and_keeps_to_the_limits(rule: MiniBatchRule, rows: int, requested: int | None) -> None:
    try:
        sizes = rule.cut(rows, requested)
    except MiniBatchError:
        assume(False)
    size = rule.default_rows if requested is None else requested or rows
    assert sum(sizes) == rows
    assert set(sizes[:-1]) <= {size}
    assert rule.min_rows <= min(sizes)
    assert max(sizes) <= min(size, rule.max_rows or size)


def test_every_way_out_of_a_refusal_works() -> None:
    tried = 0
    for default, min_rows, max_rows in product(range(1, 8), (1, 2), (None, *range(2, 9))):
        if not min_rows <= default <= (max_rows or default):
            continue
        rule = MiniBatchRule(default, min_rows, max_rows, "bn: batch mean is live")
        for rows, requested in product(range(1, 25), (None, *range(11))):
            if message := refusal_or_none(rule, rows, requested):
                ways = ways_out(message, requested)
                assert ways, message
                for other_rows, size in ways:
                    assert refusal_or_none(rule, other_rows or rows, size) is None, (message, other_rows, size)
                tried += len(ways)
    assert tried > 1000


@law
@given(rules(), ROWS, REQUESTED)
def test_refused_if_and_only_if_a_mini_batch_is_out_of_limits(
    rule: MiniBatchRule, rows: int, requested: int | None
) -> None:
    size = rule.default_rows if requested is None else requested or rows
    wrong = [part for part in even_cut(rows, size) if part < rule.min_rows or part > (rule.max_rows or part)]
    assert bool(wrong) == bool(refusal_or_none(rule, rows, requested))


@law
@given(st.lists(st.integers(1, 40), max_size=40))
def test_run_length_decodes_back_and_is_never_longer(sizes: list[int]) -> None:
    decoded: list[int] = []
    text = run_length(sizes)
    for part in filter(None, text.split(",")):
        size, _, count = part.partition("x")
        decoded += [int(size)] * int(count or 1)
    assert decoded == sizes
    assert len(text) <= len(",".join(map(str, sizes)))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [((25,) * 40 + (7,), "25x40,7"), ((5, 5), "5,5"), ((5, 5, 5), "5x3"), ((1,), "1"), ((), "")],
)
def test_run_length_is_encoded_where_shorter(sizes: tuple[int, ...], text: str) -> None:
    assert run_length(sizes) == text


LIVE = MiniBatchRule(25, 2, None, "bn1: batch variance is live")
SLOTS = MiniBatchRule(4, 1, 4, "bn1: feature mean is stored by slot")
LIVE_SLOTS = MiniBatchRule(2, 2, 2, "bn1: batch mean is live")


@pytest.mark.parametrize(
    ("rule", "rows", "requested", "sizes"),
    [
        (LIVE, 25, None, (25,)),
        (LIVE, 52, None, (25, 25, 2)),
        (LIVE, 7, None, (7,)),
        (LIVE, 26, 0, (26,)),
        (LIVE, 26, 13, (13, 13)),
        (LIVE, 3, 1000, (3,)),
        (SLOTS, 9, None, (4, 4, 1)),
        (SLOTS, 4, 0, (4,)),
        (SLOTS, 3, 1000, (3,)),
        (MiniBatchRule(1), 3, None, (1, 1, 1)),
        (MiniBatchRule(1), 3, 0, (3,)),
    ],
)
def test_cut_examples(rule: MiniBatchRule, rows: int, requested: int | None, sizes: tuple[int, ...]) -> None:
    assert rule.cut(rows, requested) == sizes


def test_a_remainder_of_one_row_is_refused_with_every_way_out() -> None:
    assert refusal_or_none(LIVE, 26) == (
        "Expected mini-batches of at least 2 rows (bn1: batch variance is live). Received: 26 rows, which in "
        "mini-batches of 25 leave 1. To be answered, set mini_batch_rows to 24, or set mini_batch_rows to 0 for one "
        "mini-batch of all 26 rows, or send 25 or 27 rows."
    )


def test_a_single_row_with_live_statistics_is_refused() -> None:
    with pytest.raises(MiniBatchError, match=r"at least 2 rows .* make one of 1\. To be answered, send 2 rows\.$"):
        LIVE.cut(1)


def test_more_rows_than_slots_are_refused_and_never_broadcast() -> None:
    assert refusal_or_none(SLOTS, 5, 0) == (
        "Expected mini-batches of at most 4 rows (bn1: feature mean is stored by slot, and there are 4 slots). "
        "Received: 5 rows with mini_batch_rows=5. To be answered, set mini_batch_rows to 4."
    )


@pytest.mark.parametrize(
    ("rule", "rows", "requested", "advice"),
    [
        (LIVE, 1, 1, "set mini_batch_rows to 0 and send at least 2 rows"),
        (LIVE_SLOTS, 5, 0, "set mini_batch_rows to 0 and send at least 2 rows, at most 2"),
        (LIVE_SLOTS, 3, None, "send 2 or 4 rows"),
    ],
)
def test_where_these_rows_cannot_be_cut_at_all_other_rows_are_named(
    rule: MiniBatchRule, rows: int, requested: int | None, advice: str
) -> None:
    with pytest.raises(MiniBatchError, match=f"To be answered, {advice}.$"):
        rule.cut(rows, requested)


def test_negative_mini_batch_rows_are_refused() -> None:
    with pytest.raises(MiniBatchError, match=r"to be 0 \(one mini-batch of all rows\) or more. Received: -1"):
        LIVE.cut(25, -1)
