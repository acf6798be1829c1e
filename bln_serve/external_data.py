"""Which other files an ONNX model wants to be read, found in its bytes before any runtime sees them.

A tensor may keep its entries in another file, whose `location` it names relative to the model's folder
(https://onnx.ai/onnx/repo-docs/ExternalData.html). Tensors stand in graphs, in nodes' attributes, in the bodies of
loops and functions, and within sparse tensors; this walks to all of them, past the weights and without the onnx
package. What is no protobuf message as the encoding has it (https://protobuf.dev/programming-guides/encoding/) is
refused, since two readers could understand it differently.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from bln_serve.errors import ArtifactError

# Of each message the fields that lead to a tensor, by number, as onnx.proto has them.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
}
_ENTRY, _KEY, _VALUE = "StringStringEntryProto", 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10
_LARGEST_NUMBER = 2**29 - 1

Field = tuple[int, int, int]
"""A field that has a length: its number, where its content begins, where it ends."""


def external_locations(path: Path) -> tuple[str, ...]:
    """Return the locations of external data that the model in a file names, as it names them, sorted.

    Raises:
        ArtifactError: the file holds no ONNX model.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if not file.seek(0, 2):
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return tuple(sorted(set(_locations(data))))
            except ValueError as error:
                raise ArtifactError(
                    f"Expected an ONNX model in {path}. Received: {error}. Export the model again."
                ) from error


def _locations(data: mmap.mmap) -> Iterator[str]:
    pending = [("ModelProto", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        if message == _ENTRY:
            said = {
                number: data[begin:stop] for number, begin, stop in _fields(data, start, end)
            }  # the last one counts
            if said.get(_KEY) == b"location":
                yield said.get(_VALUE, b"").decode(errors="backslashreplace")
            continue
        inside = MESSAGES[message]
        for number, begin, stop in _fields(data, start, end):
            if number in inside:
                pending.append((inside[number], begin, stop))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[Field]:
    at = start
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if not 0 < number <= _LARGEST_NUMBER:  # a reader with 32 bits would take it for another
            raise ValueError(f"a field with the impossible number {number} before byte {at}")
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _BYTES:
            length, begin = _varint(data, at, end)
            at = begin + length
            if at <= end:
                yield number, begin, at
        elif kind in {_FIXED64, _FIXED32}:
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind} before byte {at}")
        if at > end:
            raise ValueError(f"a field that ends at byte {at}, behind the end of its message at {end}")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_BYTES):
        if at + index >= end:
            raise ValueError(f"a number that goes on behind the end of its message at byte {end}")
        byte = data[at + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError(f"a number of more than {_VARINT_BYTES} bytes at byte {at}")
