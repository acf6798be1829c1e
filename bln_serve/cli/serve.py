"""bln-serve: serve exported models over HTTP."""

from collections.abc import Sequence

from bln_serve.cli import _command
from bln_serve.errors import MissingExtraError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return _command.run(lambda: _serve(argv))


def _serve(argv: Sequence[str] | None) -> int:
    try:
        from bln_serve.serving import server, settings  # noqa: PLC0415 - optional, and the message below names the extra
    except ImportError as error:
        if (error.name or "").startswith("bln_serve"):
            raise
        raise MissingExtraError("bln-serve", "serve") from error
    return server.serve(settings.from_command_line(argv))
