"""ONNX models written byte by byte, as https://github.com/onnx/onnx/blob/main/onnx/onnx.proto numbers the fields.

Needs no ONNX library, and writes what such a library would refuse to.
"""

FLOAT = 1
_EXTERNAL = 1
_TENSOR, _GRAPH = 4, 5  # AttributeProto.type


def number(field: int, value: int) -> bytes:
    """Write a field that holds a number."""
    return _varint(field << 3) + _varint(value)


def part(field: int, content: bytes | str) -> bytes:
    """Write a field that holds text, bytes or a message."""
    content = content.encode() if isinstance(content, str) else content
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def external_tensor(location: str, *, entries: int = 4, name: str = "w") -> bytes:
    """Write a TensorProto of float32 whose entries are in another file."""
    said = {"location": location, "offset": "0", "length": str(4 * entries)}
    entry = b"".join(part(13, part(1, key) + part(2, value)) for key, value in said.items())
    return number(1, entries) + number(2, FLOAT) + part(8, name) + entry + number(14, _EXTERNAL)


def adding(location: str, place: str = "initializer") -> bytes:
    """Write a model y = x + w, 4 numbers each, whose w is in another file.

    Args:
        location: of that file.
        place: where w stands: as an `initializer` of the graph, in a `constant` node, in the `body` of an If, or in a
            `function` of the model.
    """
    tensor = external_tensor(location)
    constant = part(1, part(2, "w") + part(4, "Constant") + part(5, _attribute("value", 5, tensor, _TENSOR)))
    add = part(1, part(1, "x") + part(1, "w") + part(2, "y") + part(4, "Add"))
    functions = b""
    if place == "initializer":
        graph = add + part(5, tensor)
    elif place == "constant":
        graph = constant + add
    elif place == "body":
        branch = constant + part(1, part(1, "w") + part(2, "z") + part(4, "Identity")) + part(2, "b") + _value(12, "z")
        always = number(2, 9) + part(8, "always") + part(9, b"\1")  # a scalar of bool: true
        branches = part(5, _attribute("then_branch", 6, branch, _GRAPH))
        branches += part(5, _attribute("else_branch", 6, branch, _GRAPH))
        choice = part(1, part(1, "always") + part(2, "v") + part(4, "If") + branches)
        graph = choice + part(1, part(1, "x") + part(1, "v") + part(2, "y") + part(4, "Add")) + part(5, always)
    else:
        body = part(1, "f") + part(10, "own") + part(4, "x") + part(5, "y") + part(9, _opset())
        functions = part(25, body + constant.replace(b"\x0a", b"\x3a", 1) + add.replace(b"\x0a", b"\x3a", 1))
        graph = part(1, part(1, "x") + part(2, "y") + part(4, "f") + part(7, "own"))
        functions += part(8, part(1, "own") + number(2, 1))
    graph += part(2, "g") + _value(11, "x") + _value(12, "y")
    return number(1, 8) + part(7, graph) + part(8, _opset()) + functions


def _attribute(name: str, field: int, content: bytes, kind: int) -> bytes:
    return part(1, name) + part(field, content) + number(20, kind)


def _value(field: int, name: str) -> bytes:
    shape = part(2, part(1, number(1, 4)))
    return part(field, part(1, name) + part(2, part(1, number(1, FLOAT) + shape)))


def _opset() -> bytes:
    return part(1, "") + number(2, 17)


def _varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + _varint(value >> 7)
