"""Numbers as a whole and list by list are the same numbers; what is not rectangular is never read as if it were."""

import json
import threading
import time
from typing import Any

import numpy as np
import orjson
import pytest
import simdjson
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.laws import law

from bln_serve.errors import InvalidInputError, MalformedRequestError
from bln_serve.serving import json_arrays
from bln_serve.serving.json_arrays import array
from bln_serve.serving.json_values import members, read, shown


def read_rows(body: bytes, *, at_once: bool = True) -> np.ndarray:
    return read(body, lambda document: array("rows", document["rows"], body if at_once else None))


numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -0.0, 1e-320]),
)
nested = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner, max_size=1),
    max_leaves=12,
)


@law
@given(nested, st.sampled_from([None, 1]))
def test_at_once_and_list_by_list_give_the_same_or_the_same_error(value: Any, indent: int | None) -> None:
    body = json.dumps({"rows": value}, indent=indent).encode()

    def outcome(*, at_once: bool) -> Any:
        try:
            return read_rows(body, at_once=at_once)
        except InvalidInputError as error:
            return str(error)

    fast, slow = outcome(at_once=True), outcome(at_once=False)
    assert type(fast) is type(slow)
    if isinstance(fast, str):
        assert fast == slow
    else:
        assert fast.shape == slow.shape
        assert fast.dtype == slow.dtype or {fast.dtype.kind, slow.dtype.kind} <= set("iuf")
        np.testing.assert_array_equal(fast, slow)


@law
@given(
    hnp.arrays(
        st.sampled_from([np.float64, np.float32, np.int64, np.uint64, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=5, min_side=1, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    )
    | hnp.arrays(np.int64, hnp.array_shapes(max_dims=3))
)
def test_any_array_is_read_as_it_was(expected: np.ndarray) -> None:
    for options in (orjson.OPT_SERIALIZE_NUMPY, orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2):
        got = read_rows(orjson.dumps({"rows": expected}, option=options))
        assert got.shape == expected.shape
        if expected.dtype.kind in "iub":
            assert got.dtype.kind in {"i": "i", "u": "iu", "b": "b"}[expected.dtype.kind]
        np.testing.assert_array_equal(got.astype(expected.dtype), expected)


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2], [3]]",
        "[[1, 2, 3], [4]]",  # as many numbers as two rows of two
        "[[1], [2, 3, 4]]",
        "[[1, 2], []]",
        "[[], [1, 2]]",
        "[1, [2]]",
        "[[1], 2]",
        "[[[1, 2]], [3, 4]]",
        "[[[1], [2]], [[3, 4]]]",
        "[[1, 2], [3, 4], []]",
        "[[[1, 2], [3, 4]], [[5, 6, 7], [8]]]",
    ],
)
def test_ragged_lists_are_refused_though_their_numbers_may_fit(text: str) -> None:
    with pytest.raises(InvalidInputError, match="'rows' to be a rectangular array of numbers. Received: lists"):
        read_rows(f'{{"rows": {text}}}'.encode())


def test_an_outline_is_of_one_shape_alone() -> None:
    shapes = [(1,), (4,), (2, 2), (1, 4), (4, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1), (3, 2), (2, 3)]
    outlines = {json_arrays._outline(shape) for shape in shapes}
    assert len(outlines) == len(shapes)
    assert json_arrays._outline((2, 2)) == b"[[,],[,]]"


def test_the_fast_way_is_taken_and_the_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, whatever breaks the fast way would only make the service slower."""
    monkeypatch.setattr(json_arrays, "levels", lambda *_: pytest.fail("list by list"))
    for text in ("[[1, 2], [3, 4]]", "[ [1e-3 ,2.5]\n, [3,-4E+2] ]", "[1]", "[[[18446744073709551615]]]"):
        assert read_rows(f'{{"rows": {text}}}'.encode()).tolist() == json.loads(text)


@pytest.mark.parametrize("body", [b'{"a": 1, "a": 2}', b'{"b": 0, "a": 1, "\\u0061": 2}', b'{"a": 1, "b": 2, "a": 1}'])
def test_a_key_that_stands_there_twice_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedRequestError, match=r"no other keys than a, b. Received: \['a'\] twice."):
        read(body, lambda document: members("it", document, ["a", "b"]))


def test_a_document_that_was_refused_does_not_hold_up_the_next() -> None:
    """simdjson reads no further document while something of the last one is alive, as an error's frames may keep it."""

    def refuse(document: Any) -> None:
        raise InvalidInputError(shown(document))

    errors = []
    for _ in range(3):
        with pytest.raises(InvalidInputError) as raised:
            read(b'{"rows": [1]}', refuse)
        errors.append(raised)
        assert read_rows(b'{"rows": [1, 2]}').tolist() == [1, 2]


def test_documents_are_read_in_many_threads_at_once() -> None:
    failures: list[Exception] = []

    def keep_reading(number: int) -> None:
        body = orjson.dumps({"rows": [[number] * 3] * 5})
        try:
            for _ in range(300):
                assert read_rows(body).tolist() == [[number] * 3] * 5
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_reading, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1] * 9, "[1, 1, 1, 1, 1, 1, 1, 1, ...]"),
        ([[1], {"a": 1}, None, True, "b"], "[a list, an object, null, a boolean, 'b']"),
        ("x" * 100, repr("x" * 80 + "...")),
        ({}, "an object"),
        (2.5, "2.5"),
    ],
)
def test_what_a_client_wrote_is_shown_shortly(value: Any, text: str) -> None:
    assert shown(value) == text
    assert read(orjson.dumps(value), shown) == text


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"[" + b"[]," * 2_700_000 + b"[]]", id="as many lists as fit"),
        pytest.param(b"[" + b"true," * 1_600_000 + b"true]", id="as many booleans"),
        pytest.param(b"[" + b"0," * 4_000_000 + b"[0]]", id="as many numbers, and a list"),
    ],
)
def test_the_largest_body_is_never_one_long_step(value: bytes) -> None:
    """In C nothing else goes on. What is measured here is what one step does without, not how fast it is.

    What else the machine does can only make it longer; a step that is long is so each time.
    """
    body = b'{"rows": ' + value + b"}"
    began = time.perf_counter()
    read_once(body)  # the first of such a size takes memory from the system
    limit = max(0.1, (time.perf_counter() - began) / 2)
    assert any(longest_step(body) < limit for _ in range(20))


def longest_step(body: bytes) -> float:
    longest, ended = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest[0] = max(longest[0], now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    read_once(body)
    ended.set()
    watcher.join()
    return longest[0]


def read_once(body: bytes) -> None:
    try:
        read_rows(body)
    except InvalidInputError:
        return


def test_simdjson_is_as_it_is_relied_on() -> None:
    parser = simdjson.Parser()
    document = parser.parse(b'{"a": [1, [2, 3]], "a": 2}')
    assert list(document.keys()) == ["a", "a"]
    assert np.frombuffer(document["a"].as_buffer(of_type="d")).tolist() == [1, 2, 3]  # flattened, whatever the shape
    with pytest.raises(RuntimeError, match="re-use a parser"):
        parser.parse(b"1")
