import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from support.laws import law

from bln_serve.serving.tallies import Tallies, Tally

BOUNDS = (0.1, 1, 2.5)
values = st.one_of(st.sampled_from([0, 0.1, 1, 2.5, 2.6]), st.floats(0, 100))


@law
@given(st.lists(st.lists(values, max_size=8), max_size=4))
def test_a_tally_is_what_the_histogram_would_have_observed(handed_over: list[list[float]]) -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    tallied, observed = (
        Histogram("seconds", "some", ("model",), buckets=BOUNDS, registry=registry).labels("digits")
        for registry in registries
    )
    tally = Tally(tallied, BOUNDS)
    for several in handed_over:
        for value in several:
            tally.note(value)
            observed.observe(value)
        tally.hand_over()
    for bound in ("0.1", "1.0", "2.5", "+Inf"):
        got, expected = (
            registry.get_sample_value("seconds_bucket", {"model": "digits", "le": bound}) for registry in registries
        )
        assert got == expected
    got, expected = (registry.get_sample_value("seconds_sum", {"model": "digits"}) for registry in registries)
    assert got == pytest.approx(expected, rel=1e-12)


def test_what_was_handed_over_is_not_handed_over_again() -> None:
    registry = CollectorRegistry()
    tally = Tally(Histogram("seconds", "some", buckets=BOUNDS, registry=registry), BOUNDS)
    tally.note(1)
    for _ in range(3):
        tally.hand_over()
    assert registry.get_sample_value("seconds_count") == 1
    assert registry.get_sample_value("seconds_sum") == 1


def test_tallies_by_label() -> None:
    registry = CollectorRegistry()
    tallies = Tallies(Counter("requests", "some", ("status",), registry=registry))
    for _ in range(2):
        for status in (200, 200, 404):
            tallies.note(status)
        tallies.hand_over()
    tallies.hand_over()
    assert registry.get_sample_value("requests_total", {"status": "200"}) == 4
    assert registry.get_sample_value("requests_total", {"status": "404"}) == 2
