"""Bearer tokens (https://www.rfc-editor.org/rfc/rfc6750): where they come from, and whether a request has one.

All tokens open the same doors; there are several so that a new one can be given out before an old one is taken back.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bln_serve.errors import UsageError
from bln_serve.serving.settings import Settings

FEWEST_CHARACTERS = 16

_TOKEN = re.compile(rb"[\x21-\x7e]{%d,}" % FEWEST_CHARACTERS)
_BEARER = re.compile(rb"bearer +([\x21-\x7e]+) *", re.IGNORECASE)


@dataclass(frozen=True)
class Tokens:
    """The tokens of which each request must bring one; of none, if there are none.

    Attributes:
        digests: SHA-256 of each. The tokens themselves are not kept.
    """

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def opened_by(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these headers brings one of the tokens, in exactly one Authorization header.

        How long this takes does not depend on how nearly right a token is, nor on which one it is.
        """
        values = [value for name, value in headers if name == b"authorization"]
        match = _BEARER.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            return False
        digest = hashlib.sha256(match[1]).digest()
        return sum(hmac.compare_digest(digest, each) for each in self.digests) > 0  # any() would end at the first


def read(settings: Settings) -> Tokens:
    """Read the tokens that the settings name.

    Raises:
        UsageError: the file cannot be read or holds none, or one is too short or no plain text. No message holds a
            token.
    """
    found = []
    if settings.token_file is not None:
        found += _in_file(settings.token_file)
    if settings.token is not None:
        found.append(_checked(settings.token.get_secret_value().encode(errors="surrogateescape"), "BLN_SERVE_TOKEN"))
    return Tokens(tuple(hashlib.sha256(token).digest() for token in found))


def _in_file(path: Path) -> list[bytes]:
    try:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise UsageError(
            f"Expected a file with one token a line at {path} (--token-file). Received: {error.strerror}. "
            "Correct the path, or let this user read it."
        ) from error
    found = [
        _checked(line, f"line {number} of {path}")
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith(b"#")
    ]
    if not found:
        raise UsageError(
            f"Expected at least one token, on a line of its own, in {path} (--token-file). Received: none. "
            "Write one into it, or leave --token-file out to let everybody ask."
        )
    return found


def _checked(token: bytes, where: str) -> bytes:
    if not _TOKEN.fullmatch(token):
        wrong = f"{len(token)} characters" if len(token) < FEWEST_CHARACTERS else "a space or another character"
        raise UsageError(
            f"Expected a token of at least {FEWEST_CHARACTERS} letters, digits and signs of ASCII, without spaces, in "
            f"{where}. Received: {wrong}. Make one with: openssl rand -hex 32"
        )
    return token
