"""bln-serve: serve exported models over HTTP."""

import contextlib
import sys
from collections.abc import Iterator, Sequence

from bln_serve import processors
from bln_serve.cli import _command
from bln_serve.errors import MissingExtraError

# Without the working directory in the way of imports, as where the command itself is started.
_WORKER = (sys.executable, "-P", "-c", "import sys; from bln_serve.cli.serve import work; sys.exit(work())")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return _command.run(lambda: _serve(sys.argv[1:] if argv is None else argv))


def work() -> int:
    """Run one of several workers, as `main` starts them: its number, host and port, and then main's own arguments."""
    number, host, port, *argv = sys.argv[1:]
    return _command.run(lambda: _work(int(number), host, int(port), argv))


def _serve(argv: Sequence[str]) -> int:
    with _needs_extra():
        from bln_serve.serving import settings  # noqa: PLC0415 - optional, and the message below names the extra
    given = settings.from_command_line(argv)
    if given.workers > 1:
        with _needs_extra():
            from bln_serve.serving import workers  # noqa: PLC0415 - it supervises, and needs nothing that serves
        return workers.supervise(given, _WORKER, argv)
    with _needs_extra():
        from bln_serve.serving import server  # noqa: PLC0415 - what serves
    return server.serve(given)


def _work(number: int, host: str, port: int, argv: Sequence[str]) -> int:
    from bln_serve.serving.lifeline import Lifeline  # noqa: PLC0415 - first of all, and before all that takes long

    lifeline = Lifeline()
    with _needs_extra():
        from bln_serve.serving import metrics, server, settings  # noqa: PLC0415 - what serves
    metrics.share(number)
    given = settings.from_command_line(argv)
    threads = given.threads or processors.available().share(given.workers)
    return server.work(given.model_copy(update={"host": host, "port": port, "threads": threads}), lifeline, number)


@contextlib.contextmanager
def _needs_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("bln_serve"):
            raise
        raise MissingExtraError("bln-serve", "serve") from error
