"""The loss and the metrics that validation data is scored with are those of the compiled model, or Keras's by name."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.keras_files import HOSTILE, compiled_like, rewrite_config
from support.models import tiny, two_inputs
from support.reference_files import LEGACY

from bln_serve.errors import ModelLoadError, UsageError
from bln_serve.export.loading import load
from bln_serve.export.selection.scoring import Scoring, compiled, scoring

SPARSE = "sparse_categorical_crossentropy"
# Sums of float32 in another order; 1e-6 was measured.
RTOL = 1e-5


def classifier(ending: Any = None, classes: int = 3) -> Any:
    """Return a model (rows, 6) -> (rows, classes), ending in an activation or a layer."""
    keras.utils.set_random_seed(11)
    x = keras.Input((6,), name="x")
    is_layer = isinstance(ending, layers.Layer)
    y = layers.Dense(classes, None if is_layer else ending, name="score")(x)
    return keras.Model(x, ending(y) if is_layer else y, name="classifier")


def rows(classes: int = 3) -> tuple[Any, Any]:
    generator = np.random.default_rng(12)
    return generator.normal(size=(20, 6)).astype("float32"), generator.integers(0, max(classes, 2), 20)


def evaluated(model: Any, score: Scoring, x: Any, y: Any) -> dict[str, float]:
    """Return what another model of the same layers scores."""
    wrapper = keras.Model(model.inputs, model.output)
    wrapper.compile(**score.compile_arguments(), jit_compile=False)
    return wrapper.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)


def saved(model: Any, folder: Path, **arguments: Any) -> Path:
    if arguments:
        model.compile("adam", **arguments)
    model.save(folder / "model.keras")
    return folder / "model.keras"


# --- As compiled

COMPILED = {
    "name": {"loss": SPARSE, "metrics": ["accuracy"]},
    "class": {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1),
        "metrics": ["sparse_categorical_accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")],
    },
    "function": {
        "loss": keras.losses.sparse_categorical_crossentropy,
        "metrics": [keras.metrics.sparse_categorical_accuracy],
    },
    "wrapped": {
        "loss": "mse",
        "metrics": [keras.metrics.MeanMetricWrapper(keras.metrics.mean_absolute_error, name="own")],
        "weighted_metrics": ["mse"],
        "loss_weights": [3.0],
    },
    "no metrics": {"loss": SPARSE},
    "by shape": {"loss": "crossentropy", "metrics": ["acc"]},
}


@pytest.mark.parametrize("arguments", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "model"])
def test_a_model_scores_as_it_does_compiled(arguments: dict, from_file: bool, tmp_path: Path) -> None:
    model = classifier("softmax")
    path = saved(model, tmp_path, **arguments)
    x, y = rows()
    y = np.eye(3)[y] if arguments["loss"] == "mse" else y
    expected = model.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    used = load(path) if from_file else model
    score = scoring(used, path if from_file else None, None, [])
    found = evaluated(used, score, x, y)
    assert found == pytest.approx(expected, rel=RTOL, abs=0)
    assert score.notes == ()


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "model"])
def test_several_outputs_score_as_compiled(from_file: bool, tmp_path: Path) -> None:
    model = two_inputs()
    model.compile(
        loss={"score": keras.losses.Huber(), "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        loss_weights={"score": 0.25, "classes": 2.0},
        metrics={"classes": ["accuracy"], "score": [keras.metrics.RootMeanSquaredError()]},
    )
    path = saved(model, tmp_path)
    generator = np.random.default_rng(5)
    x = {"numbers": generator.normal(size=(10, 3)), "tokens": generator.integers(0, 20, (10, 5))}
    y = {"score": generator.normal(size=(10, 1)), "classes": generator.integers(0, 3, 10)}
    expected = model.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    used = load(path) if from_file else model
    score = scoring(used, path if from_file else None, None, [])
    assert evaluated(used, score, x, y) == pytest.approx(expected, rel=RTOL, abs=0)
    assert score.loss_name in (
        "score: huber_loss, classes: sparse_categorical_crossentropy",
        "classes: sparse_categorical_crossentropy, score: huber_loss",
    )


def test_a_scoring_can_differ_from_another() -> None:
    """The comparison above can fail."""
    model = classifier("softmax")
    x, y = rows()
    one, other = (evaluated(model, scoring(model, None, loss, []), x, np.eye(3)[y])["loss"] for loss in ("mae", "mse"))
    assert abs(one - other) > 0.01 * abs(one)


def test_the_models_own_metrics_keep_their_state() -> None:
    model = classifier("softmax")
    own = keras.metrics.SparseCategoricalAccuracy(name="own")
    model.compile(loss=SPARSE, metrics=[own])
    x, y = rows()
    model.evaluate(x, y, verbose=0)
    before = float(own.result())
    score = scoring(model, None, None, [])
    evaluated(model, score, x[:5], (y[:5] + 1) % 3)
    assert float(own.result()) == before
    assert score.metrics[0] is not own


@pytest.mark.parametrize("names", [[], ["SparseTopKCategoricalAccuracy"], [SPARSE]])
def test_models_that_are_compiled_alike_keep_their_metrics_apart(names: list[str]) -> None:
    model = classifier("softmax")
    model.compile(loss=SPARSE, metrics=[keras.metrics.SparseCategoricalAccuracy()], weighted_metrics=[SPARSE])
    score = scoring(model, None, None, names)
    x, y = rows()
    judges = [keras.Model(model.inputs, model.output) for _ in range(2)]
    for judge in judges:
        judge.compile(**score.compile_arguments(), jit_compile=False)
    before = judges[0].evaluate(x, y, verbose=0, return_dict=True)
    judges[1].evaluate(x[:5], (y[:5] + 1) % 3, verbose=0)
    assert {name: float(value) for name, value in judges[0].get_metrics_result().items()} == before


def test_a_metric_that_cannot_be_copied() -> None:
    class Own(keras.metrics.Mean):
        def __init__(self, scale, **options):
            super().__init__(**options)

    model = classifier("softmax")
    model.compile(loss=SPARSE, metrics=[Own(2.0, name="own")])
    with pytest.raises(UsageError, match="Expected metrics that Keras can copy. Received: 'own', where that failed: "):
        scoring(model, None, None, [])
    assert scoring(model, None, None, ["accuracy"]).metrics == ["accuracy"]


@pytest.mark.parametrize("part", ["loss", "metrics", "weighted_metrics"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_a_file_names_is_neither_imported_nor_called(hostile: str, part: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Loss: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    item, named = HOSTILE[hostile]
    model = classifier("softmax")
    path = rewrite_config(saved(model, tmp_path), compiled_like({part: [item] if "metrics" in part else item}))
    sentence = (
        rf"Expected {part.removeprefix('weighted_')} of Keras's own\. Received: model\.keras, which was compiled with "
        rf"{named}\. No code that a file names is imported or run: name Keras's with --loss and --metric"
    )
    with pytest.raises(UsageError, match=sentence):
        scoring(model, path, None, [])
    left_out = scoring(model, path, SPARSE, [])
    assert left_out.metrics is None
    assert part == "loss" or "The compiled metrics are left out. Expected metrics of Keras's own. Received: " in str(
        left_out.notes
    )
    assert scoring(model, path, SPARSE, ["accuracy"]).metrics == ["accuracy"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "part",
    [
        {"loss": {"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "function"}},
        {"loss": "no_such_loss"},
        {"loss": 7},
        {"loss": {"module": "keras.losses", "class_name": "Huber", "config": {"no": "such"}}},
        {"metrics": ["no_such_metric"]},
        {"metrics": {"a": [3]}},
    ],
    ids=["builtin", "unknown", "number", "arguments", "unknown metric", "number metric"],
)
def test_what_keras_cannot_build(part: dict, tmp_path: Path) -> None:
    path = rewrite_config(saved(classifier("softmax"), tmp_path), compiled_like(part))
    with pytest.raises(
        UsageError, match=rf"Expected {next(iter(part))} that Keras can build\. Received: model\.keras, where"
    ):
        compiled(path, None, [])


def test_a_loss_of_the_callers_own_is_welcome(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable(package="callers")
    def cubed(y_true, y_pred):
        return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)

    path = saved(classifier(), tmp_path, loss=cubed, metrics=[cubed])
    score = scoring(load(path), path, None, [])
    assert score.loss is cubed
    assert score.loss_name == "cubed"


# --- Nothing compiled


def test_a_model_without_a_loss(tmp_path: Path) -> None:
    model = classifier()
    path = saved(model, tmp_path)
    sentence = (
        r"Expected a model with a compiled loss, saved as \.keras, or --loss\. Received: {}, which has none\. Name a"
    )
    with pytest.raises(UsageError, match=sentence.format(r"model\.keras")):
        compiled(path, None, ["accuracy"])
    with pytest.raises(UsageError, match=sentence.format("classifier")):
        scoring(model, None, None, [])
    h5 = LEGACY / "cnn_bs25_weights.h5"
    with pytest.raises(UsageError, match=sentence.format(r"cnn_bs25_weights\.h5")):
        compiled(h5, None, [])
    assert compiled(h5, SPARSE, ["accuracy"]).parts["loss"] is None
    with pytest.raises(ModelLoadError, match="which is not there"):
        compiled(tmp_path / "none.keras", None, [])


# --- By name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (SPARSE, keras.losses.SparseCategoricalCrossentropy),
        ("SparseCategoricalCrossentropy", keras.losses.SparseCategoricalCrossentropy),
        ("mse", keras.losses.MeanSquaredError),
        ("MAE", keras.losses.MeanAbsoluteError),
        ("kl_divergence", keras.losses.KLDivergence),
        ("bce", keras.losses.BinaryCrossentropy),
        ("huber", keras.losses.Huber),
    ],
)
def test_losses_by_name(name: str, kind: type) -> None:
    score = scoring(classifier("softmax"), None, name, [])
    assert type(score.loss) is kind
    assert score.metrics is None


@pytest.mark.parametrize(
    ("loss", "metrics", "sentence"),
    [
        ("huberr", [], r"Expected --loss with the name of a Keras loss\. Received: 'huberr'\. Near it: huber"),
        ("sparse_crossentropy", [], "Near it: .*sparse_categorical_crossentropy"),
        ("zzz", [], r"Received: 'zzz'\. Keras's documentation lists them\."),
        ("get", [], "Received: 'get'"),
        ("Loss", [], "Received: 'Loss'"),
        ("__import__", [], "Received: '__import__'"),
        (
            "mse",
            ["acuracy"],
            r"Expected --metric with the name of a Keras metric\. Received: 'acuracy'\. Near it: .*accuracy",
        ),
        ("mse", ["Mean"], "Received: 'Mean'"),
        (
            "mse",
            ["PrecisionAtRecall"],
            r"Expected a loss or metric that needs no arguments\. Received: 'PrecisionAtRecall': ",
        ),
    ],
)
def test_names_that_are_none(loss: str, metrics: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        scoring(classifier(), None, loss, metrics)


def test_a_name_is_checked_before_the_model_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Received: 'msee'. Near it: mse"):
        compiled(saved(classifier(), tmp_path), "msee", [])


class Softmax2(layers.Layer):
    def call(self, x):
        return keras.ops.softmax(x)


def nested() -> Any:
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3, activation="softmax")])
    x = keras.Input((6,))
    return keras.Model(x, layers.Flatten()(inner(layers.Dense(3)(x))))


def by_operation() -> Any:
    x = keras.Input((6,))
    return keras.Model(x, keras.ops.softmax(layers.Dense(3)(x)))


ENDINGS = [
    (lambda: classifier("softmax"), "softmax"),
    (lambda: classifier("sigmoid"), "sigmoid"),
    (lambda: classifier(layers.Softmax()), "softmax"),
    (lambda: classifier(layers.Activation("softmax", dtype="float32")), "softmax"),
    (lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax"), layers.Dropout(0.1)]), "softmax"),
    (lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3, "softmax"), layers.Activation("linear")]), "softmax"),
    (nested, "softmax"),
    (by_operation, "softmax"),
    (classifier, None),
    (lambda: classifier("tanh"), None),
    (lambda: classifier("log_softmax"), None),
    (lambda: classifier(layers.BatchNormalization()), None),
    (lambda: tiny("PPMM", 5, "tiny"), None),
]


@pytest.mark.parametrize(("make", "ending"), ENDINGS)
def test_the_last_layer_tells_probabilities_from_logits(make, ending: str | None) -> None:
    score = scoring(make(), None, SPARSE, [SPARSE, "accuracy"])
    assert score.loss.from_logits == (ending is None)
    assert score.metrics[0].from_logits == (ending is None)
    taken = (
        f"probabilities: the last layer has a {ending}"
        if ending
        else "logits: the last layer has no softmax or sigmoid"
    )
    assert score.notes == (f"the outputs are taken for {taken}",)


@pytest.mark.parametrize("ending", [None, "softmax"])
def test_a_crossentropy_by_name_is_the_right_one(ending: str | None) -> None:
    model = classifier(ending)
    x, y = rows()
    answers = model.predict(x, verbose=0).astype("float64")
    shares = answers if ending else np.exp(answers) / np.exp(answers).sum(-1, keepdims=True)
    found = evaluated(model, scoring(model, None, SPARSE, ["accuracy"]), x, y)
    assert found["loss"] == pytest.approx(-np.log(shares[np.arange(20), y]).mean(), rel=RTOL, abs=0)
    assert found["accuracy"] == pytest.approx((shares.argmax(-1) == y).mean(), rel=RTOL, abs=0)


@pytest.mark.parametrize("ending", [None, "sigmoid"])
@pytest.mark.parametrize("metric", ["accuracy", "acc", "BinaryAccuracy"])
def test_binary_metrics_of_logits_are_those_of_their_probabilities(ending: str | None, metric: str) -> None:
    model = classifier(ending, 1)
    x, y = rows(1)
    answers = model.predict(x, verbose=0)[:, 0].astype("float64")
    share = answers if ending else 1 / (1 + np.exp(-answers))
    score = scoring(model, None, "binary_crossentropy", [metric, "Precision", "AUC"])
    found = evaluated(model, score, x, y)
    assert found["loss"] == pytest.approx(-np.where(y, np.log(share), np.log(1 - share)).mean(), rel=RTOL, abs=0)
    assert found[metric] == pytest.approx(((share > 0.5) == y).mean(), rel=RTOL, abs=0)
    assert found["Precision"] == pytest.approx((y[share > 0.5] == 1).mean(), rel=RTOL, abs=0)
    ranks = (share[y == 1][:, None] > share[y == 0]).mean()
    assert found["AUC"] == pytest.approx(ranks, abs=0.02, rel=0)  # Keras has 200 thresholds


@pytest.mark.parametrize("name", ["F1Score", "f1_score", "FBetaScore"])
def test_a_metric_of_a_number_a_class_is_their_mean_and_says_so(name: str) -> None:
    model = classifier("softmax")
    x, y = rows()
    score = scoring(model, None, "categorical_crossentropy", [name])
    found = evaluated(model, score, x, np.eye(3)[y])
    answers = model.predict(x, verbose=0).argmax(-1)
    right = [((answers == each) & (y == each)).sum() for each in range(3)]
    by_class = [2 * right[each] / max(((answers == each).sum() + (y == each).sum()), 1) for each in range(3)]
    assert found[name] == pytest.approx(np.mean(by_class), rel=RTOL, abs=1e-6)
    assert f"{name} is the mean of the classes', each counting the same (average='macro')" in score.notes


def test_a_metric_by_name_follows_the_compiled_loss(tmp_path: Path) -> None:
    model = classifier()
    path = saved(model, tmp_path, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["mse"])
    score = scoring(model, path, None, [SPARSE])
    assert score.metrics[0].from_logits
    assert score.notes == ()
    assert not scoring(classifier("softmax"), path, "mse", [SPARSE]).metrics[0].from_logits
    model.compile(loss=SPARSE)
    assert not scoring(model, None, None, [SPARSE]).metrics[0].from_logits  # as it was trained


def test_a_loss_by_name_keeps_the_compiled_metrics(tmp_path: Path) -> None:
    path = saved(classifier("softmax"), tmp_path, loss="mse", metrics=["mae"])
    score = scoring(load(path), path, SPARSE, [])
    assert (score.loss_name, score.metrics) == (SPARSE, ["mae"])


@pytest.mark.parametrize("make", ["subclass", "layer"])
def test_a_last_layer_that_does_not_tell(make: str) -> None:
    class Own(keras.Model):
        def call(self, x):
            return keras.ops.softmax(x)

    x = keras.Input((6,))
    model = keras.Model(x, (Own() if make == "subclass" else Softmax2())(layers.Dense(3)(x)))
    with pytest.raises(
        UsageError,
        match=r"Expected a last layer that tells whether the outputs are logits, which sparse_categorical_crossentropy "
        r"must know\. Received: (Own|Softmax2)\. Compile the model with a loss that says from_logits,",
    ):
        scoring(model, None, SPARSE, [])
    assert scoring(model, None, "mse", ["accuracy"]).notes == ()


def test_names_are_for_one_output() -> None:
    model = two_inputs()
    with pytest.raises(
        UsageError, match=r"Expected a model with one output for --loss and --metric\. Received: 2 outputs"
    ):
        scoring(model, None, "mse", [])
