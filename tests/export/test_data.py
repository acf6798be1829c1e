"""Rows to calibrate with or to select on: whatever holds them, the same comes out, and what is wrong is said."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from support.models import tiny, two_inputs

from bln_serve.errors import UsageError
from bln_serve.export import saved_model
from bln_serve.export.data import Data, read
from bln_serve.signature import ModelSignature, TensorSpec

ROWS = 11
ONE = ModelSignature((TensorSpec("image", "float32", (None, 2, 3)),), (TensorSpec("score", "float32", (None, 4)),))
TWO = ModelSignature(
    (TensorSpec("numbers", "float32", (None, 3)), TensorSpec("tokens", "int32", (None, 5), (0, 19))),
    (TensorSpec("classes", "float32", (None, 3)), TensorSpec("score", "float32", (None, 1))),
)


@pytest.fixture
def x() -> Any:
    return np.random.default_rng(1).integers(0, 256, (ROWS, 2, 3), np.uint8)


@pytest.fixture
def y() -> Any:
    return np.arange(ROWS) % 4


@pytest.fixture
def two() -> dict[str, Any]:
    generator = np.random.default_rng(2)
    return {
        "numbers": generator.normal(size=(ROWS, 3)),
        "tokens": generator.integers(0, 20, (ROWS, 5)),
        "classes": generator.integers(0, 3, ROWS),
        "score": generator.normal(size=(ROWS, 1)),
    }


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def same(data: Data, inputs: list[Any], targets: Any) -> bool:
    pairs = list(zip(data.inputs, inputs, strict=True))
    if isinstance(targets, dict):
        assert list(data.targets) == list(targets)
        pairs += [(data.targets[name], target) for name, target in targets.items()]
    else:
        pairs += [(data.targets, targets)] if targets is not None else []
    assert (data.targets is None) == (targets is None)
    return all(found.dtype == given.dtype and np.array_equal(found, given) for found, given in pairs)


# --- What may hold them


@pytest.mark.parametrize("names", [("x", "y"), ("image", "y"), ("image", "score"), ("x", "score")])
def test_an_archive(names: tuple[str, str], x, y, tmp_path: Path) -> None:
    path = save(tmp_path / "val.npz", **dict(zip(names, (x, y), strict=True)), more=np.zeros(3))
    data = read(str(path), ONE, targets=True)
    assert same(data, [x], y)
    assert (data.rows, data.source) == (ROWS, "val.npz")
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_compressed_archive_without_targets_in_it(x, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "val.npz", x=x)
    assert same(read(tmp_path / "val.npz", ONE, targets=False), [x], None)


def test_targets_that_nobody_wants_are_not_even_read(x, tmp_path: Path) -> None:
    path = save(tmp_path / "val.npz", x=x, y=np.array([{}], dtype=object))
    assert same(read(path, ONE, targets=False), [x], None)


def test_one_array_of_a_file(x, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", x)
    assert same(read(tmp_path / "rows.npy", ONE, targets=False), [x], None)


def test_several_inputs_and_outputs_by_name(two, tmp_path: Path) -> None:
    path = save(tmp_path / "two.npz", **dict(reversed(two.items())))
    targets = {name: two[name] for name in ("classes", "score")}
    assert same(read(path, TWO, targets=True), [two["numbers"], two["tokens"]], targets)


def forms(x: Any, y: Any) -> dict[str, Any]:
    rows = tf.data.Dataset.from_tensor_slices
    return {
        "tuple": (x, y),
        "dict": {"x": x, "y": y},
        "dicts": ({"image": x}, {"score": y}),
        "tensors": (tf.constant(x), tf.constant(y)),
        "rows": rows((x, y)),
        "batches": rows((x, y)).batch(4),
        "named batches": rows(({"image": x}, y)).batch(4).prefetch(1),
        "unknown size": rows((x, y)).filter(lambda *_: True),
        "function": lambda: (x, y),
        "function of a dataset": lambda: rows({"x": x, "y": y}).batch(3),
    }


@pytest.mark.parametrize("form", forms(np.zeros((1, 2, 3)), np.zeros(1)))
def test_every_form_gives_the_same(form: str, x, y) -> None:
    source = forms(x, y)[form]
    assert same(read(source, ONE, targets=True), [x], y)
    assert same(read(source, ONE, targets=False), [x], None)


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: (x,), lambda x: {"x": x}, lambda x: [x]])
@pytest.mark.parametrize("dataset", [False, True])
def test_rows_alone(wrapped, dataset: bool, x) -> None:
    # TensorFlow takes a list for one tensor.
    source = tf.data.Dataset.from_tensor_slices(tuple(wrapped(x)) if isinstance(wrapped(x), list) else wrapped(x))
    assert same(read(source.batch(2) if dataset else wrapped(x), ONE, targets=False), [x], None)


@pytest.mark.parametrize(
    "form", [lambda x, y: (x, y), lambda x, y: (list(x.values()), list(y.values())), lambda x, y: {**x, "y": y}]
)
@pytest.mark.parametrize("size", [None, 0, 4])
def test_several_inputs_and_outputs_in_every_form(form, size: int | None, two) -> None:
    inputs, targets = ({name: two[name] for name in names} for names in (("numbers", "tokens"), ("classes", "score")))
    source = form(inputs, targets)
    if size is not None:
        if isinstance(source[0] if isinstance(source, tuple) else None, list):
            source = tuple(map(tuple, source))
        source = tf.data.Dataset.from_tensor_slices(source)
        source = source.batch(size) if size else source
    assert same(read(source, TWO, targets=True), list(inputs.values()), targets)


def test_a_function_by_name(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_validation.py").write_text(
        "import numpy as np\ndef load():\n    return np.ones((3, 2, 3)), [0, 1, 2]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"in my_validation:load\. Received: 3 arrays for y"):
        read("my_validation:load", ONE, targets=True)
    data = read("my_validation:load", ONE, targets=False)
    assert (data.source, data.rows) == ("my_validation:load", 3)


def test_the_hash_of_arrays_depends_on_all_that_they_are(x, y) -> None:
    first = read((x, y), ONE, targets=True).sha256
    assert first == read({"y": y, "x": np.asfortranarray(x)}, ONE, targets=True).sha256
    others = [(x.astype(np.int16), y), (x, y[::-1]), (x[:-1], y[:-1]), (x, y[:, None])]
    hashes = {read(other, ONE, targets=True).sha256 for other in others} | {read(x, ONE, targets=False).sha256}
    assert len(hashes | {first}) == 6


# --- Mini-batches


def test_whole_mini_batches_in_the_models_dtypes(two) -> None:
    data = read(two, TWO, targets=True)
    batches = list(data.mini_batches(TWO, 4))
    assert len(batches) == data.whole_mini_batches(4) == 2
    for place, (inputs, targets) in enumerate(batches):
        rows = slice(4 * place, 4 * place + 4)
        assert [(each.dtype.name, each.flags.c_contiguous) for each in inputs] == [("float32", True), ("int32", True)]
        np.testing.assert_array_equal(inputs[0], two["numbers"][rows].astype("float32"))
        np.testing.assert_array_equal(inputs[1], two["tokens"][rows])
        assert list(targets) == ["classes", "score"]
        np.testing.assert_array_equal(targets["score"], two["score"][rows])
    assert [targets for _, targets in read(two, TWO, targets=False).mini_batches(TWO, 11)] == [None]


def test_fewer_rows_than_a_mini_batch_are_none(x) -> None:
    data = read(x, ONE, targets=False)
    assert not list(data.mini_batches(ONE, ROWS + 1))
    assert data.whole_mini_batches(ROWS + 1) == 0


def test_images_are_not_held_as_floats() -> None:
    signature = ModelSignature((TensorSpec("x", "float32", (None, 1000)),), ())
    images = np.ones((40_000, 1000), np.uint8)
    tracemalloc.start()
    try:
        data = read(images, signature, targets=False)
        for _ in data.mini_batches(signature, 50):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.inputs[0] is images
    assert peak < images.nbytes  # as floats they are four times as much


def test_a_dataset_is_not_held_twice() -> None:
    signature = ModelSignature((TensorSpec("x", "float32", (None, 1000)),), ())
    dataset = tf.data.Dataset.range(400).map(lambda i: tf.fill((100, 1000), tf.cast(i % 256, tf.uint8)))
    tracemalloc.start()
    try:
        data = read(dataset, signature, targets=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.rows == 40_000
    assert peak < 1.3 * data.inputs[0].nbytes  # an eighth, and pieces of it


def test_targets_take_the_form_of_the_models_outputs(two) -> None:
    import keras

    model = two_inputs()
    data = read(two, saved_model.describe(model).signature, targets=True)
    targets = data.with_targets_like(model.output).targets
    assert {name: targets[name] is two[name] for name in targets} == {"score": True, "classes": True}
    as_list = keras.Model(model.inputs, [model.output["score"], model.output["classes"]])
    signature = saved_model.describe(as_list).signature
    named = {spec.name: two[name] for spec, name in zip(signature.outputs, ("score", "classes"), strict=True)}
    data = read(({"numbers": two["numbers"], "tokens": two["tokens"]}, named), signature, targets=True)
    score, classes = data.with_targets_like(as_list.output).targets
    assert score is two["score"]
    assert classes is two["classes"]


def test_one_output_keeps_its_array(x, y) -> None:
    data = read((x, y), ONE, targets=True)
    assert data.with_targets_like(object()) is data


def test_the_signature_of_a_real_model() -> None:
    signature = saved_model.describe(tiny("PPMM", 5, "tiny")).signature
    rows = np.ones((5, 6, 4))
    ((inputs, _),) = read(rows, signature, targets=False).mini_batches(signature, 5)
    assert inputs[0].dtype == np.float32


# --- What is wrong


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            None,
            r"Expected data in .*val\.npz\. Received: no such file\. Give data\.npz, data\.npy or module:function\.",
        ),
        (b"", r"Expected val\.npz to be a file of NumPy's\. Received: No data left in file\. Write it with np\.savez"),
        (b"x,y\n1,2\n", r"to be a file of NumPy's\. Received: .*pickle.*Write it with np\.savez\("),
        (b"PK\x03\x04 cut off", r"to be a file of NumPy's\. Received: .*zip"),
        (
            b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999999,)}  \n",
            "NumPy's",
        ),
    ],
    ids=["missing", "empty", "text", "cut off", "too large"],
)
def test_a_file_that_is_none(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "val.npz").write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path / "val.npz", ONE, targets=False)


def test_a_damaged_member(x, y, tmp_path: Path) -> None:
    path = save(tmp_path / "val.npz", x=x, y=y)
    content = bytearray(path.read_bytes())
    content[content.index(x.tobytes()) + 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"Expected array 'x' in val\.npz to be numbers that can be read\. Received: Bad"
    ):
        read(path, ONE, targets=True)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = save(tmp_path / "val.npz", x=np.array([Hostile()], dtype=object), y=np.zeros(1))
    with pytest.raises(UsageError, match=r"Expected array 'x' in val\.npz .* Received: Object arrays cannot be loaded"):
        read(path, ONE, targets=True)
    np.save(tmp_path / "rows.npy", np.array([Hostile()], dtype=object))
    with pytest.raises(UsageError, match=r"Expected rows\.npy to be a file of NumPy's\. Received: Object arrays"):
        read(tmp_path / "rows.npy", ONE, targets=False)
    assert not (tmp_path / "ran").exists()


def refused(source: Any, sentence: str, signature: ModelSignature = ONE, targets: bool = True) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(source, signature, targets=targets)


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("form", ["file", "mapping", "dataset", "three"])
def test_sample_weights_are_refused_in_every_form(form: str, targets: bool, x, y, tmp_path: Path) -> None:
    arrays = {"x": x, "y": y, "sample_weight": np.ones(len(y))}
    source: Any = {
        "file": lambda: save(tmp_path / "weighted.npz", **arrays),
        "mapping": lambda: arrays,
        "dataset": lambda: tf.data.Dataset.from_tensor_slices(arrays).batch(4),
        "three": lambda: tuple(arrays.values()),
    }[form]()
    refused(source, r"Sample weights are not taken", targets=targets)


def test_an_input_may_be_called_sample_weight(x) -> None:
    signature = ModelSignature((TensorSpec("sample_weight", "float32", ONE.inputs[0].shape),), ONE.outputs)
    assert same(read({"sample_weight": x}, signature, targets=False), [x], None)


def test_arrays_of_other_names(x, y, two, tmp_path: Path) -> None:
    path = save(tmp_path / "val.npz", images=x, labels=y)
    refused(
        path,
        r"Expected x \('image', float32 \(rows, 2, 3\)\) and y \(targets for 'score', float32 \(rows, 4\)\) in "
        r"val\.npz\. Received: 'images', 'labels'\. A file is written with np\.savez",
    )
    refused({"x": x}, r"in arrays\. Received: 'x'\.")
    refused({}, r"Received: nothing\.")
    two.pop("tokens")
    refused(two, r"Expected 'numbers' float32 \(rows, 3\), 'tokens' .* Received: 'numbers', 'classes', 'score'", TWO)


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (lambda x, y: x, r"Received: no targets\."),
        (lambda x, y: (x, y, y), r"Received: 3 parts\. Sample weights are not taken\."),
        (lambda x, y: [x, y], r"Received: 2 arrays for x\. Several inputs go in a list, \(x, y\) is a tuple"),
        (lambda x, y: (x, [0, 1]), "Received: 2 arrays for y"),
        (lambda x, y: ("x", y), r"Received: a str\. Make it an array"),
        (lambda x, y: None, "Received: one array for x"),
    ],
    ids=["no targets", "weights", "list", "numbers", "text", "nothing"],
)
def test_other_forms(form, sentence: str, x, y) -> None:
    refused(form(x, y), sentence)


def test_one_array_for_several(two, x) -> None:
    refused(x, "Received: one array for x", TWO)
    refused(([two["numbers"], two["tokens"]], two["score"]), "Received: one array for y", TWO)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda x, y: (x[0], y),
            r"Expected input 'image' in arrays to be float32 \(rows, 2, 3\)\. Received: shape \(2, 3\)",
        ),
        (lambda x, y: (x[:, :1], y), r"Received: shape \(11, 1, 3\)\. Give the rows as"),
        (
            lambda x, y: (x[:-1], y),
            r"Expected the same number of rows in every array of arrays\. Received: \{'image': 10, ",
        ),
        (lambda x, y: (x[:0], y[:0]), r"Expected rows in arrays\. Received: none\. Give at least one mini-batch"),
        (lambda x, y: (x.astype(str), y), r"to be float32 \(rows, 2, 3\)\. Received: text\. Convert it to float32"),
        (lambda x, y: (x.astype(object), y), r"Received: mixed values\."),
        (lambda x, y: (x * 1j, y), r"Received: complex numbers\."),
        (lambda x, y: (x.astype("datetime64[s]"), y), r"Received: datetime64"),
        (
            lambda x, y: (x + 1e300, y),
            r"Received: 1e\+300 at index \[0, 0, 0\]\. Every value must be finite and fit float32",
        ),
        (lambda x, y: (x, y[:, None, None]), r"Expected targets for output 'score' in arrays of shape \(rows\) or "),
        (
            lambda x, y: (x, np.zeros((ROWS, 3))),
            r"\(rows, 1\) or \(rows, 4\)\. Received: \(11, 3\)\. Give a label or a",
        ),
        (lambda x, y: (x, np.float64(1)), r"Received: \(\)\."),
        (lambda x, y: (x, y.astype(str)), r"Expected 'score' in arrays to be .* Received: text"),
        (lambda x, y: (x, np.where(y == 2, np.nan, y)), r"Received: nan at index \[2\]\. Every value must be finite"),
    ],
)
def test_arrays_that_do_not_fit(change, sentence: str, x, y) -> None:
    refused(change(x, y), sentence)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1), (ROWS, 4)])
def test_shapes_of_targets(shape: tuple[int, ...], x) -> None:
    assert read((x, np.zeros(shape)), ONE, targets=True).targets.shape == shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 6000, 9999])
def test_every_piece_is_looked_through(value: float, row: int) -> None:
    signature = ModelSignature((TensorSpec("x", "float32", (None, 300)),), ())
    rows = np.zeros((10_000, 300), np.float32)
    rows[row, 7] = value
    refused(rows, rf"Received: {value} at index \[{row}, 7\]\. Every value must be finite", signature, targets=False)


@pytest.mark.parametrize(
    ("value", "dtype", "received"),
    [
        (20, "int64", "20"),
        (-1, "int8", "-1"),
        (20, "uint8", "20"),
        (3.5, "float64", "3.5"),
        (20.0, "float32", "20.0"),
        (np.nan, "float32", "nan"),
        (np.inf, "float16", "inf"),
    ],
)
def test_integers_out_of_range(value: float, dtype: str, received: str, two) -> None:
    tokens = two["tokens"].astype(dtype)
    tokens[4, 2] = value
    refused(
        {**two, "tokens": tokens},
        rf"Expected 'tokens' .* Received: {received} at index \[4, 2\]\. Every value must be a whole number from 0 to",
        TWO,
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float16", "float64", "bool"])
def test_whole_numbers_are_taken_for_integers(dtype: str, two) -> None:
    tokens = two["tokens"].astype(dtype)
    data = read({**two, "tokens": tokens}, TWO, targets=True)
    ((inputs, _),) = data.mini_batches(TWO, ROWS)
    np.testing.assert_array_equal(inputs[1], tokens)


@pytest.mark.parametrize(
    ("target", "value"),
    [("int32", 2**31), ("int32", -(2**31) - 1), ("int32", 2.0**31), ("int64", 2.0**63), ("uint8", -1), ("uint8", 256)],
)
def test_what_an_integer_cannot_hold(target: str, value: float) -> None:
    signature = ModelSignature((TensorSpec("x", target, (None,)),), ())
    refused(np.array([0, value]), r"at index \[1\]\. Every value must be a whole number from", signature, targets=False)


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), float(2**31 - 1)])
def test_what_an_integer_can_just_hold(value: float) -> None:
    signature = ModelSignature((TensorSpec("x", "int32", (None,)),), ())
    ((inputs, _),) = read(np.array([value]), signature, targets=False).mini_batches(signature, 1)
    assert inputs[0][0] == value


def test_a_float_that_indexes_a_table() -> None:
    signature = ModelSignature((TensorSpec("x", "float32", (None,), (0, 9)),), ())
    read(np.array([0.0, 9.0, 3.5]), signature, targets=False)
    refused(
        np.array([0, 10], np.uint8), r"Received: 10 at index \[1\]\. Every value must be from 0 to 9", signature, False
    )
    refused(np.array([0, 9.5]), r"Received: 9\.5 at index \[1\]", signature, False)


def test_integers_that_half_precision_cannot_hold() -> None:
    signature = ModelSignature((TensorSpec("x", "float16", (None,)),), ())
    refused(np.array([1, 70_000]), r"Received: 70000 at index \[1\]\. .* fit float16", signature, targets=False)


def test_booleans_are_booleans() -> None:
    signature = ModelSignature((TensorSpec("x", "bool", (None,)),), ())
    assert read(np.array([True]), signature, targets=False).rows == 1
    refused(np.array([1]), r"Expected 'x' in arrays to be bool \(rows\)\. Received: int64", signature, targets=False)


# --- Datasets and functions


def test_a_dataset_that_never_ends(x, y) -> None:
    refused(
        tf.data.Dataset.from_tensor_slices((x, y)).repeat(), "Expected a dataset with an end in arrays. Received: one"
    )


def test_an_empty_dataset(x, y) -> None:
    refused(tf.data.Dataset.from_tensor_slices((x, y)).take(0), "Expected rows in arrays. Received: a dataset without")


def test_a_dataset_of_another_rank(x, y) -> None:
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    refused(
        rows.batch(2).batch(2), r"a dataset of elements \{'image': '\(None, None, 2, 3\)'\}, neither rows nor batches"
    )


def test_a_dataset_of_ragged_rows() -> None:
    ragged = tf.ragged.constant([[[1.0], [2.0]], [[3.0]]], ragged_rank=1)
    refused(
        tf.data.Dataset.from_tensor_slices((ragged, [0, 1])), "Received: 'image', which is ragged or sparse. Pad it"
    )


def test_a_dataset_whose_rows_differ_in_shape() -> None:
    def rows():
        for length in (2, 3):
            yield np.zeros((1, length, 3), np.float32)

    spec = tf.TensorSpec((None, None, 3), tf.float32)
    dataset = tf.data.Dataset.from_generator(rows, output_signature=spec)
    refused(
        dataset, r"Expected rows of one shape for 'image' in arrays\. Received: \(2, 3\) and \(3, 3\)", targets=False
    )


def test_a_dataset_that_raises(x, y) -> None:
    def broken(*_):
        raise RuntimeError("no such image")

    dataset = tf.data.Dataset.from_tensor_slices(x).map(
        lambda v: tf.ensure_shape(tf.py_function(broken, [v], tf.uint8), (2, 3))
    )
    refused(
        dataset, "Expected the dataset of arrays to give rows. It raised UnknownError: .*no such image", targets=False
    )


def test_a_function_that_raises() -> None:
    def broken():
        raise RuntimeError("no such data")

    refused(broken, r"Expected .*test_data:.*broken to return data\. It raised: RuntimeError\('no such data'\)")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("validation.csv", r"Expected data as data\.npz, data\.npy or module:function\. Received: 'validation\.csv'"),
        ("no_such_module:load", "Expected data's module no_such_module to import. It raised: ModuleNotFoundError"),
        ("json:no_such_function", "Expected a function no_such_function in module json. Received: None"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, sentence: str) -> None:
    refused(name, sentence)
