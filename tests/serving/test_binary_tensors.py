from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.laws import law

from bln_serve.errors import InvalidInputError, MalformedRequestError
from bln_serve.serving import binary_tensors
from bln_serve.serving.binary_tensors import DATATYPES, Head, checked_size, from_bytes, from_json, head, header_length
from bln_serve.signature import ModelSignature, TensorSpec


def test_every_number_of_the_protocol_is_known_by_its_name_and_size() -> None:
    sizes = {name: dtype.itemsize for name, dtype in DATATYPES.items()}
    assert sizes == {
        **{"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8},
        **{"INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8, "FP16": 2, "FP32": 4, "FP64": 8},
    }
    for name, dtype in DATATYPES.items():
        assert binary_tensors.datatype_of(dtype) == name
        assert binary_tensors.datatype_of(dtype.newbyteorder(">")) == name


@pytest.mark.parametrize(
    ("datatype", "values", "wire"),
    [
        ("BOOL", [True, False], b"\x01\x00"),
        ("UINT8", [1, 255], b"\x01\xff"),
        ("INT16", [1, -2], b"\x01\x00\xfe\xff"),
        ("UINT32", [0x01020304], b"\x04\x03\x02\x01"),
        ("INT64", [-2], b"\xfe" + b"\xff" * 7),
        ("FP16", [1.5], b"\x00\x3e"),
        ("FP32", [-2.0], b"\x00\x00\x00\xc0"),
        ("FP64", [1.0], b"\x00" * 6 + b"\xf0\x3f"),
    ],
)
def test_the_bytes_are_little_endian_whatever_the_arrays_order(datatype: str, values: list[Any], wire: bytes) -> None:
    for order in "<>":
        assert binary_tensors.to_bytes(np.array(values, DATATYPES[datatype].newbyteorder(order))) == wire
    read = from_bytes(head("x", datatype, [len(values)]), b"{}" + wire, 2)
    assert read.tolist() == values
    assert read.dtype.str[0] in "<|"


def test_columns_first_in_memory_is_rows_first_on_the_wire() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert binary_tensors.to_bytes(np.asfortranarray(array)) == bytes(range(6))
    assert binary_tensors.to_bytes(array.T) == bytes([0, 3, 1, 4, 2, 5])


def test_bytes_are_not_copied_and_cannot_be_written_to() -> None:
    body = b"{} " + np.arange(6, dtype=np.float32).tobytes()
    read = from_bytes(head("x", "FP32", [2, 3]), body, 3)
    assert np.shares_memory(read, np.frombuffer(body, np.uint8))
    assert not read.flags.writeable


def arrays(*, finite: bool) -> st.SearchStrategy[np.ndarray]:
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    return st.sampled_from(list(DATATYPES.values())).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            shapes,
            elements={"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else None,
        )
    )


@law
@given(arrays(finite=False), st.binary(max_size=9), st.binary(max_size=9))
def test_any_array_survives_as_bytes(array: np.ndarray, before: bytes, after: bytes) -> None:
    wire = binary_tensors.to_bytes(array)
    tensor = head("x", binary_tensors.datatype_of(array.dtype), list(array.shape))
    read = from_bytes(tensor, before + wire + after, len(before))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@law
@given(arrays(finite=True))
def test_any_finite_array_survives_as_json_flat_and_nested(array: np.ndarray) -> None:
    tensor = head("x", binary_tensors.datatype_of(array.dtype), list(array.shape))
    flat = array.reshape(-1).tolist()
    # Empty lists do not say what they would hold, and a number alone is no list.
    nested = array.tolist() if array.size and array.ndim else flat
    by_orjson = orjson.dumps(np.ascontiguousarray(array.reshape(-1)), option=orjson.OPT_SERIALIZE_NUMPY)
    for text in (orjson.dumps(flat), orjson.dumps(nested), by_orjson):
        read = from_json(tensor, orjson.loads(text))
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(("text", "length"), [(None, 5), ("0", 0), ("3", 3), ("5", 5), ("0005", 5)])
def test_the_header_says_how_much_is_json(text: str | None, length: int) -> None:
    headers = {} if text is None else {"inference-header-content-length": text}
    assert header_length(headers, b"12345") == length


@pytest.mark.parametrize(
    "text", ["6", "-1", "+1", " 1", "", "1.0", "1e0", "0x1", "five", "1, 1", "\u00b2", "\u0663", "9" * 19, "9" * 5000]
)
def test_a_header_that_lies_is_refused(text: str) -> None:
    with pytest.raises(
        MalformedRequestError, match="Inference-Header-Content-Length to be .*, at most its 5. Received: '"
    ):
        header_length({"inference-header-content-length": text}, b"12345")


@pytest.mark.parametrize(
    ("datatype", "shape", "sentence"),
    [
        (
            "BYTES",
            [1],
            "datatype of input 'x' to be one of BOOL, UINT8, .*FP64. Received: 'BYTES'. No model .* text or",
        ),
        ("BF16", [1], "FP64. Received: 'BF16'.$"),
        ("fp32", [1], "Received: 'fp32'"),
        ("float32", [1], "Received: 'float32'"),
        (None, [1], "datatype of .* Received: null"),
        (32, [1], "datatype of .* Received: 32"),
        (["FP32"], [1], "datatype of .* Received: \\['FP32'\\]"),
        ("F" * 10_000, [1], f"Received: '{'F' * 80}...'.$"),
        ("FP32", None, "shape of input 'x' to be a list of at most 32 whole numbers from 0.* Received: null"),
        ("FP32", 3, "shape of input .* Received: 3"),
        ("FP32", {}, "shape of input .* Received: an object"),
        ("FP32", [-1, 3], "Received: \\[-1, 3\\]"),
        ("FP32", [1.0], "Received: \\[1.0\\]"),
        ("FP32", [True], "Received: \\[a boolean\\]"),
        ("FP32", ["1"], "Received: \\['1'\\]"),
        ("FP32", [[1]], "Received: \\[a list\\]"),
        ("FP32", [1] * 33, "at most 32 .* Received: \\[1, 1, 1, 1, 1, 1, 1, 1, ...\\]"),
        ("FP32", [0, 2**40, 2**40], "which memory can hold. Received: \\[0, 1099511627776"),
        ("FP32", [0, 2**64 - 1], "which memory can hold"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(datatype: Any, shape: Any, sentence: str) -> None:
    with pytest.raises(MalformedRequestError, match=sentence):
        head("x", datatype, shape)


FP32, BOOL = Head("x", "FP32", [2, 3], 6), Head("x", "BOOL", [3], 3)


@pytest.mark.parametrize(
    ("tensor", "size", "body", "kind", "sentence"),
    [
        (
            FP32,
            23,
            bytes(26),
            MalformedRequestError,
            "binary_data_size of input 'x' to be 24, FP32 of shape .2, 3.. .* 23",
        ),
        (FP32, 48, bytes(50), MalformedRequestError, "Received: 48"),
        (FP32, -24, bytes(26), MalformedRequestError, "Received: -24"),
        (FP32, 24.0, bytes(26), MalformedRequestError, "Received: 24.0"),
        (FP32, "24", bytes(26), MalformedRequestError, "Received: '24'"),
        (FP32, [24], bytes(26), MalformedRequestError, "Received: .24."),
        (Head("x", "INT8", [1], 1), True, bytes(3), MalformedRequestError, "to be 1, INT8 .* Received: a boolean"),
        (FP32, 24, bytes(25), MalformedRequestError, "24 bytes of input 'x' from byte 2 of the body on. Received: 23"),
        (FP32, 24, bytes(2), MalformedRequestError, "Received: 0. They follow the JSON"),
        (Head("x", "FP64", [2**62], 2**62), 2**65, bytes(9), MalformedRequestError, "of the body on. Received: 7"),
        (BOOL, 3, b"{}\x00\x01\x02", InvalidInputError, "each byte of input 'x', BOOL, to be 0 or 1. Received: 2"),
        (BOOL, 3, b"{}\xff\x01\x02", InvalidInputError, "Received: 255"),
    ],
)
def test_bytes_that_are_not_the_tensor_are_refused(
    tensor: Head, size: Any, body: bytes, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        from_bytes(tensor, body, 2 + 0 * checked_size(tensor, size))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "sentence"),
    [
        ("FP32", [2, 3], 5, "data of input 'x' to be a list. Received: 5"),
        ("FP32", [2, 3], {"a": 1}, "Received: an object"),
        ("FP32", [2, 3], "abc", "Received: 'abc'"),
        ("FP32", [2, 3], True, "Received: a boolean"),
        (
            "FP32",
            [2, 3],
            [1, 2, 3, 4, 5],
            "to be one list of 6, or lists as its shape .2, 3. says. Received: shape .5.",
        ),
        ("FP32", [2, 3], [[1, 2], [3, 4], [5, 6]], "Received: shape .3, 2."),
        ("FP32", [2, 3], [[1, 2, 3, 4, 5, 6]], "Received: shape .1, 6."),
        ("FP32", [2, 3], [[[1, 2, 3], [4, 5, 6]]], "Received: shape .1, 2, 3."),
        ("FP32", [2, 3], [], "Received: shape .0."),
        ("FP32", [0, 3], [1], "to be one list of 0.* Received: shape .1."),
        ("FP32", [1], [[]], "Received: shape .1, 0."),
    ],
)
def test_json_of_another_shape_is_refused(datatype: str, shape: list[int], data: Any, sentence: str) -> None:
    with pytest.raises(MalformedRequestError, match=sentence):
        from_json(head("x", datatype, shape), data)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "sentence"),
    [
        (
            "FP32",
            [2, 2],
            [[1, 2], [3]],
            "'x' to be a rectangular array of numbers. Received: lists of 1 and of 2 items",
        ),
        ("FP32", [2, 2], [[1, 2], 3], "Received: lists beside numbers"),
        ("FP32", [2, 2], [3, [1, 2], 1, 1], "data of input 'x' to be FP32. Received: .1, 2. at index 1"),
        ("FP32", [1], [None], "Received: null at index 0"),
        ("FP32", [2], [1, "2"], "Received: '2' at index 1"),
        ("FP32", [2], [1, {"b64": "AA=="}], "Received: an object at index 1"),
        ("FP32", [2], [0.5, True], "Received: a boolean at index 1"),
        ("FP32", [2], [0.5, 1e300], "to be FP32. Received: 1e.300 at index 1"),
        ("FP32", [1], [-1e300], "Received: -1e.300"),
        ("FP16", [2, 1], [[1], [65520]], "to be FP16. Received: 65520 at index 1"),
        ("INT32", [1], [1.5], "to be INT32. Received: 1.5 at index 0"),
        ("INT32", [1], [1.0], "Received: 1.0 at index 0"),
        ("INT32", [1], [False], "Received: a boolean"),
        ("UINT8", [3], [0, 255, 300], "to be UINT8. Received: 300 at index 2"),
        ("UINT8", [1], [-1], "Received: -1"),
        ("INT8", [1], [128], "Received: 128"),
        ("INT64", [2], [-(2**63), 2**63], "to be INT64. Received: 9223372036854775808 at index 1"),
        ("UINT64", [2], [2**64 - 1, -1], "to be UINT64. Received: -1 at index 1"),
        ("UINT64", [1], [float(2**64)], "Received: 1.8446744073709552e.19"),
        ("BOOL", [1], [1], "to be BOOL. Received: 1 at index 0"),
        ("BOOL", [1], ["true"], "Received: 'true'"),
    ],
)
def test_a_number_that_the_datatype_cannot_hold_is_refused(
    datatype: str, shape: list[int], data: Any, sentence: str
) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        from_json(head("x", datatype, shape), data)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if "INT" in name])
def test_the_largest_and_the_smallest_integer_survive_side_by_side(datatype: str) -> None:
    limits = np.iinfo(DATATYPES[datatype])
    assert from_json(head("x", datatype, [2]), [limits.min, limits.max]).tolist() == [limits.min, limits.max]


def test_lists_too_deep_are_refused() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    with pytest.raises(InvalidInputError, match="more than 32 levels of lists"):
        from_json(head("x", "FP32", [1]), deep)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


@law
@given(st.sampled_from(list(DATATYPES)) | _JSON, st.lists(st.integers(-1, 4), max_size=3) | _JSON, _JSON, _JSON)
def test_whatever_json_says_of_a_tensor_it_is_read_or_refused(datatype: Any, shape: Any, data: Any, size: Any) -> None:
    try:
        tensor = head("x", datatype, shape)
    except MalformedRequestError:
        return
    for read in (
        lambda: from_json(tensor, data),
        lambda: from_bytes(tensor, bytes(64), 2 + 0 * checked_size(tensor, size)),
    ):
        try:
            array = read()
        except (MalformedRequestError, InvalidInputError):
            continue
        assert (array.dtype, list(array.shape)) == (DATATYPES[datatype], shape)


def signature(*inputs: TensorSpec) -> ModelSignature:
    return ModelSignature(inputs, (TensorSpec("y", "float32", (None, 2)),))


ROWS = TensorSpec("x", "int16", (None, 2))


def test_a_body_of_nothing_but_rows_is_a_models_only_input() -> None:
    body = np.arange(6, dtype="<i2").tobytes()
    (read,) = binary_tensors.only_input(signature(ROWS), body).values()
    assert read.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert np.shares_memory(read, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("inputs", "body", "kind", "sentence"),
    [
        (
            [ROWS],
            bytes(7),
            MalformedRequestError,
            "rows of input 'x', int16 .rows, 2., 4 bytes each.* Received: 7 bytes",
        ),
        ([ROWS], b"", MalformedRequestError, "Received: 0 bytes"),
        ([TensorSpec("x", "int16", (None, 0))], bytes(7), MalformedRequestError, "0 bytes each"),
        (
            [ROWS, TensorSpec("z", "int16", (None,))],
            bytes(4),
            MalformedRequestError,
            "several inputs.*: x, z. Received: 0",
        ),
        ([TensorSpec("x", "bool", (None,))], b"\x01\x02", InvalidInputError, "BOOL, to be 0 or 1. Received: 2"),
    ],
)
def test_a_body_that_is_not_rows_of_the_only_input_is_refused(
    inputs: list[TensorSpec], body: bytes, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        binary_tensors.only_input(signature(*inputs), body)


def test_a_header_and_its_tensors_become_one_body() -> None:
    encoded = binary_tensors.join(b'{"a":1}', [b"12", b"345"])
    assert encoded.body == b'{"a":1}12345'
    assert encoded.media_type == "application/octet-stream"
    assert encoded.headers == {"inference-header-content-length": "7"}


def test_what_a_client_wrote_is_shown_as_far_as_a_sentence_bears() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    shown = {
        "a boolean": True,
        "null": None,
        "1.5": 1.5,
        "[a list]": deep,
        "[1, 'a', an object]": [1, "a", {}],
        f"'{'x' * 80}...'": "x" * 10**6,
        "[0, 0, 0, 0, 0, 0, 0, 0, ...]": [0] * 10**6,
    }
    for sentence, value in shown.items():
        assert binary_tensors.shown(value) == sentence
