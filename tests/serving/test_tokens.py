"""Bearer tokens: read or refused without ever being shown, and compared all of them, whichever fits."""

import os
from hmac import compare_digest
from pathlib import Path
from typing import Any

import pytest

from bln_serve.errors import UsageError
from bln_serve.serving import tokens
from bln_serve.serving.settings import from_command_line, make
from bln_serve.serving.tokens import Tokens

ONE, TWO = "the-first-token-of-them-all", "the/second+token==of_them~all."


def bearer(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"here"), *((b"authorization", value.encode("latin-1")) for value in values)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# until March\n{ONE}\n\n  {TWO}  \r\n#{ONE}\n")
    return path


def test_without_tokens_there_are_none() -> None:
    assert not tokens.read(make())


def test_every_token_of_the_file_and_the_one_of_the_environment_open(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = "x" * 16
    monkeypatch.setenv("BLN_SERVE_TOKEN", third)
    read = tokens.read(from_command_line(["--token-file", str(file)]))
    assert read
    assert len(read.digests) == 3
    for token in (ONE, TWO, third):
        assert read.opened_by(bearer(f"Bearer {token}"))
        assert read.opened_by(bearer(f"bearer   {token} "))
    assert not read.opened_by(bearer(f"Bearer #{ONE}"))


def test_the_file_is_named_by_a_variable_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLN_SERVE_TOKEN_FILE", str(file))
    assert tokens.read(from_command_line([])).opened_by(bearer(f"Bearer {ONE}"))


@pytest.mark.parametrize(
    "values",
    [
        (),
        ("",),
        ("Bearer",),
        ("Bearer ",),
        (ONE,),
        (f"Basic {ONE}",),
        (f"Bearer{ONE}",),
        (f"Bearer\t{ONE}",),
        (f"Bearer {ONE[:-1]}",),
        (f"Bearer {ONE}x",),
        (f"Bearer {ONE} {ONE}",),
        (f"Bearer {ONE}, Bearer {ONE}",),
        (f"Bearer {ONE}", f"Bearer {ONE}"),
        (f"Bearer {ONE}", "Basic eA=="),
        (f"Bearer {ONE.upper()}",),
        (f"Bearer \xff{ONE}",),
        ("Bearer " + "\xe9" * 27,),
        ("Bearer " + "x" * 60_000,),
    ],
)
def test_nothing_else_opens(file: Path, values: tuple[str, ...]) -> None:
    assert not tokens.read(make(token_file=file)).opened_by(bearer(*values))


def test_all_tokens_are_compared_and_each_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, compared = tokens.read(make(token_file=file)), []

    def compare(first: bytes, second: bytes) -> bool:
        compared.append(second)
        return compare_digest(first, second)

    monkeypatch.setattr("hmac.compare_digest", compare)
    for token in (ONE, TWO, "neither-of-them-as-it-is"):
        compared.clear()
        read.opened_by(bearer(f"Bearer {token}"))
        assert compared == list(read.digests)
        assert all(len(digest) == 32 for digest in compared)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"at least one token.* Received: none"),
        (b"\n# only this\n", "Received: none"),
        (b"tooshort-secret", r"at least 16 .* in line 1 of .*tokens\. Received: 15 characters"),
        (b"# first\nlong-enough-to-be-a-token\nsecret secret secret", "in line 3 of .* Received: a space"),
        ("secret-secret-sécret".encode(), "in line 1 of .* Received: a space or another character"),
        (b"\xef\xbb\xbfsecret-secret-secret", "in line 1 of .* Received: a space or another character"),
        (b"secret-secret\0secret", "in line 1 of .* Received: a space or another character"),
    ],
)
def test_a_file_without_proper_tokens_is_refused_and_not_shown(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=sentence) as raised:
        tokens.read(make(token_file=path))
    assert "secret" not in str(raised.value)


def test_a_file_that_is_not_there_or_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one token a line at .*absent \(--token-file\)\. Received: No such file"):
        tokens.read(make(token_file=tmp_path / "absent"))
    with pytest.raises(UsageError, match="Received: Is a directory"):
        tokens.read(make(token_file=tmp_path))


def test_a_file_that_may_not_be_read(file: Path) -> None:
    file.chmod(0)
    user, nobody = os.geteuid(), 65534
    os.seteuid(user or nobody)  # root may read every file
    try:
        with pytest.raises(UsageError, match="Received: Permission denied"):
            tokens.read(make(token_file=file))
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("token", ["tooshort-secret", "secret secret secret", "secret-secret-sécret"])
def test_a_variable_without_a_proper_token_is_refused_and_not_shown(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLN_SERVE_TOKEN", token)
    with pytest.raises(UsageError, match=r"at least 16 .* in BLN_SERVE_TOKEN\. Received: ") as raised:
        tokens.read(make())
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("variable", ["BLN_SERVE_TOKEN", "BLN_SERVE_TOKEN_FILE", "bln_serve_token"])
def test_an_empty_variable_does_not_let_everybody_in(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "")
    with pytest.raises(UsageError, match=rf"something in {variable}, which says who may ask\. Received: nothing"):
        make()


def test_the_token_is_no_option_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        from_command_line(["--token", ONE])
    monkeypatch.setenv("BLN_SERVE_TOKEN", ONE)
    settings = from_command_line([])
    with pytest.raises(SystemExit, match="0"):
        from_command_line(["--help"])
    shown = [capsys.readouterr().out, repr(settings), str(settings), str(settings.model_dump()), repr(settings.token)]
    shown += [repr(tokens.read(settings)), settings.model_dump_json()]
    assert "BLN_SERVE_TOKEN" in shown[0]
    assert [text for text in shown if ONE in text or tokens.read(settings).digests[0].hex() in text] == []


@pytest.mark.parametrize("value", [["secret-in-a-list-of-it"], 12345678901234567, b"\xff-secret-secret"])
def test_a_token_of_the_wrong_type_is_refused_and_not_shown(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^Expected BLN_SERVE_TOKEN to be text\.$") as raised:
        make(token=value)
    causes = f"{raised.value!r} {raised.value.__cause__!r} {raised.value.__cause__}"
    assert "secret" not in causes
    assert "12345678901234567" not in causes


def test_a_wrong_value_elsewhere_shows_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLN_SERVE_TOKEN", ONE)
    with pytest.raises(UsageError, match="--port") as raised:
        make(port="x")
    assert ONE not in f"{raised.value!r} {raised.value.__cause__!r} {raised.value.__cause__}"


def test_tokens_are_false_without_any() -> None:
    assert not Tokens()
    assert not Tokens().opened_by(bearer(f"Bearer {ONE}"))
