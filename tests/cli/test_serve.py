import os
import sys

import pytest

from bln_serve.cli import serve


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("BLN_SERVE_")]:
        monkeypatch.delenv(variable)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("bln_serve.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("bln_serve.serving", raising=False)
    monkeypatch.setitem(sys.modules, "pydantic_settings", None)
    assert serve.main([]) == 2
    assert "bln-serve needs packages that are not installed. Install them with: pip install 'bln-serve[serve]'" in (
        capsys.readouterr().err
    )


def test_a_wrong_value_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--port", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected --port (BLN_SERVE_PORT) to be a valid integer")


def test_a_missing_path_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["nowhere/at/all"]) == 1
    assert "Received: no such folder" in capsys.readouterr().err


def test_a_fault_of_our_own_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bln_serve.serving.server", None)
    monkeypatch.delattr("bln_serve.serving.server", raising=False)
    with pytest.raises(ImportError, match=r"bln_serve\.serving"):
        serve.main([])
