"""Inputs that index an embedding: found on the graph, within the table's rows in every sample, and checked so."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support import models

import bln_serve
from bln_serve.cli.verify import main as verify
from bln_serve.errors import InvalidInputError, UnsupportedModelError
from bln_serve.export import conversion, export, freezing, saved_model


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_tokens_of_any_dtype_are_exported_verified_and_kept_in_range(tmp_path: Path, dtype: str) -> None:
    keras.utils.set_random_seed(1)
    tokens = keras.Input((5,), dtype=dtype, name="tokens")
    y = models.bln(4, "PPMM", "bln")(layers.Embedding(20, 4)(tokens))
    model = keras.Model(tokens, layers.Dense(2)(layers.Flatten()(y)), name="words")
    artifact = export(models.with_random_statistics(model), tmp_path)
    (spec,) = artifact.manifest.signature.inputs
    assert (spec.dtype, spec.value_range) == (dtype, (0, 19))
    drawn = np.concatenate([sample.inputs["tokens"] for sample in artifact.samples()])
    assert drawn.dtype == dtype
    assert set(np.unique(drawn)) == set(range(20))
    assert verify([str(artifact.path)]) == 0
    with pytest.raises(InvalidInputError, match=r"20(\.0)? at index \[0, 0\]. Every value must be from 0 to 19"):
        bln_serve.load(artifact.path).predict(np.full((1, 5), 20, dtype))


def convert(model: keras.Model) -> conversion.Conversion:
    frozen = freezing.freeze(models.with_random_statistics(model), None)
    return conversion.convert(saved_model.describe(model), frozen, 18)


def words(tokens: Any, rows: int = 20) -> Any:
    return layers.Flatten()(layers.Embedding(rows, 3)(tokens))


def shifted(tokens: Any) -> Any:
    return words(tokens + 2) + words(tokens - 1, 30)


def clipped(tokens: Any) -> Any:
    return words(keras.ops.minimum(tokens, 5))


class Doubled(layers.Embedding):
    def call(self, inputs):
        return 2 * super().call(inputs)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (words, (0, 19)),
        (lambda tokens: words(tokens) + words(tokens, 7), (0, 6)),
        (lambda tokens: words(layers.Reshape((1, 5))(tokens)), (0, 19)),
        (lambda tokens: layers.Flatten()(Doubled(20, 3)(tokens)), (0, 19)),
        (lambda tokens: words(keras.Sequential([layers.Reshape((5, 1))])(tokens)), (0, 19)),
        (lambda tokens: layers.Flatten()(keras.Sequential([layers.Embedding(20, 3)])(tokens)), (0, 19)),
        (lambda tokens: layers.Flatten()(tokens) * 2, None),
    ],
    ids=["one table", "the smaller of two", "reshaped", "own call", "nested before", "nested", "none"],
)
def test_the_range_is_that_of_the_table_however_the_model_is_put_together(build, expected, dtype: str) -> None:
    tokens = keras.Input((5,), dtype=dtype, name="tokens")
    found = convert(keras.Model(tokens, layers.Dense(2)(build(tokens)))).index_ranges
    assert found == ({"tokens": expected} if expected else {})


@pytest.mark.parametrize(("build", "expected"), [(shifted, (1, 17)), (clipped, (0, 2**31 - 1))])
def test_arithmetic_before_the_table_moves_the_range(build, expected: tuple[int, int]) -> None:
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    assert convert(keras.Model(tokens, layers.Dense(2)(build(tokens)))).index_ranges == {"tokens": expected}


def test_each_input_has_its_own_range_under_every_row_coupling() -> None:
    for policy in ("PPMM", "PPPP", "MMMM"):
        found = convert(models.two_inputs(policy)).index_ranges
        assert found == {"tokens": (0, 19)}  # and none for the number of mini-batches


def test_columns_that_index_tables_of_different_lengths_need_inputs_of_their_own(tmp_path: Path) -> None:
    ids = keras.Input((2,), dtype="int32", name="ids")
    looked_up = [layers.Embedding(length, 4)(ids[:, column]) for column, length in enumerate((10, 100))]
    model = keras.Model(ids, models.bln(4, "PPMM", "bln")(layers.Add()(looked_up)), name="columns")
    with pytest.raises(
        UnsupportedModelError, match=r"Received: indices.* is not in \[0, 10\)\. Where .*give each an Input of its own"
    ) as caught:
        export(models.with_random_statistics(model), tmp_path)
    assert "Expected Keras to answer a request with values that its inputs may have." in str(caught.value)
