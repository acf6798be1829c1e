"""The selection as text, of at most 120 columns, and as selection.json."""

import json
import re
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import law
from support.selections import NEVER, ranked, sixteen

from bln_serve.errors import ArtifactError
from bln_serve.export.selection.ranking import Selection
from bln_serve.export.selection.record import figure, short_name
from bln_serve.export.selection.report import WIDTH, read_selection, table, write
from bln_serve.manifest import StoredStatistics

ORIGINS = ("as trained", "calibrated", "reference batch")


def test_the_whole_table() -> None:
    found = ranked(
        {
            "MMMM": [1.0, 2.0, 3.0],
            "PPMM calibrated": [1.2, 2.1, 3.0],
            "PPPM": [nan, 1.0, 1.0],
            "PPMM": NEVER,
            "PPPP": NEVER,
            "MPMM": "another reason",
        },
        dropped=2,
    )
    assert table(found).splitlines() == [
        "validation.npz (sha256 abababababab): 15 rows in 3 mini-batches of 5, by mse",
        "",
        "   #  policy  statistics    loss  accuracy  row coupling  single rows  rows/s",
        "*  1  MMMM    as trained  2.0000    0.5000  mini-batch    no            1,234",
        "   2  PPMM    calibrated  2.1000    0.5000  independent   yes           1,234",
        "   -  PPPM    as trained     NaN    0.5000  positional    yes           1,234",
        "",
        "unusable:",
        "  MPMM as trained: another reason",
        "  PPMM PPPP as trained: b1: the stored batch variance was never updated",
        "  what training did not estimate can be estimated from data: --calibrate DATA",
        "",
        "best with independent rows  PPMM calibrated  loss 2.1000, +0.1000 +/- 0.0577",
        "best with mini-batch rows   MMMM as trained  loss 2.0000, the lowest",
        "best for single rows        PPMM calibrated  loss 2.1000, +0.1000 +/- 0.0577",
        "dropped the last 2 rows: they do not fill a mini-batch of 5",
        "chosen: MMMM as trained has the lowest loss; the best with independent rows, PPMM calibrated, costs 0.1000 "
        "(standard",
        "        error 0.0577) more",
    ]


LONG = ("sparse_categorical_crossentropy", "sparse_top_k_categorical_accuracy", "accuracy", "x" * 40, "y", "z", "auc")


@pytest.mark.parametrize("metrics", [(), ("accuracy",), LONG])
@pytest.mark.parametrize("origins", [ORIGINS[:1], ORIGINS])
def test_it_is_at_most_120_columns_wide_and_a_line_an_entry(metrics: tuple[str, ...], origins: tuple[str, ...]) -> None:
    found = sixteen(origins=origins, metrics=metrics, data="validation" * 9, dropped=1, coupling="independent")
    text = table(found)
    assert max(map(len, text.splitlines())) <= WIDTH
    ranking = re.findall(r"^[* ] +(\d+|-)  [PM]{4}  ", text, re.MULTILINE)
    assert ranking == [str(place) for place in range(1, 16 * len(origins) + 1)]
    assert len(text.splitlines()) <= 16 * len(origins) + 17
    assert ("also in selection.json: " in text) == (metrics == LONG)


def test_every_metric_is_a_column_or_named_below() -> None:
    text = table(sixteen(metrics=LONG))
    header, below = text.splitlines()[2], text.partition("also in selection.json: ")[2].splitlines()[0]
    assert header.split()[4:7] == ["crossentropy", "categorical_accuracy", "accuracy"]
    assert below == f"{'x' * 40}, y, z, auc"
    assert "selection.json" not in (alone := table(sixteen(metrics=LONG), kept=False))
    assert f"\nno room for: {below}\n" in alone


def test_exactly_the_chosen_one_is_marked() -> None:
    for found in (sixteen(), ranked({"MMMM": [1.0, 2.0, 3.0], "PPMM": [1.2, 1.9, 3.0]})):
        (line,) = (line for line in table(found).splitlines() if line.startswith("*"))
        assert line.split()[1:3] == [str(found.chosen + 1), found.entries[found.chosen].policy]


def test_where_the_rows_fill_every_mini_batch_nothing_was_dropped() -> None:
    assert "dropped" not in table(sixteen())


def test_one_dropped_row() -> None:
    assert "\ndropped the last row: it does not fill a mini-batch of 5\n" in table(sixteen(dropped=1))


def test_beyond_the_limit_says_so() -> None:
    text = table(ranked({"MMMM": [1.0, 2.0], "PPMM": [3.0, 4.5]}, coupling="independent"))
    assert "MMMM as trained  loss 1.5000, -2.2500 +/- 0.2500, beyond --coupling independent" in text
    assert "best for single rows        PPMM as trained  loss 3.7500, the lowest within the limit" in text


def test_one_mini_batch_has_no_standard_error() -> None:
    text = table(ranked({"MMMM": [1.0], "PPMM": [3.0]}))
    assert "loss 3.0000, +2.0000\n" in text
    assert "one mini-batch: there is no standard error, and every difference may be noise" in text
    assert "one mini-batch: there" not in table(sixteen())


def test_no_policy_for_single_rows_says_so() -> None:
    assert "best for single rows  none has a finite loss" in table(ranked({"MMMM": [1, 2], "PPMM": [nan, 2]}))


def test_pooled_slots() -> None:
    assert "by mse, feature slots pooled" in table(ranked({"PPMM": [1, 2]}, feature_slots="pool"))


@pytest.mark.parametrize("rows_per_s", [None, nan])
def test_a_speed_that_is_not_known(rows_per_s: float | None, tmp_path: Path) -> None:
    found = ranked({"PPMM": [1, 2]})
    unknown = replace(found, entries=tuple(replace(each, rows_per_s=rows_per_s) for each in found.entries))
    assert "independent   yes               -\n" in table(unknown)
    write(unknown, tmp_path / "selection.json")
    assert read_selection(tmp_path / "selection.json").entries[0].rows_per_s is None


CALIBRATED = StoredStatistics("calibrated", "rows.npz", "cd" * 32, 50)
REFERENCE = StoredStatistics("reference batch", "first.npy", "ef" * 32, 1)


def test_the_data_of_what_competes_is_named_and_kept(tmp_path: Path) -> None:
    found = ranked({"PPMM": [1, 2]}, variants=[CALIBRATED, REFERENCE])
    assert table(found).splitlines()[1:4] == [
        "calibrated: rows.npz (sha256 cdcdcdcdcdcd), 50 rows",
        "reference batch: first.npy (sha256 efefefefefef), 1 row",
        "",
    ]
    path = tmp_path / "selection.json"
    write(found, path)
    assert same(read_selection(path), found)
    assert json.loads(path.read_text())["variants"][0] == {
        "origin": "calibrated",
        "source": "rows.npz",
        "sha256": "cd" * 32,
        "rows": 50,
    }


def test_a_file_from_before_the_data_of_variants_was_kept_reads(tmp_path: Path) -> None:
    found, path = ranked({"PPMM": [1, 2]}), tmp_path / "selection.json"
    write(found, path)
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "variants"})
    )
    assert same(read_selection(path), found)


def test_long_reasons_are_wrapped_and_set_off() -> None:
    reasons = ["; ".join(f"a_layer_of_the_model_{place}: {why}" for place in range(4)) for why in ("never", "one row")]
    text = table(ranked({"PPMM": [1, 2], "MPMM": reasons[0], "PPPP": reasons[0], "MMMP": reasons[1]}))
    lines = text.partition("unusable:\n")[2].partition("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line for line in lines if not line.startswith("    ")] == [lines[0], lines[2], lines[-1]]
    assert "--calibrate" in lines[-1]
    assert lines[0].startswith("  PPPP MPMM as trained: a_layer_of_the_model_0: never; a_layer")


def test_who_calibrated_is_not_told_to() -> None:
    text = table(ranked({"PPMM": [1, 2], "PPPP": "why"}, variants=[CALIBRATED]))
    assert "unusable:" in text
    assert "--calibrate" not in text


def test_a_metric_that_was_not_measured_is_nan() -> None:
    assert re.search(r"1\.5000 +0\.5000 +NaN", table(ranked({"PPMM": [1, 2]}, metrics=("accuracy", "auc"))))


# --- Figures and names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (0.001, "0.0010"),
        (-1.23456, "-1.2346"),
        (999999.0, "999999.0000"),
        (1e6, "1.00e+06"),
        (0.000443, "0.000443"),
        (-0.00001, "-0.000010"),
        (9e-6, "9.00e-06"),
        (nan, "NaN"),
        (inf, "infinite"),
        (-inf, "-infinite"),
    ],
)
def test_a_figure(value: float, text: str) -> None:
    assert figure(value) == text


@law
@given(value=st.floats(-1e300, 1e300))
def test_a_figure_is_short_and_near_what_it_says(value: float) -> None:
    assert len(figure(value)) <= len("-1000000.0000")
    # Four decimals of 0.001 are its first digit and a half: the largest error is 5e-5 in 1e-3.
    assert float(figure(value)) == pytest.approx(value, rel=0.06, abs=1e-300)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("accuracy", "accuracy"),
        ("sparse_categorical_accuracy", "categorical_accuracy"),
        ("x" * 30, "x" * 20),
    ],
)
def test_a_long_name_keeps_its_last_words(name: str, short: str) -> None:
    assert short_name(name, 20) == short


# --- selection.json


def same(one: Selection, other: Selection) -> bool:
    """Whether two selections are equal, NaN being equal to NaN: their texts are, field by field."""
    return repr(one) == repr(other)


def test_the_file_reads_back(tmp_path: Path) -> None:
    found = ranked(
        {"MMMM": [1.0, 2.0], "PPPP": [nan, 2.0], "PPMM": [1.5, 2.75], "MPMM": NEVER}, dropped=3, feature_slots="pool"
    )
    entries = (replace(found.entries[0], metrics={"accuracy": nan}, rows_per_s=None), *found.entries[1:])
    found = replace(found, entries=entries)
    write(found, tmp_path / "selection.json")
    assert same(read_selection(tmp_path / "selection.json"), found)


@pytest.mark.parametrize("losses", [[1.0], [1.0, 2.0]])
def test_with_and_without_standard_error_it_reads_back(losses: list[float], tmp_path: Path) -> None:
    found = ranked({"MMMM": losses, "PPMM": [2 * each for each in losses]})
    write(found, tmp_path / "selection.json")
    assert same(read_selection(tmp_path / "selection.json"), found)


def test_the_comparison_of_selections_can_fail() -> None:
    found = ranked({"MMMM": [1.0, 2.0], "PPPP": [nan, 2.0]})
    assert not same(found, replace(found, entries=found.entries[::-1]))


def test_what_is_not_finite_is_null_and_reads_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    write(ranked({"MMMM": [1.0, 2.0], "PPPP": [inf, 2.0], "PPMM": [nan, 1.0], "MPMM": NEVER}), path)
    written = json.loads(path.read_text())
    assert [each["loss"] for each in written["entries"]] == [1.5, None, None, None]
    assert path.read_text().startswith('{\n  "data": "validation.npz",\n')
    read = read_selection(path).entries
    assert [isnan(each.loss) for each in read[1:3] if each.loss is not None] == [True, True]
    assert (read[3].loss, read[3].unusable) == (None, NEVER)
    assert "policy" in table(read_selection(path))


def broken(text: str, **changes: Any) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: broken(text, entries=[{}]),
        lambda text: broken(text, entries=3),
        lambda text: broken(text, entries=[None]),
        lambda text: broken(text, best=["x"]),
        lambda text: broken(text, rows="many"),
        lambda text: "{}",
    ],
)
def test_another_file_is_refused(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    write(ranked({"MMMM": [1.0, 2.0]}), path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(
        ArtifactError, match="Expected a selection.json as bln-export --select writes it at .* Received"
    ):
        read_selection(path)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file.* Make it again with bln-export --select"):
        read_selection(tmp_path / "selection.json")
