"""Inputs that index an embedding: within the table's rows in every sample, whatever their dtype, and checked so."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support import models

import bln_serve
from bln_serve.cli.verify import main as verify
from bln_serve.errors import InvalidInputError
from bln_serve.export import export


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
