import io
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law

from bln_serve.errors import MalformedRequestError
from bln_serve.serving import predict_npy
from bln_serve.serving.prediction import Prediction


def npy(array: np.ndarray, **more: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **more)
    return stream.getvalue()


def with_header(header: str, numbers: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n" + numbers


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        np.arange(4, dtype=">f8"),
        np.array([True, False]),
        np.zeros((0, 3), np.float16),
        np.array(3.0),
    ],
)
def test_numbers_arrive_as_they_were_saved(array: np.ndarray) -> None:
    read = predict_npy.read(npy(array)).inputs
    assert isinstance(read, np.ndarray)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_the_numbers_are_not_copied() -> None:
    body = npy(np.arange(6.0))
    read = predict_npy.read(body).inputs
    assert np.shares_memory(np.asarray(read), np.frombuffer(body, np.uint8))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("unpickled",))


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "Expected an .npy body"),
        (b"not numpy at all", "Expected an .npy body"),
        (npy(np.arange(6.0))[:40], "Expected an .npy body"),
        (b'{"instances": [[1]]}', "Expected an .npy body"),
        (npy(np.array([Bomb()]), allow_pickle=True), "Objects are never unpickled"),
        (pickle.dumps(Bomb()), "Expected an .npy body"),
        (npy(np.zeros(2, [("a", "f4")])), "of numbers or booleans. Received: dtype"),
        (npy(np.array(["text"])), "of numbers or booleans. Received: dtype '<U4'"),
        (npy(np.zeros(2, np.complex64)), "Received: dtype '<c8'"),
        (npy(np.zeros(2, "M8[s]")), "Received: dtype"),
        (npy(np.zeros((2, 3), np.float32)) + b"\0", "shape .2, 3.. Received: 25 bytes"),
        (npy(np.zeros((2, 3), np.float32))[:-4], "Received: 20 bytes"),
        (with_header(GOOD), "Received: 0 bytes"),
        (with_header(GOOD.replace("(2, 3)", "(10**12,)"), bytes(24)), "Expected an .npy body"),
        (with_header(GOOD.replace("(2, 3)", "(1000000000000,)"), bytes(24)), "Received: 24 bytes"),
        (with_header(GOOD.replace("(2, 3)", "(-2, -3)"), bytes(24)), "Received: 24 bytes"),
        (with_header(GOOD.replace("(2, 3)", "(0, 9223372036854775807, 9223372036854775807)")), "NumPy can hold"),
        (with_header(GOOD.replace("(2, 3)", f"(0, {'1, ' * 80})")), "Expected an .npy body"),
        (with_header(GOOD.replace("'<f4'", "'(3,)f4'"), bytes(72)), "Received: dtype"),
        (with_header(GOOD, bytes(24), b"\x09\x00"), "version 1.0 or 2.0"),
        (with_header("(" * 5000 + ")" * 5000), "Expected an .npy body"),
        (with_header("__import__('os').abort()"), "Expected an .npy body"),
    ],
)
def test_a_hostile_body_is_refused_with_a_sentence(body: bytes, sentence: str) -> None:
    with pytest.raises(MalformedRequestError, match=sentence):
        predict_npy.read(body)


@law
@given(st.binary(max_size=200), st.integers(0, 150), st.integers(0, 255))
def test_a_damaged_body_is_read_or_refused(noise: bytes, at: int, byte: int) -> None:
    damaged = bytearray(npy(np.zeros((2, 3), np.float32)))
    damaged[at % len(damaged)] = byte
    for body in (noise, b"\x93NUMPY\x01\x00" + noise, bytes(damaged)):
        try:
            predict_npy.read(body)
        except MalformedRequestError as error:
            assert "Received" in str(error)  # noqa: PT017 - reading it is right too


def test_an_answer_says_in_headers_what_it_was() -> None:
    output = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    output[0, 0] = np.nan
    encoded = predict_npy.write(Prediction({"y": output}, "digits", 3, "MMMM", "25x40,7"))
    np.testing.assert_array_equal(np.load(io.BytesIO(encoded.body)), output)
    assert encoded.headers == {
        "bln-model": "digits",
        "bln-version": "3",
        "bln-statistics": "MMMM",
        "bln-mini-batches": "25x40,7",
    }


def test_what_a_json_answer_calls_null_is_left_out() -> None:
    encoded = predict_npy.write(Prediction({"y": np.zeros((1, 1))}, "digits", 3, None, None))
    assert encoded.headers == {"bln-model": "digits", "bln-version": "3"}


def test_several_outputs_are_no_npy() -> None:
    several = {"a": np.zeros(1), "b": np.zeros(1)}
    with pytest.raises(MalformedRequestError, match=r"Expected Accept: application/json.*\(a, b\)"):
        predict_npy.write(Prediction(several, "digits", 3, None, None))
