"""The generator of README.md's tables, on made-up results; and that the README says what the results say."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reproduction import measured, plots, policy_tables, runs, tables, training_tables
from reproduction.measured import POLICIES, Results
from reproduction.writing import CIFAR10

LIVE = {"MMMM": 1.5, "PPMM": 1.7, "MPMM": 1.4, "PMMM": 2.0}


def run(method: str, seed: int, loss: float, steps: Sequence[float | None], **more: Any) -> dict[str, Any]:
    epochs = [{"epoch": 1, "accuracy": 0.3, "loss": 2.0, "val_accuracy": 0.25, "val_loss": 1.9, "seconds": 1.0}]
    return {
        "name": f"{CIFAR10}-same-{method}-s{seed}",
        "seed": seed,
        "history": epochs,
        "validation_by_step": [[40 * (place + 1), value] for place, value in enumerate(steps)],
        "best": {"epoch": seed - 96},
        "test": {"loss": loss, "accuracy": 0.4 + seed / 1000},
        **more,
    }


def origin(losses: Mapping[str, float | None]) -> dict[str, Any]:
    def entry(policy: str) -> dict[str, Any]:
        loss = losses.get(policy, 1.6)
        coupling = "independent" if policy == "PPMM" else "mini-batch"
        both = {"loss": loss, "accuracy": None if loss is None else loss / 10}
        validation = {**both, "loss": None if loss is None else loss + 0.1}
        return {"policy": policy, "row_coupling": coupling, "unusable": None, "validation": validation, "test": both}

    return {"entries": [entry(policy) for policy in POLICIES]}


def made_up(*methods: str, seeds: Sequence[int] = (100, 101)) -> Results:
    """BLN reaches 1.2 at step 80, BN 1.4 at step 120, LN 1.6 at step 160."""
    curves = {"bln": [1.5, 1.2, 1.3, 1.4], "bn": [None, 1.8, 1.4, 1.5], "ln": [1.9, 1.8, 1.7, 1.6]}
    losses = {"bln": 1.5, "bn": 1.6, "ln": 1.7}
    found = [run(m, s, losses[m] + 0.02 * (s - 100), curves[m]) for m in methods or curves for s in seeds]
    evaluated = {
        f"{CIFAR10}-same-bln-s{seed}": {
            "origins": {
                "as trained": origin(LIVE),
                "reference batch": origin({"MMMM": 1.9}),
                "calibrated": origin({"PPMM": 1.3}),
            }
        }
        for seed in seeds
    }
    paper = {
        "training": [
            {"experiment": CIFAR10, "normalization": "bln", "test_loss": 1.9, "test_accuracy": 0.5},
            {"experiment": CIFAR10, "normalization": "bn", "test_loss": 1.61, "test_accuracy": 0.5005},
        ],
        "policies": {
            CIFAR10: {policy: [1.0 + place / 10, 0.5] for place, policy in enumerate(POLICIES)} | {"PPPP": [None, 0.1]}
        },
    }
    planned = [f"{CIFAR10}-same-{method}-s{seed}" for seed in (100, 101, 102) for method in curves]
    return Results({one["name"]: one for one in found}, evaluated, paper, planned)


def cells(lines: Sequence[str], first: str) -> list[str]:
    """Return the cells of the line that begins with a cell."""
    (line,) = (line for line in lines if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_losses_and_accuracies_stand_beside_the_papers() -> None:
    lines = training_tables.training(made_up(), CIFAR10)
    assert cells(lines, "BLN (MMMM)")[1:] == [
        *("1.9000 / 0.5000", "1.5100 ± 0.0141", "0.5005 ± 0.0007", "4 to 5", "2"),
        "loss",
    ]
    assert cells(lines, "BN")[-1] == "no"
    assert cells(lines, "LN")[1] == cells(lines, "LN")[-1] == "-"  # the paper's figures have none here


def test_one_seed_has_no_spread_and_tells_no_difference() -> None:
    one = made_up(seeds=(100,))
    assert cells(training_tables.training(one, CIFAR10), "BLN (MMMM)")[2:] == ["1.5000", "0.5000", "4", "1", "one seed"]
    assert training_tables.differences(one, [(CIFAR10, "same", "here")], {}) == ["None that more than one seed tells."]


def test_each_difference_is_named_with_its_cause() -> None:
    found = training_tables.differences(made_up(), [(CIFAR10, "same", "here")], {f"{CIFAR10}/bln": "Since."})
    away = "27.6 spreads away (one more seed would lie as far off by chance in 2.8% of cases)"
    assert found == [f"- here, BLN (MMMM), loss: 1.5100 ± 0.0141 and not 1.9000, {away}. Since."]
    assert "The cause is not known." in training_tables.differences(made_up(), [(CIFAR10, "same", "here")], {})[0]


def test_other_fifths_beside_the_first() -> None:
    others = [
        {"first_training_row": row, "test": {"loss": loss, "accuracy": loss - 1.0}}
        for row, loss in ((30, 1.7), (20, 1.6))
    ]
    lines = training_tables.fifths(replace(made_up(), fifths=others), CIFAR10)
    assert [cells(lines, row)[1] for row in ("0", "20", "30")] == ["1.5000", "1.6000", "1.7000"]
    assert cells(lines, "all of them")[1:] == ["1.6000 ± 0.1000", "0.6000 ± 0.1000"]
    assert cells(lines, "the paper's, in spreads away")[1:] == ["3.0", "1.0"]
    assert len(training_tables.fifths(made_up("bn"), CIFAR10)) == 3


def test_steps_to_what_all_three_reach() -> None:
    lines = training_tables.convergence(made_up(), [(CIFAR10, "same", "here")])
    assert cells(lines, "here")[1:] == [
        *("2", "1.6000 ± 0.0000", "40 ± 0", "120 ± 0", "160 ± 0"),
        *("3.0 ± 0.0", "4.0 ± 0.0"),
    ]
    assert len(training_tables.convergence(made_up("bln", "bn"), [(CIFAR10, "same", "here")])) == 2


def test_the_lowest_of_three_is_counted() -> None:
    assert training_tables.places(made_up(), CIFAR10)[0].endswith("for 2 of 2 seeds.")


def test_policies_in_the_papers_ranking() -> None:
    lines = policy_tables.policies(made_up(), CIFAR10)
    assert [line[2:6] for line in lines[2:]] == [*POLICIES[1:], "PPPP"]
    assert cells(lines, "MPMM")[1:] == ["2.1000 / 0.5000", "1.4000 ± 0.0000 / 0.1400 ± 0.0000", "loss, accuracy"]
    assert cells(policy_tables.policies(made_up(seeds=(100,)), CIFAR10), "MPMM")[-1] == "-"
    assert cells(lines, "PPPP")[1] == "NaN / 0.1000"


def test_chosen_on_validation_beside_chosen_on_test() -> None:
    results = made_up(seeds=(100,))
    entries = results.policies[f"{CIFAR10}-same-bln-s100"]["origins"]["as trained"]["entries"]
    next(one for one in entries if one["policy"] == "MMMM")["validation"]["loss"] = 1.0
    lines = policy_tables.flattery(results, [(CIFAR10, "same", "here")])
    assert cells(lines, "here")[1:] == ["1", "1.5000", "1.5000", "1.4000", "+0.1000", "MMMM"]


def test_ways_to_serve_beside_live_statistics() -> None:
    lines = policy_tables.serving(made_up(), CIFAR10, "same")
    assert cells(lines, "stored as trained: PPMM")[1:] == ["yes", *with_spread("1.7000", "0.1700", "+0.2000")]
    assert cells(lines, "stored, calibrated: PPMM")[2:] == with_spread("1.3000", "0.1300", "-0.2000")
    assert cells(lines, "a reference mini-batch: MMMM frozen")[2:] == with_spread("1.9000", "0.1900", "+0.4000")
    for words in ("independent rows", "all"):
        assert cells(lines, f"chosen on validation among {words}")[2:] == with_spread("1.3000", "0.1300", "-0.2000")


def with_spread(*figures: str) -> list[str]:
    return [*(f"{each} ± 0.0000" for each in figures), "2"]


def test_ways_to_serve_that_are_not_evaluated_yet() -> None:
    results = made_up()
    for one in results.policies.values():
        del one["origins"]["calibrated"]
    lines = policy_tables.serving(results, CIFAR10, "same")
    assert cells(lines, "stored, calibrated: PPMM")[1:] == ["-", "-", "-", "-", "0"]
    assert cells(lines, "chosen on validation among all")[-1] == "0"
    assert cells(lines, "a reference mini-batch: MMMM frozen")[-1] == "2"


def test_unusable_policies_are_said_to_be() -> None:
    results = made_up()
    for one in results.policies.values():
        one["origins"]["as trained"] = origin({"PPMM": None})
    assert cells(policy_tables.policies(results, CIFAR10), "PPMM")[-2:] == ["unusable", "-"]
    assert cells(policy_tables.serving(results, CIFAR10, "same"), "stored as trained: PPMM")[2] == "unusable"


def test_spearman_by_hand_and_by_its_definition() -> None:
    one = dict(zip("abcd", [1.0, 2.0, 3.0, 4.0], strict=True))
    assert measured.spearman(one, {"a": 10.0, "b": 20.0, "c": 30.0, "d": 400.0}) == pytest.approx(1)
    # 1 - 6 * (9 + 1 + 1 + 9) / (4 * 15)
    assert measured.spearman(one, {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}) == pytest.approx(-1)
    assert measured.spearman(one, {"a": 1.0, "b": 3.0, "c": 2.0, "d": np.nan}) == pytest.approx(0.5)
    assert measured.spearman(one, dict.fromkeys(one, 1.0)) is None
    assert measured.spearman(one, {"a": 1.0, "b": 2.0}) is None


def test_what_is_missing_is_named() -> None:
    said = training_tables.missing(made_up("bln", "bn"))
    assert said[0].startswith("- 5 of 9 runs are missing: ")
    assert f"`{CIFAR10}-same-ln-s100`" in said[0]
    assert said[1] == f"- 1 of 3 are not evaluated with statistics as trained: `{CIFAR10}-same-bln-s102`."
    complete = made_up(seeds=(100, 101, 102))
    assert training_tables.missing(complete) == [
        "Nothing is missing: 9 runs, and 3 of them evaluated under each policy."
    ]


def test_nothing_at_all_makes_tables_without_numbers() -> None:
    nothing = Results({}, {}, measured.read(runs.RESULTS, tables.PAPER, []).paper, ["a-bln-s1"])
    made = {name: "\n".join(make(nothing)) for name, make in tables.TABLES.items()}
    assert not any(re.search(r"±", text) for text in made.values())


def test_pictures_are_the_same_bytes_each_time(tmp_path: Any) -> None:
    first, second = (plots.write(made_up(), tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["by_step.svg", "by_epoch.svg", "policies.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_place_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a place for each of .*Received: \['unknown'\]"):
        tables.filled("<!-- unknown -->\n<!-- end -->\n", made_up())


def test_the_readme_says_what_the_results_say() -> None:
    """Where this fails, results came that the tables lack: PYTHONPATH=tests python -m reproduction.tables."""
    results = measured.read(runs.RESULTS, tables.PAPER, [run.name for run in runs.plan()])
    text = tables.README.read_text(encoding="utf-8")
    assert tables.filled(text, results) == text
    figure = re.search(r"\d\.\d{4} ±", text)
    assert figure
    assert tables.filled(text.replace(figure[0], "9.9999 ±"), results) == text
