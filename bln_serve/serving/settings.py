"""What can be set, once: each setting is an environment variable BLN_SERVE_NAME and a command-line option --name.

The command line beats the environment, the environment beats the default.
"""

import argparse
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bln_serve.errors import UsageError

ENVIRONMENT_PREFIX = "BLN_SERVE_"

LogFormat = Literal["text", "json"]

ALL_MODELS = "*"
"""In `max_run_rows`, the name of every model that has no entry of its own."""

# How an option's value is written in --help; otherwise as the option's own name.
_METAVARS = {
    "model": "NAME=VERSION",
    "default_model": "NAME",
    "idle_timeout_s": "SECONDS",
    "log_format": "text|json",
    "max_body_bytes": "BYTES",
    "max_queued_bytes": "BYTES",
    "max_queued_rows": "ROWS",
    "max_run_rows": "[NAME=]ROWS",
    "repository_poll_s": "SECONDS",
    "request_timeout_s": "SECONDS",
    "shutdown_timeout_s": "SECONDS",
    "threads": "N",
    "token_file": "FILE",
    "workers": "N",
}

_REPEATABLE = ("model", "max_run_rows")

# A process's arguments are for everybody to see.
ENVIRONMENT_ONLY = ("token",)
# An empty variable counts as not set; what keeps others out must not go missing so.
_NEVER_EMPTY = ("token", "token_file")


class Settings(BaseSettings):
    """The service's settings. Frozen; every field's description is its --help."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    paths: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(Path("models"),),
        min_length=1,
        description="model repositories, models' folders or versions' folders; the variable takes them "
        "separated by commas",
    )
    model: Annotated[Mapping[str, int], NoDecode] = Field(
        default_factory=dict,
        description="serve this version of a model and no other; repeatable; the variable takes several, "
        "separated by commas. By default the latest version that passes its verification",
    )
    default_model: str | None = Field(
        default=None, description="the model that /predict answers for, where there are several"
    )
    repository_poll_s: float = Field(
        default=5,
        ge=0,
        allow_inf_nan=False,
        description="seconds between two looks at the paths, for versions that have come or gone; 0 for no look after "
        "the start",
    )
    host: str = Field(default="127.0.0.1", description="the address to listen on; 0.0.0.0 for every network")
    port: int = Field(default=8000, ge=0, le=65535, description="the TCP port to listen on; 0 for any free one")
    max_body_bytes: int = Field(
        default=8 * 1024 * 1024, ge=1, description="the largest request body accepted, in bytes"
    )
    max_queued_rows: int = Field(
        default=16384, ge=1, description="the most rows of unanswered requests to one model; above it requests get 503"
    )
    max_queued_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=1,
        description="the most bytes of unanswered requests' inputs to one model; above it requests get 503",
    )
    max_run_rows: Annotated[Mapping[str, int], NoDecode] = Field(
        default_factory=dict,
        description="the most rows of several requests in one run, of every model or of one; repeatable; the variable "
        "takes several, separated by commas. By default measured at the start",
    )
    deterministic: bool = Field(
        default=False,
        description="let no two requests share a run, so that the same request gets the same bits at any load; slower "
        "under load",
    )
    request_timeout_s: float = Field(
        default=30, gt=0, description="seconds from a request's arrival in which it is answered, or gets 504"
    )
    idle_timeout_s: float = Field(
        default=10,
        gt=0,
        description="seconds after which a connection is closed on which nothing comes: no request, or no more of one",
    )
    shutdown_timeout_s: int = Field(
        default=20,
        ge=1,
        description="seconds after SIGTERM in which accepted requests are answered; what is left then is refused, "
        "and the process ends within two more",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="threads of one run; by default as many as the CPU quota and the affinity allow, divided by the "
        "workers",
    )
    workers: int = Field(
        default=1, ge=1, description="processes that share the port; each loads every model, and answers for itself"
    )

    token_file: Path | None = Field(
        default=None,
        description="a file with bearer tokens, one a line, of which every request must then bring one, except to "
        "/healthz and /readyz",
    )
    token: SecretStr | None = Field(
        default=None, exclude=True, repr=False, description="one more such token; as a variable alone"
    )
    log_format: LogFormat = Field(default="text", description="plain lines, or one JSON object a line")
    log_requests: bool = Field(default=False, description="write a line for every request")

    @field_validator("paths", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("model", mode="before")
    @classmethod
    def _read_pins(cls, value: Any) -> Any:
        return _by_name(value, "NAME=VERSION, such as digits=2", "one version a model, and not two")

    @field_validator("max_run_rows", mode="before")
    @classmethod
    def _read_run_rows(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {ALL_MODELS: value}
        return _by_name(
            value, "ROWS or NAME=ROWS, such as 64 or digits=64", "one number a model, and not two", ALL_MODELS
        )

    def run_rows_of(self, name: str) -> int | None:
        """Return the rows that a model's runs have at most, as set; None for what is measured."""
        return self.max_run_rows.get(name, self.max_run_rows.get(ALL_MODELS))


def _by_name(value: Any, expected: str, once: str, without_name: str | None = None) -> Any:
    """Read NAME=NUMBER items, given as text with commas, or one by one; a mapping stays as it is."""
    if isinstance(value, Mapping):
        return value
    numbers: dict[str, str] = {}
    for item in value.split(",") if isinstance(value, str) else value:
        name, equals, number = (part.strip() for part in item.rpartition("="))
        if not equals and without_name is not None:
            name = without_name
        if not name or not number.isascii() or not number.isdigit() or number.startswith("0"):
            raise ValueError(expected)
        if numbers.get(name, number) != number:
            raise ValueError(f"{once} for {name!r}")
        numbers[name] = number
    return numbers


def from_command_line(argv: Sequence[str] | None = None) -> Settings:
    """Read the command line and, for what it leaves out, the environment.

    Args:
        argv: the arguments after the program's name; None for the process's own.

    Raises:
        UsageError: a value is wrong, or a BLN_SERVE_ variable names no setting.
        SystemExit: argparse's own end, for --help and unknown options.
    """
    return make(**vars(_parser().parse_args(argv)))


def make(**values: Any) -> Settings:
    """Make settings from values and, for what they leave out, the environment.

    Raises:
        UsageError: a value is wrong, or a BLN_SERVE_ variable names no setting.
    """
    _check_environment()
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UsageError(" ".join(_sentence(detail) for detail in error.errors())) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bln-serve",
        description="Serve exported models: POST /predict answers, /healthz and /readyz say how the service is.",
        epilog=f"Every option is also an environment variable, such as {ENVIRONMENT_PREFIX}PORT. {_environment_only()}",
        argument_default=argparse.SUPPRESS,  # what is left out is left to the environment
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        text = f"{field.description}{_default(field.get_default(call_default_factory=True))}".replace("%", "%%")
        if name in ENVIRONMENT_ONLY:
            continue
        if name == "paths":
            parser.add_argument("paths", nargs="*", metavar="PATH", help=text, default=argparse.SUPPRESS)
        else:
            option = f"--{name.replace('_', '-')}"
            if field.annotation is bool:
                parser.add_argument(option, action="store_true", help=text)
                continue
            action = "append" if name in _REPEATABLE else "store"
            parser.add_argument(option, action=action, metavar=_METAVARS.get(name, name.upper()), help=text)
    return parser


def _environment_only() -> str:
    described = (f"{_variable(name)}: {Settings.model_fields[name].description}" for name in ENVIRONMENT_ONLY)
    return f"{'; '.join(described)}."


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


def _default(value: Any) -> str:
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f" (default: {shown})" if shown is not None and shown is not False and shown != {} else ""


def _sentence(detail: Any) -> str:
    name = str(detail["loc"][0]) if detail["loc"] else "settings"
    if detail["type"] == "extra_forbidden":
        return f"Expected one of the settings {', '.join(Settings.model_fields)}. Received: {name!r}."
    option = "PATH" if name == "paths" else f"--{name.replace('_', '-')}"
    if name in ENVIRONMENT_ONLY:
        return f"Expected {_variable(name)} to be text."  # what was received is nobody's business
    reason = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return f"Expected {option} ({ENVIRONMENT_PREFIX}{name.upper()}) to be {reason}. Received: {detail['input']!r}."


def _check_environment() -> None:
    # pydantic-settings looks up the names it knows and so passes over a misspelt one in silence.
    known = [f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in Settings.model_fields]
    for variable, value in os.environ.items():
        if not value and variable.upper() in map(_variable, _NEVER_EMPTY):
            raise UsageError(
                f"Expected something in {variable}, which says who may ask. Received: nothing. Unset it to let "
                "everybody ask."
            )
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and variable.upper() not in known:
            nearest = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"Expected environment variables that name a setting. Received: {variable}. "
                f"Did you mean {nearest}? All of them: {', '.join(known)}."
            )
