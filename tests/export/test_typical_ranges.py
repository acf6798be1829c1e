"""Where an input's values are expected to lie, as the model's own first layer says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.models import bln, with_random_statistics

from bln_serve.export import pipeline, samples, saved_model
from bln_serve.export.typical_ranges import Range, with_typical_ranges
from bln_serve.manifest import Manifest, read_manifest

GOLDEN = Path(__file__).parents[1] / "golden" / "artifacts" / "tiny_pppp" / "1"


def ranges(model: keras.Model) -> dict[str, Range | None]:
    return {spec.name: spec.typical_range for spec in with_typical_ranges(saved_model.describe(model)).signature.inputs}


def adapted() -> layers.Layer:
    """Return a layer that has seen a column about 10, deviation 2, and one about -4, deviation 1."""
    layer = layers.Normalization(axis=-1)
    layer.adapt(np.array([[8.0, -5.0], [12.0, -3.0]] * 4))
    return layer


ONE_INPUT: dict[str, tuple[Callable[[], Any], Range | None]] = {
    "0 to 255": (lambda: layers.Rescaling(1 / 255), (0.0, 255.0)),
    "0 to 16": (lambda: layers.Rescaling(0.0625), (0.0, 16.0)),
    "to -1 and 1": (lambda: layers.Rescaling(1 / 127.5, offset=-1), (0.0, 255.0)),
    "to -0.5 and 0.5": (lambda: layers.Rescaling(1 / 255, offset=-0.5), (0.0, 255.0)),
    "negative scale": (lambda: layers.Rescaling(-1 / 255), None),
    "scale of 0": (lambda: layers.Rescaling(0.0), None),
    "positive offset": (lambda: layers.Rescaling(1 / 255, offset=1), None),
    "a scale for each channel": (lambda: layers.Rescaling([1 / 255, 1 / 16]), None),
    "adapted": (adapted, (-7.0, 16.0)),
    "given": (lambda: layers.Normalization(mean=3.0, variance=4.0), (-3.0, 9.0)),
    "inverted": (lambda: layers.Normalization(mean=3.0, variance=4.0, invert=True), None),
    "wider than integers": (lambda: layers.Rescaling(1e-30), None),
    "no number": (lambda: layers.Normalization(mean=float("nan"), variance=4.0), None),
    "behind another layer": (lambda: keras.Sequential([layers.ReLU(), layers.Rescaling(1 / 255)]), None),
    "none": (layers.ReLU, None),
}


@pytest.mark.parametrize(("make", "expected"), ONE_INPUT.values(), ids=ONE_INPUT.keys())
def test_one_input(make: Callable[[], Any], expected: Range | None) -> None:
    x = keras.Input((2,), name="x")
    (found,) = ranges(keras.Model(x, make()(x))).values()
    assert found == (expected and pytest.approx(expected, rel=1e-6))  # a layer keeps its scale in float32


def test_sequential() -> None:
    model = keras.Sequential([keras.Input((2,), name="x"), layers.Rescaling(1 / 255), layers.Dense(2)])
    assert list(ranges(model).values()) == [pytest.approx((0, 255))]


def test_several_inputs_have_each_their_own() -> None:
    image, numbers, other = (keras.Input((2,), name=name) for name in ("image", "numbers", "other"))
    joined = layers.Concatenate()([layers.Rescaling(1 / 255)(image), adapted()(numbers), other])
    found = ranges(keras.Model([other, image, numbers], joined))
    assert found == {"image": pytest.approx((0, 255)), "numbers": pytest.approx((-7, 16)), "other": None}


def test_one_layer_on_two_inputs() -> None:
    one, two = keras.Input((2,), name="one"), keras.Input((2,), name="two")
    twice = layers.Rescaling(1 / 255)
    assert ranges(keras.Model([one, two], twice(one) + twice(two))) == {"one": (0, 255), "two": (0, 255)}


def test_of_another_model_the_layer_says_nothing() -> None:
    shared = layers.Rescaling(1 / 255)
    elsewhere = keras.Input((2,), name="elsewhere")
    keras.Model(elsewhere, shared(elsewhere))
    x = keras.Input((2,), name="x")
    assert ranges(keras.Model(x, shared(layers.ReLU()(x)))) == {"x": None}


def test_labels_and_index_ranges_are_kept() -> None:
    x = keras.Input((2,), name="x")
    callee = saved_model.describe(keras.Model(x, layers.Rescaling(1 / 255)(x)))
    (spec,) = callee.signature.inputs
    labelled = replace(callee, signature=replace(callee.signature, inputs=(replace(spec, labels=("a", "b")),)))
    (found,) = with_typical_ranges(labelled).signature.inputs
    assert (found.labels, found.typical_range) == (("a", "b"), pytest.approx((0, 255)))


def test_what_is_written_into_a_manifest_is_read_again() -> None:
    golden = read_manifest(GOLDEN)
    (spec,) = golden.signature.inputs
    for limits in ((0.0, 255.0), (-7.25, 16.0), None):
        signature = replace(golden.signature, inputs=(replace(spec, typical_range=limits),))
        manifest = replace(golden, signature=signature)
        assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_samples_are_drawn_within_and_around_it() -> None:
    x = keras.Input((50,), name="x")
    callee = with_typical_ranges(saved_model.describe(keras.Model(x, layers.Rescaling(1 / 255)(x))))
    for spread in samples.SPREADS:
        values = samples.draw(callee.signature.inputs, 400, np.random.default_rng(0), spread)["x"]
        middle, deviation = 127.5 + 63.75 * spread.mean, 63.75 * spread.deviation
        assert abs(values.mean() - middle) <= 0.03 * deviation
    first = samples.draw(callee.signature.inputs, 400, np.random.default_rng(0))["x"]
    within = ((first >= 0) & (first <= 255)).mean()
    assert 0.94 <= within <= 0.97  # two deviations to each side: 95.4 %


def test_an_export_tells_clients_of_it_and_takes_what_lies_outside(tmp_path: Path) -> None:
    x = keras.Input((6,), name="image")
    y = bln(4, "PPMM", "bln")(layers.Rescaling(1 / 255)(x))
    model = with_random_statistics(keras.Model(x, y, name="bright"))
    (spec,) = pipeline.export_onnx(model, tmp_path / "bright.onnx").signature.inputs
    assert spec.typical_range == pytest.approx((0, 255))
    spec.validate(np.full((1, 6), -1000.0))
