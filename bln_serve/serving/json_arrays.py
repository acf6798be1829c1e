"""Numbers in JSON as arrays, without a Python object of each.

simdjson copies the numbers of a list to an array as a whole, three times as fast as they become objects, but flattens
lists of any shape. So the shape is proved by the text:

    text       [[1.5, 2], [3, -4e2]]        without what numbers and white space are made of
    outline    [[,],[,]]                    is that of the shape (2, 2), and of no other

What that does not take is taken apart list by list, which is slower and says what is wrong.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simdjson
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError
from bln_serve.serving.json_values import KIND_NAMES, is_list

BufferType = Literal["i", "u", "d"]

MAX_DIMENSIONS = 32

_DTYPES: dict[BufferType, type] = {"i": np.int64, "u": np.uint64, "d": np.float64}
_NO_OUTLINE = b"0123456789+-.eE \t\r\n"
_CHUNK = 65536  # values that are worked through in C, where nothing else goes on, in a millisecond


def array(name: str, value: Any, body: bytes | None = None) -> NDArray[Any]:
    """Turn nested lists into an array.

    NumPy alone would turn `[true, 0.5]` into numbers, and one long text among many short ones into gigabytes.

    Args:
        name: what it is, for messages.
        value: part of a document: lists of lists of numbers, or of booleans.
        body: the text of the document, if no other text in it has brackets.

    Returns:
        An array of bool, int64, uint64 or float64.

    Raises:
        InvalidInputError: lists of different lengths, or anything else than numbers alone or booleans alone.
    """
    if body is not None and type(value) is simdjson.Array and (shape := _shape_of_first(value)):
        outline = body[body.find(b"[") : body.rfind(b"]") + 1].translate(None, _NO_OUTLINE)
        if outline == _outline(shape) and (numbers := flat_numbers(value)) is not None:
            return numbers.reshape(shape)
    level, shape = levels(name, value)
    kinds = kinds_of(level)
    if level and kinds not in ({"numbers"}, {"booleans"}):
        raise _not_rectangular(name, " beside ".join(sorted(kinds)))
    return packed(level).reshape(shape)


def flat_numbers(value: simdjson.Array, types: Sequence[BufferType] = ()) -> NDArray[Any] | None:
    """Return the numbers in nested lists one after the other, whatever the lists' shape.

    Args:
        value: part of a document.
        types: to be tried, in order: `i` for int64, `u` for uint64, `d` for float64. By default integers where all
            numbers are, else float64.

    Returns:
        A read-only array, or None where there is something else than numbers of these types.
    """
    by_default: Sequence[BufferType] = ("i", "u", "d") if type(_first(value)) is int else ("d",)
    for of_type in types or by_default:
        try:
            return np.frombuffer(value.as_buffer(of_type=of_type), _DTYPES[of_type])
        except (TypeError, ValueError):  # another type, or an integer that is too large for this one
            continue
    return None


def levels(name: str, value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Take nested lists apart.

    Returns:
        What is in the innermost lists, in order, and the lists' shape.

    Raises:
        InvalidInputError: lists of different lengths, lists beside something else, or more than 32 levels of them.
    """
    shape: list[int] = []
    level = [value]
    while level and is_list(level[0]):
        if len(kinds := kinds_of(level)) > 1:
            raise _not_rectangular(name, " beside ".join(sorted(kinds)))
        lengths = {len(each) for each in level}
        if len(lengths) > 1:
            shortest, longest = min(lengths), max(lengths)
            raise _not_rectangular(name, f"lists of {shortest} and of {longest} items at depth {len(shape) + 1}")
        if len(shape) >= MAX_DIMENSIONS:
            raise _not_rectangular(name, f"more than {MAX_DIMENSIONS} levels of lists")
        shape.append(len(level[0]))
        level = [item for each in level for item in each]
    return level, tuple(shape)


def types_of(values: list[Any]) -> set[type]:
    """Return the types of values that there are."""
    return set[type]().union(*(set(map(type, chunk)) for chunk in _chunks(values)))


def kinds_of(values: list[Any]) -> set[str]:
    """Return the names of the kinds of values that there are."""
    return {KIND_NAMES[each] for each in types_of(values)}


def packed(values: list[Any], dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return numbers, or booleans, as an array.

    Raises:
        OverflowError: the dtype is one of integers and cannot hold one of the values.
    """
    return np.concatenate([np.array(chunk, dtype) for chunk in _chunks(values)])


def _chunks(values: list[Any]) -> Iterator[list[Any]]:
    """Yield values as lists short enough for C; one of them empty where there are none."""
    if len(values) <= _CHUNK:
        yield values
    else:
        yield from (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


def _shape_of_first(value: simdjson.Array) -> tuple[int, ...]:
    """Return the shape that nested lists have if all of them are like the first; empty for none that has numbers."""
    shape: list[int] = []
    item: Any = value
    while type(item) is simdjson.Array and len(shape) < MAX_DIMENSIONS:
        shape.append(len(item))
        if not shape[-1]:
            return ()
        item = item[0]
    return tuple(shape)


def _first(value: Any) -> Any:
    while is_list(value) and len(value):
        value = value[0]
    return value


@lru_cache(maxsize=64)
def _outline(shape: tuple[int, ...]) -> bytes:
    """Return the text of nested lists of this shape without what is in them."""
    outline = b""
    for size in reversed(shape):
        outline = b"[" + b",".join([outline] * size) + b"]"
    return outline


def _not_rectangular(name: str, received: str) -> InvalidInputError:
    return InvalidInputError(f"Expected {name!r} to be a rectangular array of numbers. Received: {received}.")
