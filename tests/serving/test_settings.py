from pathlib import Path
from typing import Any

import pytest

from bln_serve.errors import UsageError
from bln_serve.serving.settings import ENVIRONMENT_ONLY, Settings, from_command_line, make


def test_defaults() -> None:
    settings = from_command_line([])
    assert settings.paths == (Path("models"),)
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8000, 8 * 1024 * 1024)
    assert settings.model == {}


def test_the_command_line_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLN_SERVE_PORT", "7001")
    monkeypatch.setenv("BLN_SERVE_THREADS", "3")
    settings = from_command_line(["--port", "7002"])
    assert (settings.port, settings.threads) == (7002, 3)


def test_lists_on_the_command_line_and_in_the_environment_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from_line = from_command_line(["a", "b", "--model", "digits=2", "--model", "reviews=1"])
    monkeypatch.setenv("BLN_SERVE_PATHS", "a, b")
    monkeypatch.setenv("BLN_SERVE_MODEL", "digits=2,reviews=1")
    assert from_command_line([]) == from_line
    assert from_line.paths == (Path("a"), Path("b"))
    assert from_line.model == {"digits": 2, "reviews": 1}


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLN_SERVE_PORT", "")
    assert make().port == 8000


@pytest.mark.parametrize(
    ("variable", "suggestion"), [("BLN_SERVE_PROT", "BLN_SERVE_PORT"), ("BLN_SERVE_MODELS", "BLN_SERVE_MODEL")]
)
def test_a_misspelt_variable_is_refused_with_the_nearest_right_one(
    variable: str, suggestion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UsageError, match=rf"Received: {variable}\. Did you mean {suggestion}\?"):
        make()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "x"], r"Expected --port \(BLN_SERVE_PORT\) to be a valid integer.* Received: 'x'"),
        (["--port", "65536"], "less than or equal to 65535. Received: '65536'"),
        (["--max-queued-rows", "0"], "--max-queued-rows .* greater than or equal to 1"),
        (["--model", "digits"], r"Expected --model \(BLN_SERVE_MODEL\) to be NAME=VERSION, such as digits=2"),
        (["--model", "digits=01"], "NAME=VERSION"),
        (["--model", "digits=1", "--model", "digits=2"], "one version a model, and not two for 'digits'"),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        from_command_line(arguments)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Expected one of the settings paths, .* Received: 'ports'"):
        make(ports=1)


def test_an_unknown_option_ends_with_2_and_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        from_command_line(["--por", "1"])
    assert "unrecognized arguments: --por" in capsys.readouterr().err


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        from_command_line(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert " ".join(field.description.split()) in shown
        option = f"BLN_SERVE_{name.upper()}:" if name in ENVIRONMENT_ONLY else f"--{name.replace('_', '-')} "
        assert name == "paths" or option in shown


def test_every_setting_is_in_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    options = [
        "BLN_SERVE_PATHS",
        *(f"| `BLN_SERVE_{name.upper()}`" for name in ENVIRONMENT_ONLY),
        *(f"| `--{name.replace('_', '-')}" for name in Settings.model_fields.keys() - {"paths", *ENVIRONMENT_ONLY}),
    ]
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("64", {"a": 64, "b": 64}),
        ("a=8,64", {"a": 8, "b": 64}),
        (["a=8"], {"a": 8, "b": None}),
        (16, {"a": 16, "b": 16}),
    ],
)
def test_the_rows_of_a_run_are_set_for_all_models_or_for_one(value: Any, expected: dict[str, int | None]) -> None:
    settings = make(max_run_rows=value)
    assert {name: settings.run_rows_of(name) for name in expected} == expected


@pytest.mark.parametrize("value", ["0", "x", "a=", "=8", "a=0", "a=8,a=9", "-1", "8.5"])
def test_rows_of_a_run_that_are_none(value: str) -> None:
    with pytest.raises(
        UsageError, match=r"--max-run-rows \(BLN_SERVE_MAX_RUN_ROWS\) to be (ROWS or NAME=ROWS|one number)"
    ):
        make(max_run_rows=value)


def test_a_switch_is_set_by_option_and_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not from_command_line([]).deterministic
    assert from_command_line(["--deterministic"]).deterministic
    monkeypatch.setenv("BLN_SERVE_DETERMINISTIC", "true")
    assert from_command_line([]).deterministic
