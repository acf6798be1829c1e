"""Which array is which input or target, in whatever holds them.

a mapping, .npz     arrays by the inputs' names, or x for a single one; y, or targets by the outputs' names
(x, y), (x,)        each one array, a list of them in order, or a mapping
x, .npy             one input, no targets
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bln_serve.errors import UsageError
from bln_serve.signature import ModelSignature, TensorSpec

# What NumPy and zipfile raise for damaged or pickled files, and for none of theirs; the last where a size is a lie.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    MemoryError,
)

_WEIGHTS = "sample_weight"  # as Keras calls them


@dataclass(frozen=True)
class Wanted:
    """What is to be found.

    Attributes:
        signature: the names.
        targets: whether targets are.
        source: where, for messages.
    """

    signature: ModelSignature
    targets: bool
    source: str


def arranged(value: Any, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what stands for each input and each target, as it is.

    Args:
        value: arrays, or TensorFlow's descriptions of tensors, in one of the forms above.
        wanted: the names.

    Returns:
        The inputs and the targets by name, in the signature's order; no targets if none are wanted.

    Raises:
        UsageError: there is something missing or of another form, or a file's array cannot be read.
    """
    if isinstance(value, tuple) and len(value) not in (1, 2):
        raise missing(wanted, f"{len(value)} parts. Sample weights are not taken")
    whole = isinstance(value, Mapping)
    known = {spec.name for spec in (*wanted.signature.inputs, *wanted.signature.outputs)}
    if whole and _WEIGHTS in value and _WEIGHTS not in known:
        raise missing(wanted, f"{_WEIGHTS!r} as well. Sample weights are not taken")
    x, y = (value, value) if whole else (*value, None)[:2] if isinstance(value, tuple) else (value, None)
    inputs = _named(x, wanted.signature.inputs, "x", wanted)
    return inputs, _named(y, wanted.signature.outputs, "y", wanted) if wanted.targets else {}


def _named(value: Any, specs: Sequence[TensorSpec], short: str, wanted: Wanted) -> dict[str, Any]:
    """Return the leaf of each spec by its name."""
    if isinstance(value, Mapping):
        names = [spec.name for spec in specs]
        if all(name in value for name in names) and not (short == "y" and "y" in value and len(names) == 1):
            return {name: _leaf(_member(value, name, wanted), wanted) for name in names}
        if short in value:
            return _named(_member(value, short, wanted), specs, short, wanted)
        raise missing(wanted, ", ".join(map(repr, value)) or "nothing")
    if isinstance(value, list | tuple):
        if len(value) != len(specs):
            raise missing(wanted, f"{len(value)} arrays for {short}. Several inputs go in a list, (x, y) is a tuple")
        return {spec.name: _leaf(leaf, wanted) for spec, leaf in zip(specs, value, strict=True)}
    if value is None or len(specs) != 1:
        raise missing(wanted, "no targets" if value is None and short == "y" else f"one array for {short}")
    return {specs[0].name: _leaf(value, wanted)}


def _member(value: Mapping[str, Any], name: str, wanted: Wanted) -> Any:
    try:
        return value[name]
    except UNREADABLE as error:
        raise UsageError(
            f"Expected array {name!r} in {wanted.source} to be numbers that can be read. Received: {sentence(error)}. "
            "Nothing is unpickled: save it with a numeric dtype."
        ) from error


def _leaf(value: Any, wanted: Wanted) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise missing(wanted, f"a {type(value).__name__}. Make it an array: np.asarray(...)")
    return value


def missing(wanted: Wanted, received: str) -> UsageError:
    """Return the error that says what is expected."""
    expected = [_describe(wanted.signature.inputs, "x")]
    if wanted.targets:
        expected.append(_describe(wanted.signature.outputs, "y", "targets for "))
    return UsageError(
        f"Expected {' and '.join(expected)} in {wanted.source}. Received: {received}. A file is written with "
        "np.savez('data.npz', x=x, y=y), a function returns (x, y)."
    )


def _describe(specs: Sequence[TensorSpec], short: str, what: str = "") -> str:
    if len(specs) == 1:
        return f"{short} ({what}{specs[0].name!r}, {specs[0].describe()})"
    return ", ".join(f"{what}{spec.name!r} {spec.describe()}" for spec in specs)


def sentence(error: BaseException) -> str:
    """Return what an error says, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
