"""What a request's inputs may be, and what a refusal says: the input by name, what was expected, what was received."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.laws import law

from bln_serve.errors import InvalidInputError
from bln_serve.signature import ModelSignature, TensorSpec, rows_of

FLOATS = TensorSpec("image", "float32", (None, 2))
HALF = TensorSpec("half", "float16", (None,))
INTEGERS = TensorSpec("count", "int32", (None,))
BYTES = TensorSpec("pixel", "uint8", (None,))
TOKENS = TensorSpec("tokens", "int64", (None, 3), (0, 19))
FLOAT_TOKENS = TensorSpec("tokens", "float32", (None, 3), (0, 19))
FLAG = TensorSpec("flag", "bool", (None,))
BOTH = ModelSignature((FLOATS, TOKENS), (TensorSpec("score", "float32", (None, 1)),))
ONE = ModelSignature((FLOATS,), BOTH.outputs)


def refused(spec: TensorSpec, value: Any) -> str:
    """Return what is said of a value that must be refused, after the part that describes the input."""
    expected = f"Expected input {spec.name!r} to be {spec.describe()}. "
    with pytest.raises(InvalidInputError, match=f"^{re.escape(expected)}") as caught:
        spec.validate(np.asarray(value))
    return str(caught.value).removeprefix(expected)


def test_describe_gives_dtype_and_shape_in_words() -> None:
    assert FLOATS.describe() == "float32 (rows, 2)"
    assert INTEGERS.describe() == "int32 (rows)"


@law
@given(arrays.arrays(np.float32, (3, 2), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_values_that_fit_come_back_unchanged(values: np.ndarray) -> None:
    for sent in (
        values,
        values.astype(np.float64),
        values.astype(">f4"),
        np.asfortranarray(values),
        values[::-1][::-1],
    ):
        checked = FLOATS.validate(sent)
        assert checked.dtype == np.float32
        assert checked.dtype.isnative
        assert checked.flags.c_contiguous
        np.testing.assert_array_equal(checked, values)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (FLOATS, [[1, 2]]),
        (FLOATS, np.array([[1, 2]], np.uint8)),
        (HALF, [65504]),
        (INTEGERS, np.array([-5, 2**31 - 1], np.int64)),
        (INTEGERS, np.array([7], np.uint64)),
        (BYTES, np.array([0, 255], np.int64)),
        (TOKENS, [[0, 19, 5]]),
        (FLOAT_TOKENS, [[0.0, 19.0, 5.0]]),
        (FLAG, [True, False]),
    ],
)
def test_other_numbers_are_taken_where_their_values_fit(spec: TensorSpec, value: Any) -> None:
    checked = spec.validate(np.asarray(value))
    assert checked.dtype == spec.dtype
    np.testing.assert_array_equal(checked, value)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 2, 1), (0, 2, 2)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    assert refused(FLOATS, np.zeros(shape)) == f"Received: shape {shape}."


def test_no_rows_are_refused() -> None:
    assert refused(FLOATS, np.zeros((0, 2))) == "Received: no rows. Send at least one."


@pytest.mark.parametrize(
    ("spec", "value", "kind"),
    [
        (FLOATS, [["1", "2"]], "text"),
        (FLOATS, [[b"1", b"2"]], "bytes"),
        (FLOATS, [[True, False]], "booleans"),
        (FLOATS, [[None, 1.0]], "mixed values"),
        (FLOATS, [[1 + 2j, 0]], "complex128"),
        (INTEGERS, [1.0], "floats"),
        (INTEGERS, [True], "booleans"),
        (FLAG, [1], "integers"),
        (FLAG, [1.0], "floats"),
    ],
)
def test_wrong_kinds_are_refused(spec: TensorSpec, value: Any, kind: str) -> None:
    assert refused(spec, value) == f"Received: {kind}."


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused_with_their_place(number: str) -> None:
    message = f"Received: {number} at index [1, 0]. Every number must be finite."
    assert refused(FLOATS, [[1.0, 2.0], [float(number), 0.0]]) == message


@pytest.mark.parametrize(
    ("spec", "value", "received"),
    [
        (FLOATS, [[0.0, -1e39]], "-1e+39 at index [0, 1], which float32 cannot hold"),
        (HALF, [1.0, 70000.0], "70000.0 at index [1], which float16 cannot hold"),
        (HALF, [70000], "70000 at index [0], which float16 cannot hold"),
    ],
)
def test_numbers_that_overflow_to_infinity_are_refused(spec: TensorSpec, value: Any, received: str) -> None:
    assert refused(spec, value) == f"Received: {received}."


@pytest.mark.parametrize(
    ("spec", "value", "received"),
    [
        (INTEGERS, np.array([0, 2**31]), "2147483648 at index [1]. Every value must be from -2147483648 to 2147483647"),
        (INTEGERS, np.array([2**63], np.uint64), f"{2**63} at index [0]. Every value must be from -2147483648"),
        (BYTES, [-1], "-1 at index [0]. Every value must be from 0 to 255"),
        (TOKENS, [[0, 1, 2], [0, 20, 1]], "20 at index [1, 1]. Every value must be from 0 to 19"),
        (TOKENS, [[-1, 1, 2]], "-1 at index [0, 0]. Every value must be from 0 to 19"),
        (FLOAT_TOKENS, [[0.0, 20.0, 2.0]], "20.0 at index [0, 1]. Every value must be from 0 to 19"),
        (FLOAT_TOKENS, [[0, 1, -1]], "-1 at index [0, 2]. Every value must be from 0 to 19"),
    ],
)
def test_numbers_out_of_range_are_refused(spec: TensorSpec, value: Any, received: str) -> None:
    assert refused(spec, value).startswith(f"Received: {received}")


def test_inputs_come_back_in_the_signatures_order() -> None:
    checked = BOTH.validate({"tokens": np.zeros((4, 3), np.int8), "image": np.ones((4, 2))})
    assert list(checked) == ["image", "tokens"]
    assert rows_of(checked) == 4


def test_a_single_input_needs_no_name() -> None:
    values = np.ones((1, 2))
    assert ONE.named(values)["image"] is values
    assert ONE.named({"image": values})["image"] is values


def test_several_inputs_need_names() -> None:
    with pytest.raises(
        InvalidInputError,
        match=r"by name: 'image' float32 \(rows, 2\), 'tokens' int64 \(rows, 3\). Received: one array without a name",
    ):
        BOTH.named(np.ones((1, 2)))


@pytest.mark.parametrize(
    ("names", "received"),
    [((), "none"), (("image",), "'image'"), (("image", "tokens", "x"), "'image', 'tokens', 'x'"), (("img",), "'img'")],
)
def test_missing_and_unknown_inputs_are_refused(names: tuple[str, ...], received: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"Expected inputs: 'image' .*'tokens' .*\. Received: {received}\.$"):
        BOTH.validate({name: np.ones((1, 2)) for name in names})


def test_inputs_with_different_rows_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"same number of rows .* Received: {'image': 2, 'tokens': 3}"):
        BOTH.validate({"image": np.ones((2, 2)), "tokens": np.zeros((3, 3), np.int64)})
