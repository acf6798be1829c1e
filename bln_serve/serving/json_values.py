"""What every protocol in JSON shares: strict reading, numbers as arrays, and answers without NaN.

JSON says less than an array does, so it is read strictly: no key twice, no text, null or boolean that becomes a number,
no lists of different lengths that become an array. And it is read without making a Python object of each number, which
would take three times as long and, in C, hold up every other request meanwhile: simdjson keeps the document, of which
numbers are copied to arrays as a whole. That flattens lists of any shape, so the shape is proved by the text:

    text       [[1.5, 2], [3, -4e2]]        without what numbers and white space are made of
    outline    [[,],[,]]                    is that of the shape (2, 2), and of no other

What that does not take is taken apart list by list, which is slower and says what is wrong.
"""

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from bln_serve.errors import InvalidInputError, MalformedRequestError, NonFiniteAnswerError

T = TypeVar("T")
BufferType = Literal["i", "u", "d"]

MEDIA_TYPE = "application/json"
MAX_DIMENSIONS = 32

_LISTS, _OBJECTS = (list, simdjson.Array), (dict, simdjson.Object)
_KIND_NAMES: dict[type, str] = {
    bool: "booleans",
    float: "numbers",
    int: "numbers",
    str: "text",
    type(None): "null",
    **dict.fromkeys(_LISTS, "lists"),
    **dict.fromkeys(_OBJECTS, "objects"),
}
_SINGULAR = {"booleans": "a boolean", "numbers": "a number", "lists": "a list", "objects": "an object"}
_DTYPES: dict[BufferType, type] = {"i": np.int64, "u": np.uint64, "d": np.float64}
_NO_OUTLINE = b"0123456789+-.eE \t\r\n"
_MAX_CHARACTERS, _MAX_ITEMS, _MAX_ROWS_NAMED = 80, 8, 10  # of what a message repeats
_CHUNK = 65536  # values that are worked through in C, where nothing else goes on, in a millisecond
_EXPLAINED_BYTES = 256 * 1024  # orjson says where a text is wrong, and holds up everything until it has found that

# Each has ten times the memory of the largest document that it has read: of those for large ones, one is kept. One that
# read a document which was refused is dropped, too: the error still holds parts of it.
_parsers: Mapping[bool, deque[simdjson.Parser]] = {False: deque(maxlen=8), True: deque(maxlen=1)}
_LARGE = 256 * 1024


def read(body: bytes, extract: Callable[[Any], T], expected: str = "a JSON object", hint: str = "") -> T:
    """Read a document and take out of it what is wanted.

    Args:
        body: JSON in UTF-8.
        extract: called with the document: a number, text, a boolean, None, a simdjson.Array or a simdjson.Object, none
            of which may be part of what it returns.
        expected: what to say was expected where the body is no JSON.
        hint: what to do then.

    Returns:
        What `extract` returned.

    Raises:
        MalformedRequestError: the body is no JSON, or holds a number beyond 64 bits.
        Exception: what `extract` raised.
    """
    parsers = _parsers[len(body) > _LARGE]
    try:
        parser = parsers.pop()
    except IndexError:
        parser = simdjson.Parser()
    try:
        document = parser.parse(body)
    except (ValueError, RuntimeError) as error:  # UnicodeDecodeError is a ValueError
        received = f"{len(body)} bytes, and {_explained(body, error)}."
        raise MalformedRequestError(f"Expected {expected}. Received: {received}{hint}") from None
    extracted = extract(document)
    del document
    parsers.append(parser)
    return extracted


def members(what: str, value: Any, allowed: Collection[str], hint: str = "") -> dict[str, Any]:
    """Return an object's members by name; lists and objects among them stay simdjson's.

    Args:
        what: it is, for messages.
        value: part of a document.
        allowed: the names there may be.
        hint: what to say of other names.

    Raises:
        MalformedRequestError: it is no object, has other members, or one of them twice.
    """
    names = list(value.keys()) if type(value) in _OBJECTS else [""]
    if len(names) == len(named := set(names)) and named <= set(allowed):
        return {name: value[name] for name in names}
    expected = f"{what} to be a JSON object with no other keys than {', '.join(allowed)}"
    received = shown(value)
    if type(value) in _OBJECTS:
        twice = sorted(name for name in named if names.count(name) > 1)
        unknown = sorted(named - set(allowed))
        received = shown(unknown) if unknown else f"{shown(twice)} twice"
    raise MalformedRequestError(f"Expected {expected}. Received: {received}.{hint}")


def plain(value: Any) -> Any:
    """Return part of a document as Python's own lists and dicts."""
    if type(value) is simdjson.Array:
        return value.as_list()
    return value.as_dict() if type(value) is simdjson.Object else value


def is_list(value: Any) -> bool:
    """Whether part of a document is a list."""
    return type(value) in _LISTS


def is_object(value: Any) -> bool:
    """Whether part of a document is an object."""
    return type(value) in _OBJECTS


def kind(value: Any) -> str:
    """Name the kind of a value, such as a body that should have been an object."""
    name = _KIND_NAMES[type(value)]
    return _SINGULAR.get(name, name)


def shown(value: Any) -> str:
    """Show in a message what a client wrote, however long or nested it is."""
    if is_list(value):
        items = ", ".join(_shown_alone(value[index]) for index in range(min(_MAX_ITEMS, len(value))))
        return f"[{items}{', ...' if len(value) > _MAX_ITEMS else ''}]"
    return _shown_alone(value)


def _shown_alone(value: Any) -> str:
    if type(value) is str:
        return repr(value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}...")
    return str(value) if type(value) in (int, float) else kind(value)


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
    return {_KIND_NAMES[each] for each in types_of(values)}


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


def check_finite(name: str, output: NDArray[Any]) -> None:
    """Refuse an answer that JSON has no word for.

    Args:
        name: of the output.
        output: (rows, ...).

    Raises:
        NonFiniteAnswerError: it holds NaN or infinity.
    """
    if output.dtype.kind != "f" or np.isfinite(output).all():
        return
    finite = np.isfinite(output).reshape(output.shape[0], -1).all(axis=1)
    rows = np.flatnonzero(~finite)
    listed = ", ".join(map(str, rows[:_MAX_ROWS_NAMED])) + (", ..." if len(rows) > _MAX_ROWS_NAMED else "")
    raise NonFiniteAnswerError(
        f"Expected finite numbers in output {name!r}, since JSON has no NaN and no infinity. Received: NaN or "
        f"infinity in {len(rows)} of {len(finite)} rows, at index {listed}. "
        "Check these rows' values, or ask for Accept: application/x-npy."
    )


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


def _explained(body: bytes, error: Exception) -> str:
    """Say what is wrong with a text that simdjson refused, and where, if that is soon found."""
    # Python's own writer makes NaN and Infinity, which are no JSON.
    hint = ". JSON has no NaN and no Infinity" if re.search(rb"NaN|Infinity", body) else ""
    if "BIGINT" in str(error) or "NUMBER_ERROR" in str(error):
        return f"a number that 64 bits cannot hold{hint}"
    if len(body) <= _EXPLAINED_BYTES:
        try:
            orjson.loads(body)
        except orjson.JSONDecodeError as explained:
            return f"{explained}{hint}"
    return f"{str(error).partition('.')[0]}{hint}"
