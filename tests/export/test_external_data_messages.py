"""The serving side reads ONNX files without the onnx package: its table of messages against onnx's own."""

from typing import Any

import onnx

from bln_serve.external_data import MESSAGES


def messages_of(descriptor: Any, found: dict[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    """Return of every message reachable from one the fields that are messages, by number."""
    if descriptor.name not in found:
        inside = [field for field in descriptor.fields if field.message_type]
        found[descriptor.name] = {field.number: field.message_type.name for field in inside}
        for field in inside:
            messages_of(field.message_type, found)
    return found


def test_the_table_leads_to_every_tensor_that_a_model_can_hold() -> None:
    found = messages_of(onnx.ModelProto.DESCRIPTOR, {})
    leading, size = {"TensorProto"}, 0
    while size != len(leading):
        size = len(leading)
        leading |= {name for name, fields in found.items() if leading & set(fields.values())}
    expected = {
        name: {number: message for number, message in fields.items() if message in leading}
        for name, fields in found.items()
        if name in leading
    }
    expected["TensorProto"] = {onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER: "StringStringEntryProto"}
    assert expected == MESSAGES
    entry = onnx.StringStringEntryProto
    assert (entry.KEY_FIELD_NUMBER, entry.VALUE_FIELD_NUMBER) == (1, 2)
