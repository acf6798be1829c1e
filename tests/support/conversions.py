"""Converting a Keras model and asking it and Keras the same; Keras is the oracle."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bln_serve.export import conversion, freezing, saved_model
from bln_serve.export.conversion import Conversion
from bln_serve.export.saved_model import Callee
from bln_serve.runtime import OnnxSession
from bln_serve.signature import Arrays
from bln_serve.statistics import StatisticsPolicy

WORDS = 20
"""How many words every embedding of these models knows; integers are drawn below it."""


@dataclass(frozen=True)
class Converted:
    """A Keras model beside its ONNX model.

    Attributes:
        callee: the Keras model, under its policies.
        found: the conversion.
        session: runs the ONNX model.
    """

    callee: Callee
    found: Conversion
    session: OnnxSession

    def keras(self, x: Arrays, size: int) -> Arrays:
        """Return what `model.predict(x, batch_size=size)` answers, by the outputs' names."""
        model = self.callee.model
        answers = model.predict(self.callee.pack(x.values()), batch_size=size, verbose=0)
        return self.callee.by_name(answers)

    def each_alone(self, x: Arrays, size: int) -> Arrays:
        """Return what ONNX Runtime answers to one mini-batch of `size` rows after the other."""
        rows = len(next(iter(x.values())))
        parts = [
            self.session.run({name: values[start : start + size] for name, values in x.items()})
            for start in range(0, rows, size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def takes(self, name: str) -> bool:
        """Whether the ONNX model has an input of this name."""
        return any(value.name == name for value in self.found.model.graph.input)

    def in_one_run(self, x: Arrays, mini_batches: int = 1) -> Arrays:
        """Return what ONNX Runtime answers to all rows in one run."""
        return self.session.run(x, mini_batches)


def converted(model: Any, policy: str | None = None) -> Converted:
    """Convert a model under its layers' own policies, or under one that is not asked whether it is usable."""
    model = saved_model.functional(model)
    if policy is None:
        frozen = freezing.freeze(model, None)
    else:
        chosen = StatisticsPolicy.from_code(policy)
        frozen = tuple(replace(item, policy=chosen) for item in freezing.freeze(model, "mini-batch"))
        for item in frozen:
            item.layer.policy = chosen
        model.predict_function = None
    model.run_eagerly = True  # else predict traces anew for every model, which takes longer than all it computes here
    callee = saved_model.describe(model)
    found = conversion.convert(callee, frozen)
    return Converted(callee, found, OnnxSession(found.model.SerializeToString(), threads=1))


def inputs_of(model: Converted, rows: int, seed: int = 0) -> Arrays:
    """Draw rows for every input: normal floats, words, booleans."""
    generator = np.random.default_rng([seed, rows])
    return {
        spec.name: _values(spec.dtype, (rows, *spec.shape[1:]), generator) for spec in model.callee.signature.inputs
    }


def _values(dtype: str, shape: tuple[int, ...], generator: np.random.Generator) -> Any:
    if np.dtype(dtype).kind == "f":
        return generator.normal(0.3, 1.2, shape).astype(dtype)
    return generator.integers(0, 2 if dtype == "bool" else WORDS, shape).astype(dtype)


def first(values: Arrays, rows: int) -> Arrays:
    """Return the first rows of each."""
    return {name: each[:rows] for name, each in values.items()}


def worst_error(actual: Arrays, expected: Arrays) -> float:
    """Return the largest difference over the outputs, each relative to its own largest value."""
    assert actual.keys() == expected.keys()
    return max(_error(actual[name], np.asarray(expected[name])) for name in expected)


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert np.isfinite(expected).all()
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / (np.abs(expected).max() or 1.0))
