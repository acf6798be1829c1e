"""The log: one line an event on stdout, as plain text or as a JSON object.

What is said of a request stands beside the sentence, in a record's attributes, as `of_request` gives them.
"""

import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson

from bln_serve.serving.request_ids import ids_of
from bln_serve.serving.settings import LogFormat

OF_REQUEST = (
    "request_id",
    "trace_id",
    "span_id",
    "method",
    "path",
    "status",
    "duration_s",
    "model",
    "reason",
)
"""What a line may say of a request, beside the sentence."""

_MOST_CHARACTERS = 512  # of a path


def configure(log_format: LogFormat) -> None:
    """Write one line an event to stdout, flushed; of uvicorn only what went wrong."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; of a request what is known; an error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        said |= {name: value for name in OF_REQUEST if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(said, default=str).decode()
        except orjson.JSONEncodeError:  # a file's name that is no UTF-8
            return orjson.dumps({name: _encodable(value) for name, value in said.items()}, default=str).decode()


def of_request(scope: MutableMapping[str, Any], **more: Any) -> Mapping[str, Any]:
    """Return what a line says of a request, for `extra=`.

    Args:
        scope: of the request.
        more: what else is known of it, of the names in `OF_REQUEST`.
    """
    ids = ids_of(scope)
    return {
        "request_id": ids.request_id,
        "trace_id": ids.trace_id,
        "span_id": ids.span_id,
        "method": scope["method"],
        "path": path_of(scope),
        **more,
    }


def path_of(scope: Mapping[str, Any]) -> str:
    """Return a request's path as it can stand in a line: what could end the line, or hide in it, is escaped."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~", errors="replace")
    return path if len(path) <= _MOST_CHARACTERS else f"{path[:_MOST_CHARACTERS]}..."


def _encodable(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
