"""What a README's blocks say: their commands, and the output that is shown for them.

Numbers differ between machines and runs, so `#` stands for each; `...` stands for any lines.
"""

import contextlib
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path

NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")


def blocks(readme: Path) -> list[tuple[str, str]]:
    """Return the kind, console or python, and the text of each block, in order."""
    return re.findall(r"^```(console|python)\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a console block with the lines shown for it; what make runs shows commands of its own."""
    if block.startswith("$ make"):
        command, *shown = block.removeprefix("$ ").splitlines()
        yield command, shown
        return
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, shown


def normal(line: str) -> str:
    # Where two answers differ most, and whether they do at all, is the machine's business, as are its processors.
    line = re.sub(r"^(threads of a run: \d+, for ).*", r"\1", line)
    return re.sub(r"(# ?)+", "#", NUMBER.sub("#", re.sub(r", most at \[[0-9, ]+\]", "", line))).strip()


def assert_shown(shown: list[str], printed: list[str]) -> None:
    """Check that the shown lines were printed in this order, without gaps but where `...` stands."""
    expected, actual = [normal(line) for line in shown], [normal(line) for line in printed]
    if "..." in shown:
        pattern = "".join(r"(.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in expected)
        assert re.fullmatch(pattern, "".join(f"{line}\n" for line in actual)), (expected, actual)
    else:
        assert actual == expected


def free_port() -> int:
    """Return a port of this machine that nothing listens on, of those that no client is given meanwhile."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return int(free.getsockname()[1])
