"""By what a request is known: the vectors of https://www.w3.org/TR/trace-context/, and ids that are safe to repeat."""

import re
from typing import Any

import pytest

from bln_serve.serving.request_ids import RequestIds, given_id, ids_of, trace_id_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def headers(**values: str) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in values.items()]


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-ff",
        f"01-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like",
        f" 00-{TRACE}-{PARENT}-01 ",
    ],
)
def test_a_trace_is_taken_over(value: str) -> None:
    assert trace_id_of(headers(traceparent=value)) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-",
        f"01-{TRACE}-{PARENT}-01.more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}a-{PARENT}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00_{TRACE}_{PARENT}_01",
        f"00-{TRACE}-{PARENT}-01\xff",
        f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01",
    ],
)
def test_a_trace_that_is_none_is_left_alone(value: str) -> None:
    assert trace_id_of(headers(traceparent=value)) is None
    assert ids_of({"headers": headers(traceparent=value)}).span_id is None


def test_two_traces_are_none() -> None:
    once = headers(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert trace_id_of([*once, *once]) is None


@pytest.mark.parametrize("value", ["a", "a" * 128, "5f0c-b2", '"quoted" {as} is', "~!@#$%^&*()"])
def test_a_plain_id_is_taken_over(value: str) -> None:
    assert given_id(headers(x_request_id=value)) == value.encode()
    assert ids_of({"headers": headers(x_request_id=value)}).request_id == value


@pytest.mark.parametrize("value", ["", "a" * 129, "a\nb", "a\tb", "\x7f", "\xe9", "a\r\nset-cookie: b", "\0"])
def test_an_id_that_is_not_plain_is_replaced(value: str) -> None:
    assert given_id(headers(x_request_id=value)) is None
    assert re.fullmatch("[0-9a-f]{16}", ids_of({"headers": headers(x_request_id=value)}).request_id)


def test_a_request_has_the_same_ids_wherever_they_are_asked_for_and_no_other_request_has_them() -> None:
    scope: dict[str, Any] = {"headers": headers(traceparent=f"00-{TRACE}-{PARENT}-01")}
    other: dict[str, Any] = {"headers": scope["headers"]}
    ids = ids_of(scope)
    assert ids_of(scope) is ids
    assert ids.trace_id == ids_of(other).trace_id == TRACE
    assert re.fullmatch("[0-9a-f]{16}", ids.span_id or "")
    assert len({ids.request_id, ids_of(other).request_id, ids.span_id, ids_of(other).span_id, PARENT}) == 5
    assert ids_of({"headers": headers(x_request_id="me")}) == RequestIds("me")
