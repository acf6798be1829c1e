"""Labels that a crossentropy cannot be taken of are refused, by row; Keras would go on with a wrong number."""

from typing import Any

import keras
import numpy as np
import pytest

from bln_serve.errors import UsageError
from bln_serve.export.data import read
from bln_serve.export.data.labels import check_labels
from bln_serve.signature import ModelSignature, TensorSpec

X = TensorSpec("x", "float32", (None, 2))
CLASSES = ModelSignature((X,), (TensorSpec("class", "float32", (None, 3)),))
BINARY = ModelSignature((X,), (TensorSpec("yes", "float32", (None, 1)),))
STEPS = ModelSignature((X,), (TensorSpec("words", "float32", (None, 4, 3)),))
BOTH = ModelSignature((X,), (*CLASSES.outputs, *BINARY.outputs))
SPARSE = "sparse_categorical_crossentropy"


def check(signature: ModelSignature, targets: Any, loss: Any) -> None:
    rows = len(next(iter(targets.values())) if isinstance(targets, dict) else targets)
    check_labels(read((np.zeros((rows, 2)), targets), signature, targets=True), signature, loss)


@pytest.mark.parametrize(
    "loss",
    [
        SPARSE,
        "SparseCategoricalCrossentropy",
        keras.losses.sparse_categorical_crossentropy,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        [SPARSE],
        {"class": SPARSE},
    ],
)
@pytest.mark.parametrize(
    ("label", "received"), [(3, "3"), (-1, "-1"), (1.5, "1.5"), (3.0, "3.0")], ids=["high", "low", "part", "float"]
)
def test_classes(loss: Any, label: float, received: str) -> None:
    check(CLASSES, np.array([0, 1, 2, 2, 0]), loss)
    check(CLASSES, np.array([[0.0], [2.0]]), loss)
    labels = np.array([0, 1, label, label])
    with pytest.raises(
        UsageError,
        match=r"Expected every label for output 'class' in arrays to be a whole number from 0 to 2\. "
        rf"Received: {received} in row 2\. Correct the labels, or take another loss",
    ):
        check(CLASSES, labels, loss)


def test_a_class_that_is_ignored() -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=255)
    check(CLASSES, np.array([0, 255, 2], np.uint8), loss)
    with pytest.raises(UsageError, match="Received: 254 in row 1"):
        check(CLASSES, np.array([0, 254, 2], np.uint8), loss)


def test_classes_of_steps() -> None:
    labels = np.zeros((5, 4), np.int64)
    check(STEPS, labels, SPARSE)
    labels[3, 2] = 3
    with pytest.raises(UsageError, match=r"output 'words' .* from 0 to 2\. Received: 3 in row 3\."):
        check(STEPS, labels, SPARSE)


def test_one_hot_targets_for_a_sparse_loss() -> None:
    with pytest.raises(
        UsageError, match=r"of shape \(2\), one a row\. Received: \(2, 3\)\. For one-hot targets take categorical_cross"
    ):
        check(CLASSES, np.eye(3)[:2], SPARSE)


@pytest.mark.parametrize("loss", ["bce", "binary_crossentropy", keras.losses.BinaryFocalCrossentropy()])
def test_binary(loss: Any) -> None:
    for labels in (np.array([0, 1]), np.array([[True], [False]]), np.array([0.0, 0.3])):
        check(BINARY, labels, loss)
    for label in (2, -1, 1.01):
        with pytest.raises(
            UsageError, match=rf"'yes' in arrays to be from 0 to 1\. Received: {label:.4g}.* in row 1\."
        ):
            check(BINARY, np.array([0, label]), loss)
    with pytest.raises(UsageError, match=r"of shape \(2, 3\), as the answers are\. Received: \(2,?\)\. Give a 0 or 1"):
        check(CLASSES, np.array([0, 1]), loss)


def test_categorical() -> None:
    check(CLASSES, np.eye(3), "categorical_crossentropy")
    with pytest.raises(
        UsageError,
        match=r"of shape \(3, 3\), as the answers are\. Received: \(3\)\. For a label a row take sparse_categorical",
    ):
        check(CLASSES, np.array([0, 1, 2]), keras.losses.CategoricalCrossentropy())


@pytest.mark.parametrize("loss", ["crossentropy", "ce", "CE"])
def test_a_crossentropy_that_keras_chooses_by_the_shapes(loss: str) -> None:
    for good, bad, signature, message in (
        (np.array([0, 2]), np.array([0, 3]), CLASSES, "'class' .* a whole number from 0 to 2. Received: 3 in row 1"),
        (np.array([[0], [2]]), np.array([[0], [3]]), CLASSES, "'class' .* from 0 to 2. Received: 3 in row 1"),
        (np.array([0, 1]), np.array([0, 2]), BINARY, "'yes' .* to be from 0 to 1. Received: 2 in row 1"),
        (np.eye(3), None, CLASSES, ""),
        (np.zeros((2, 4), int), np.full((2, 4), 3), STEPS, "'words' .* from 0 to 2. Received: 3 in row 0"),
    ):
        check(signature, good, loss)
        if bad is not None:
            with pytest.raises(UsageError, match=message):
                check(signature, bad, loss)


@pytest.mark.parametrize("loss", ["mse", keras.losses.Huber(), lambda y, p: y - p, None])
def test_other_losses_take_any_numbers(loss: Any) -> None:
    check(CLASSES, np.full((2, 3), -7.5), loss)


@pytest.mark.parametrize(
    "loss", [{"class": SPARSE, "yes": "bce"}, [SPARSE, keras.losses.BinaryCrossentropy()], {"yes": "bce"}]
)
def test_several_outputs(loss: Any) -> None:
    targets = {"class": np.array([0, 2]), "yes": np.array([0, 1])}
    check(BOTH, targets, loss)
    with pytest.raises(UsageError, match="output 'yes' in arrays to be from 0 to 1. Received: 2 in row 1"):
        check(BOTH, {**targets, "yes": np.array([0, 2])}, loss)
    wrong = {**targets, "class": np.array([5, 2])}
    if SPARSE in str(loss):
        with pytest.raises(UsageError, match="output 'class' in arrays .* Received: 5 in row 0"):
            check(BOTH, wrong, loss)
    else:
        check(BOTH, wrong, loss)


def test_keras_itself_says_nothing_of_a_label_out_of_range() -> None:
    """Why labels are checked here: a loss below 0 beats every other."""
    assert keras.losses.BinaryCrossentropy()(np.array([[5.0]]), np.array([[0.99]])) < 0
