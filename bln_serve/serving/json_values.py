"""What every protocol in JSON shares: strict reading, words for what was read, and answers without NaN.

JSON says less than an array does, so it is read strictly: no key twice, and no text, null or boolean that becomes a
number. simdjson keeps the document, of which only what is wanted becomes Python's: making an object of each value
would, in C, hold up every other request meanwhile.
"""

import re
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np
import orjson
import simdjson
from numpy.typing import NDArray

from bln_serve.errors import MalformedRequestError, NonFiniteAnswerError

T = TypeVar("T")

MEDIA_TYPE = "application/json"

_LISTS, _OBJECTS = (list, simdjson.Array), (dict, simdjson.Object)
KIND_NAMES: dict[type, str] = {
    bool: "booleans",
    float: "numbers",
    int: "numbers",
    str: "text",
    type(None): "null",
    **dict.fromkeys(_LISTS, "lists"),
    **dict.fromkeys(_OBJECTS, "objects"),
}
_SINGULAR = {"booleans": "a boolean", "numbers": "a number", "lists": "a list", "objects": "an object"}
_MAX_CHARACTERS, _MAX_ITEMS, _MAX_ROWS_NAMED = 80, 8, 10  # of what a message repeats
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
    name = KIND_NAMES[type(value)]
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
