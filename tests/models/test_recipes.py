"""The recipes of the paper's experiments on tiny data: what they train on, what they keep, going on after a stop."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from bln_serve.layers import bln_layers

MODELS = Path(__file__).parents[2] / "models"
MODULES = ("cifar10_cnn", "imdb_rnn", "paper_data", "paper_protocol", "paper_training")
CLASSES = 3
SHAPE = (6,)


@pytest.fixture(scope="module")
def recipes() -> Any:
    """The modules of the recipes, which find one another as a script's neighbours do."""
    before = set(sys.modules)
    sys.path.insert(0, str(MODELS))
    yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    sys.path.remove(str(MODELS))
    for name in {*MODULES} - before:
        del sys.modules[name]


def data_file(folder: Path, kind: Any, train: int = 48, test: int = 24) -> Path:
    """Write random rows of every class, in a random order."""
    generator = np.random.default_rng(7)
    arrays = {}
    for part, rows in (("train", train), ("test", test)):
        x = generator.integers(0, kind.largest, (rows, *kind.shape), np.uint16, endpoint=True)
        x.flat[:2] = 0, kind.largest
        arrays[f"x_{part}"] = x
        arrays[f"y_{part}"] = generator.permutation(np.arange(rows) % kind.classes).astype(np.uint8)
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def tiny_build(normalize: Callable[[int], Any], train: Any, seed: int) -> Any:
    """Return a compiled model with all that a resumed run must get right: dropout, BLN's estimates, Adam's state."""
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Rescaling(0.01),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.5, seed=seed),
            normalize(1),
            keras.layers.Dense(CLASSES),
        ],
        name="tiny",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    # Eagerly: a graph takes longer to make than such a run; the recipes' own tests have one.
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=[accuracy], run_eagerly=True)
    return model


@pytest.fixture(scope="module")
def tiny(recipes) -> Any:
    kind = recipes.paper_data.Kind(SHAPE, largest=99, classes=CLASSES, load=lambda: pytest.fail("downloads"))
    return recipes.paper_protocol.Recipe("tiny", "Train.", kind, validation=0.25, epochs=3, build=tiny_build)


Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def train(recipes, tiny, tmp_path_factory) -> Train:
    """Run the tiny recipe into a folder, with more options, and return its history.json."""
    data = data_file(tmp_path_factory.mktemp("data"), tiny.data)

    def run(folder: Path, *options: str) -> dict[str, Any]:
        arguments = ["--data", str(data), "--output", str(folder), "--batch-size", "6", *options]
        assert recipes.paper_protocol.main(tiny, arguments) == 0
        return json.loads((folder / "history.json").read_text())

    return run


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory) -> Path:
    """The folder of a run with the defaults: three epochs, all in the same order."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder)
    return folder


RESHUFFLED = ("--order", "reshuffled", "--validate-every-steps", "4", "--resume")


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory) -> Path:
    """The folder of a run that stopped after two epochs."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, *RESHUFFLED, "--epochs", "2")
    return folder


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """The folder of the same run, not stopped before its fourth."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, *RESHUFFLED, "--epochs", "4", "--tensorboard", str(folder / "logs"))
    return folder


def history_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "history.json").read_text())


def numbers(history: dict[str, Any]) -> Any:
    """Return what does not depend on the clock."""
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history["history"]]
    return epochs, history["validation_by_step"], history["best"], history["test"]


class TestRecipes:
    @pytest.mark.parametrize("normalization", ["bln", "bn", "ln"])
    @pytest.mark.parametrize("name", ["cifar10_cnn", "imdb_rnn"])
    def test_each_runs_from_data_to_a_chosen_model(
        self, name, normalization, *, recipes, tmp_path, capsys, monkeypatch
    ) -> None:
        recipe = self.made_small(getattr(recipes, name), eager=normalization != "bln", monkeypatch=monkeypatch)
        data, folder = data_file(tmp_path, recipe.data, 100, 20), tmp_path / "run"
        size = round(100 * recipe.validation)
        options = ["--normalization", normalization, "--epochs", "2", "--batch-size", str(size), "--data", str(data)]

        assert recipes.paper_protocol.main(recipe, [*options, "--output", str(folder)]) == 0

        assert {path.name for path in folder.iterdir()} == {
            f"{name}.keras",
            "history.json",
            "last.npz",
            "validation.npz",
        }
        history = json.loads((folder / "history.json").read_text())
        model = keras.saving.load_model(folder / f"{name}.keras")
        self.check_history(history, recipe, normalization)
        with np.load(folder / "validation.npz") as validation, np.load(data) as everything:
            loss, accuracy = model.evaluate(validation["x"], validation["y"], batch_size=size, verbose=0)
            test = model.evaluate(everything["x_test"], everything["y_test"], batch_size=size, verbose=0)
        # The same model on the same mini-batches in float32, summed once by Keras in fit and once here.
        np.testing.assert_allclose((loss, accuracy), [*history["best"].values()][1:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(test, [*history["test"].values()], rtol=1e-5, atol=1e-6)
        assert {layer.policy.code for layer in bln_layers(model)} == ({"MMMM"} if normalization == "bln" else set())
        assert ("bln-export" in capsys.readouterr().out) == (normalization == "bln")

    def made_small(self, module: Any, eager: bool, monkeypatch: Any) -> Any:
        """Return a recipe with a smaller RNN; those of BLN train in a graph, the others need not wait for one."""
        recipe, sizes = module.RECIPE, {}
        if recipe.name == "imdb_rnn":
            sizes = {"size": 4, "units": 4}
            monkeypatch.setattr(module, "LENGTH", 2 if eager else module.LENGTH)

        def build(*arguments: Any) -> Any:
            model = module.build(*arguments, **sizes)
            model.compile_from_config({**model.get_compile_config(), "run_eagerly": eager})
            return model

        shape = (module.LENGTH,) if sizes else recipe.data.shape
        return dataclasses.replace(recipe, build=build, data=dataclasses.replace(recipe.data, shape=shape))

    def check_history(self, history: dict[str, Any], recipe: Any, normalization: str) -> None:
        rows = {
            name: round(share * 100)
            for name, share in (("train", 1 - recipe.validation), ("validation", recipe.validation))
        }
        assert history["data"]["rows"] == {"available": 100, **rows, "test": 20}
        assert history["steps_per_epoch"] == rows["train"] // rows["validation"]
        assert [epoch["epoch"] for epoch in history["history"]] == [1, 2]
        losses = [epoch["val_loss"] for epoch in history["history"]]
        assert history["best"]["epoch"] == 1 + int(np.argmin(losses))
        assert history["policy"] == ("MMMM" if normalization == "bln" else None)
        assert set(history["versions"]) == {"python", "bln_serve", "keras", "numpy", "tensorflow"}

    def test_images_are_standardised_by_the_rows_trained_on_inside_the_model(self, recipes) -> None:
        x = np.random.default_rng(3).integers(0, 256, (50, 32, 32, 3), np.uint8)
        rows = recipes.paper_data.Rows(x, np.zeros(50, np.uint8))
        model = recipes.cifar10_cnn.build(recipes.paper_protocol.normalization("bln", 25), rows, 100)
        scaled = np.asarray(model.layers[0](x.astype(np.float32)))
        # 50 float32 values of up to 2 a pixel.
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-5)

    def test_the_networks_are_the_papers(self, recipes) -> None:
        normalize = recipes.paper_protocol.normalization("bln", 25)
        images = recipes.paper_data.Rows(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.uint8))
        cnn, rnn = recipes.cifar10_cnn.build(normalize, images, 100), recipes.imdb_rnn.build(normalize, None, 100)
        trainable = [sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) for model in (cnn, rnn)]
        # LeNet's 456 + 2,416 + 69,240 + 10,164 + 850 with 2 (6 + 16 + 120 + 84) of BLN; Embedding, two LSTMs, two Dense
        # and 2 (128 + 64 + 32) of BLN.
        assert trainable == [83_126 + 452, 10_240_000 + 328_192 + 49_408 + 2_080 + 33 + 448]
        assert [layer.policy.code for layer in bln_layers(rnn)] == ["MMMM"] * 3
        lstms = [layer for layer in rnn.layers if isinstance(layer, keras.layers.LSTM)]
        assert [(lstm.dropout, lstm.recurrent_dropout) for lstm in lstms] == [(0.2, 0.2)] * 2
        assert [float(model.optimizer.learning_rate) for model in (cnn, rnn)] == pytest.approx([0.002, 0.003])

    @pytest.mark.parametrize("name", ["cifar10_cnn", "imdb_rnn"])
    def test_help_says_what_a_fraction_is_of(self, recipes, name, capsys) -> None:
        with pytest.raises(SystemExit, match="0"):
            recipes.paper_protocol.main(getattr(recipes, name).RECIPE, ["--help"])
        said = " ".join(capsys.readouterr().out.split())
        held_back = {"cifar10_cnn": 10, "imdb_rnn": 20}[name]
        assert "all of a --data file, which may itself be a part; 0.2 of keras.datasets). Of these," in said
        assert f"Of these, {held_back} % are held back for validation" in said

    @pytest.mark.parametrize("kind", ["bn", "ln"])
    def test_the_others_are_keras_s_own_with_their_defaults(self, recipes, kind) -> None:
        made = recipes.paper_protocol.normalization(kind, 25)(1)
        own = {"bn": keras.layers.BatchNormalization, "ln": keras.layers.LayerNormalization}[kind](name=f"{kind}1")
        assert made.get_config() == own.get_config()


class TestResuming:
    def test_a_run_that_was_stopped_gives_the_numbers_of_one_that_was_not(
        self, train, stopped, whole, tmp_path
    ) -> None:
        shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
        gone_on = train(tmp_path, *RESHUFFLED, "--epochs", "4")
        assert numbers(gone_on) == numbers(history_of(whole))
        with np.load(whole / "last.npz") as one, np.load(tmp_path / "last.npz") as other:
            assert one.files == other.files
            for name in set(one.files) - {"kept"}:
                np.testing.assert_array_equal(one[name], other[name], err_msg=name)

    @pytest.mark.parametrize("forgotten", ["optimizer", "seed_generator", "dense"])
    def test_the_comparison_sees_a_state_that_is_not_restored(
        self, forgotten, recipes, train, stopped, *, whole, tmp_path, monkeypatch
    ) -> None:
        shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
        of = recipes.paper_training._named_variables
        monkeypatch.setattr(
            recipes.paper_training,
            "_named_variables",
            lambda model: {name: v for name, v in of(model).items() if forgotten not in f"{name} {v.path}"},
        )
        gone_on = train(tmp_path, *RESHUFFLED, "--epochs", "3")
        assert numbers(gone_on)[0][:2] == numbers(history_of(whole))[0][:2]
        assert numbers(gone_on)[0][2] != numbers(history_of(whole))[0][2]

    def test_a_run_that_is_done_is_only_reported_again(self, train, plain, tmp_path) -> None:
        shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
        state = (tmp_path / "last.npz").stat().st_mtime_ns
        assert train(tmp_path, "--resume") == history_of(plain)
        assert (tmp_path / "last.npz").stat().st_mtime_ns == state

    def test_another_run_in_the_folder_is_refused(self, train, plain, capsys) -> None:
        with pytest.raises(SystemExit, match="2"):
            train(plain)
        assert "Expected a folder without a run. Received:" in capsys.readouterr().err

    @pytest.mark.parametrize(("option", "value"), [("--seed", "101"), ("--order", "reshuffled"), ("--fraction", "0.5")])
    def test_other_settings_are_refused(self, option, value, train, plain, capsys) -> None:
        with pytest.raises(SystemExit, match="2"):
            train(plain, "--resume", option, value)
        error = capsys.readouterr().err
        assert "Expected the settings that the run in" in error
        assert f"{option.removeprefix('--')} {value} after" in error


class TestWhatIsMeasured:
    def test_by_step_is_the_loss_of_the_epoch_at_its_end_and_changes_nothing(self, train, plain, tmp_path) -> None:
        measured = train(tmp_path, "--validate-every-steps", "2")
        assert numbers(measured)[0] == numbers(history_of(plain))[0]
        assert [step for step, _ in measured["validation_by_step"]] == list(range(2, 19, 2))
        by_step = dict(map(tuple, measured["validation_by_step"]))
        at_end = [epoch["val_loss"] for epoch in measured["history"]]
        # The mean of two float32 losses, one computed eagerly and one in a graph.
        np.testing.assert_allclose([by_step[6], by_step[12], by_step[18]], at_end, rtol=1e-6)
        assert history_of(plain)["validation_by_step"] == []

    def test_the_first_of_equal_epochs_is_the_best_and_nan_never_is(self, recipes) -> None:
        losses = (float("nan"), 2.0, 1.0, 1.0, float("inf"))
        epochs = [{"epoch": index, "val_loss": loss} for index, loss in enumerate(losses, 1)]
        assert recipes.paper_training.History(epochs).best()["epoch"] == 3
        assert recipes.paper_training.History(epochs[:1]).best() is None

    def test_no_finite_loss_leaves_no_model(self, recipes, tiny, tmp_path, capsys) -> None:
        def build(*arguments: Any) -> Any:
            model = tiny_build(*arguments)
            model.layers[-1].bias.assign([np.nan] * CLASSES)
            return model

        recipe = dataclasses.replace(tiny, build=build)
        options = ["--data", str(data_file(tmp_path, tiny.data)), "--batch-size", "6", "--epochs", "1"]
        with pytest.raises(SystemExit, match="2"):
            recipes.paper_protocol.main(recipe, [*options, "--output", str(tmp_path)])
        assert "Expected an epoch with a finite validation loss. Received: none in 1." in capsys.readouterr().err
        assert not (tmp_path / "tiny.keras").exists()

    def test_json_says_null_where_a_number_is_not_finite(self, recipes, tmp_path) -> None:
        recipes.paper_training.write_json(
            tmp_path / "a.json", {"a": [(1, float("nan")), {"b": float("inf")}], "c": 2.5}
        )
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": [[1, None], {"b": None}], "c": 2.5}

    def test_tensorboard_gets_each_epoch(self, whole) -> None:
        history = history_of(whole)["history"]
        for part, name in (("train", "loss"), ("validation", "val_loss")):
            found = dict(scalars(whole / "logs" / part, "epoch_loss"))
            assert found == {epoch["epoch"]: pytest.approx(epoch[name], rel=1e-6) for epoch in history}  # float32


def scalars(folder: Path, tag: str) -> Any:
    """Yield the (step, value) of one curve, as TensorBoard reads it."""
    (path,) = folder.iterdir()
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            if value.tag == tag:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                yield event.step, float(tf.make_ndarray(value.tensor))


class TestData:
    @pytest.mark.parametrize(("fraction", "train", "validation"), [(1.0, 36, 12), (0.5, 18, 6), (0.25, 9, 3)])
    def test_each_class_has_its_share_the_first_to_train_on(
        self, *, fraction, train, validation, recipes, tiny, tmp_path
    ) -> None:
        path = data_file(tmp_path, tiny.data)
        parts = recipes.paper_data.parts(tiny.data, path, fraction, 0.25)
        assert parts.counts() == {"available": 48, "train": train, "validation": validation, "test": 24}
        for rows, count in ((parts.train, train), (parts.validation, validation)):
            assert np.bincount(rows.y).tolist() == [count // CLASSES] * CLASSES
        with np.load(path) as data:
            for label in range(CLASSES):
                of_class = data["x_train"][data["y_train"] == label]
                trained, held = parts.train.x[parts.train.y == label], parts.validation.x[parts.validation.y == label]
                np.testing.assert_array_equal(trained, of_class[: len(trained)])
                expected = of_class[len(trained) : len(trained) + len(held)]
                assert sorted(map(tuple, held)) == sorted(map(tuple, expected))

    def test_validation_rows_come_mixed_whatever_the_order_of_the_data(self, recipes, tiny, tmp_path) -> None:
        rows = recipes.paper_data.Rows(
            np.zeros((3000, *SHAPE), np.uint8), np.repeat(np.arange(3, dtype=np.uint8), 1000)
        )
        kind = recipes.paper_data.Kind(SHAPE, 99, CLASSES, lambda: (rows, rows))
        labels = recipes.paper_data.parts(kind, None, 1.0, 0.25).validation.y
        shares = [np.bincount(part, minlength=3) / 250 for part in labels.reshape(3, 250)]
        # A third each, 4 standard deviations of 250 draws.
        np.testing.assert_allclose(shares, 1 / 3, atol=4 * (2 / 9 / 250) ** 0.5)

    def test_without_a_file_keras_loads_it_and_a_fifth_is_taken(self, recipes, tiny, tmp_path) -> None:
        rows = recipes.paper_data.read(data_file(tmp_path, tiny.data, train=300), tiny.data)
        kind = recipes.paper_data.Kind(SHAPE, 99, CLASSES, lambda: rows)
        recipe = dataclasses.replace(tiny, data=kind, epochs=1)
        assert recipes.paper_protocol.main(recipe, ["--output", str(tmp_path / "run"), "--batch-size", "5"]) == 0
        history = json.loads((tmp_path / "run/history.json").read_text())
        assert (history["fraction"], history["data"]["source"]) == (0.2, "keras.datasets")
        assert history["data"]["rows"] == {"available": 300, "train": 45, "validation": 15, "test": 24}

    def test_labels_may_be_a_column(self, recipes, tiny, tmp_path) -> None:
        path = rewritten(data_file(tmp_path, tiny.data), y_train=lambda y: y[:, None])
        assert recipes.paper_data.read(path, tiny.data)[0].y.shape == (48,)

    def test_the_hash_is_of_the_rows(self, recipes, tiny, tmp_path) -> None:
        path = data_file(tmp_path, tiny.data)
        hashes = [recipes.paper_data.parts(tiny.data, path, 1.0, 0.25).sha256() for _ in range(2)]
        rewritten(path, x_test=lambda x: np.where(np.arange(len(x))[:, None] == 5, 0, x).astype(x.dtype))
        assert len({*hashes}) == 1
        assert recipes.paper_data.parts(tiny.data, path, 1.0, 0.25).sha256() != hashes[0]


def rewritten(path: Path, **changes: Callable[[Any], Any]) -> Path:
    """Write the file again with some arrays changed; None leaves one out."""
    with np.load(path) as file:
        arrays = {name: changes.get(name, lambda array: array)(file[name]) for name in file.files}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


class TestBadData:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"y_test": lambda y: None},
                "Expected the arrays x_train, .* Received: x_train, y_train, x_test. Write it",
            ),
            ({"x_train": lambda x: x[:, :5]}, r"Expected x_train of shape \(rows, 6\) .* Received: \(48, 5\) and"),
            ({"y_test": lambda y: y[1:]}, r"Expected x_test .* Received: \(24, 6\) and \(23,\). Cut or pad"),
            ({"y_train": lambda y: np.eye(3)[y]}, r"Expected x_train .* Received: \(48, 6\) and \(48, 3\)"),
            ({"x_train": lambda x: x / 99}, "Expected whole numbers from 0 to 99 in x_train. Received: float64 from"),
            (
                {"x_test": lambda x: x + 1},
                "Expected whole numbers from 0 to 99 in x_test. Received: uint16 from 1 to 100",
            ),
            (
                {"y_train": lambda y: y + 1},
                "Expected whole numbers from 0 to 2 in y_train. Received: uint8 from 1 to 3",
            ),
            ({"y_train": lambda y: y * 0}, "Expected rows of all 3 classes to train on"),
        ],
    )
    def test_arrays(self, changes, message, recipes, tiny, tmp_path) -> None:
        path = rewritten(data_file(tmp_path, tiny.data), **changes)
        with pytest.raises(recipes.paper_data.UsageError, match=message):
            recipes.paper_data.parts(tiny.data, path, 1.0, 0.25)

    def test_files(self, recipes, tiny, tmp_path) -> None:
        text, array = tmp_path / "text.npz", tmp_path / "array.npy"
        text.write_text("no archive")
        np.save(array, np.zeros(3))
        for path in (tmp_path / "nothing.npz", text, array, tmp_path):
            with pytest.raises(recipes.paper_data.UsageError, match=r"^Expected .*npz file.* Received: "):
                recipes.paper_data.read(path, tiny.data)

    def test_too_small_a_fraction(self, recipes, tiny, tmp_path) -> None:
        path = data_file(tmp_path, tiny.data)
        with pytest.raises(recipes.paper_data.UsageError, match="of which fraction 0.05 leaves 3 and 0. Take a larger"):
            recipes.paper_data.parts(tiny.data, path, 0.05, 0.25)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ["--batch-size", "13"],
                "Expected whole mini-batches of 13 rows in each part. Received: {'available': 48,",
            ),
            (["--fraction", "1.5"], "Expected a fraction above 0, at most 1. Received: 1.5"),
            (["--epochs", "0"], "Expected a whole number of at least 1. Received: 0"),
        ],
    )
    def test_settings(self, options, message, train, tmp_path, capsys) -> None:
        with pytest.raises(SystemExit, match="2"):
            train(tmp_path, *options)
        assert message in capsys.readouterr().err


class TestOrder:
    def test_same_is_the_same_each_epoch_and_reshuffled_is_not(self, recipes) -> None:
        order_of = recipes.paper_data.order_of
        same, reshuffled = (
            [order_of(epoch, 48, 5, order, 100) for epoch in range(3)] for order in ("same", "reshuffled")
        )
        assert len({epoch.tobytes() for epoch in same}) == 1
        assert len({epoch.tobytes() for epoch in reshuffled}) == 3
        for epoch in (*same, *reshuffled):
            assert epoch.shape == (9, 5)
            assert len(np.unique(epoch)) == 45
            assert epoch.max() <= 47
        assert not np.array_equal(same[0], order_of(0, 48, 5, "same", 101))

    def test_training_goes_through_the_plan(self, recipes) -> None:
        rows = recipes.paper_data.Rows(np.arange(48, dtype=np.uint8)[:, None], np.arange(48))
        plan = np.array([[3, 47], [0, 3], [12, 11]])
        fed = list(recipes.paper_training.training_set(rows, plan, "float32"))
        np.testing.assert_array_equal([y for _, y in fed], plan)
        np.testing.assert_array_equal([x[:, 0] for x, _ in fed], plan)
        assert fed[0][0].dtype == "float32"

    @pytest.mark.parametrize("order", ["same", "reshuffled"])
    def test_each_epoch_is_fed_its_order(self, order, *, recipes, train, plain, stopped, tmp_path, monkeypatch) -> None:
        plans = []
        training_set = recipes.paper_protocol.training_set
        monkeypatch.setattr(
            recipes.paper_protocol,
            "training_set",
            lambda rows, plan, dtype: plans.append(plan) or training_set(rows, plan, dtype),
        )
        done, options = (plain, ["--resume"]) if order == "same" else (stopped, RESHUFFLED)
        shutil.copytree(done, tmp_path, dirs_exist_ok=True)
        epochs = range(len(history_of(done)["history"]), 4)
        train(tmp_path, *options, "--epochs", "4")
        expected = [recipes.paper_data.order_of(epoch, 36, 6, order, 100) for epoch in epochs]
        np.testing.assert_array_equal(plans, [np.concatenate(expected)])

    def test_the_orders_part_after_the_first_epoch(self, plain, whole) -> None:
        same, reshuffled = (numbers(history_of(folder))[0] for folder in (plain, whole))
        assert [one == other for one, other in zip(same, reshuffled[:3], strict=True)] == [True, False, False]

    def test_estimates_are_the_last_epochs(self, plain) -> None:
        (layer,) = bln_layers(keras.saving.load_model(plain / "tiny.keras"))
        assert layer.mean_steps.numpy() == 6
