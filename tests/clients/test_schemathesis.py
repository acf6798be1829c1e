"""/openapi.json is valid, and holds: schemathesis asks each route for everything that it may be asked, and more.

A schema says what all models have in common, and a model takes one shape alone: so a body that the schema allows may
be refused (positive_data_acceptance is not asked for). Everything else is: no 5xx, statuses, content types, headers and
bodies as described, wrong requests refused, other methods 405.
"""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from support.artifacts import NAMES, TOGETHER
from support.server import Server

MODELS = (*NAMES, *TOGETHER)
PROGRAM = Path(sys.executable).parent / "schemathesis"
ASKED = "predict$|infer$"
THOROUGH = ("digits_cnn", "digits_rnn", "tiny_two_inputs")
"""Asked for every boundary of the schemas and at random as well: one of each kind. Such a request knows no shape, and
is for the others nearly what it is for these."""
# What a request for 0 ms is right to get. Everything else that begins with 5 is a failure.
ANYTHING = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""
# A model's name and version that are there.
KNOWN = f"""{ANYTHING}
[parameters]
"path.name" = "%s"
"path.version" = "1"
"""


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> Any:
    return client.get("/openapi.json").json()


def test_the_description_is_valid(document: Any) -> None:
    schemathesis.openapi.from_dict(document).validate()


def test_a_description_that_is_not_valid_is_seen(document: Any) -> None:
    wrong = deepcopy(document)
    del wrong["paths"]["/predict"]["post"]["responses"]["200"]["description"]
    with pytest.raises(Exception, match="description"):
        schemathesis.openapi.from_dict(wrong).validate()


def run(server: Server, folder: Path, environment: dict[str, str], configured: str, *options: str) -> None:
    configuration = folder / "schemathesis.toml"
    configuration.write_text(configured)
    command: list[str | Path] = [PROGRAM, "--config-file", configuration, "run", f"{server.url}/openapi.json"]
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    limits = ["--seed", "1", "--generation-deterministic", "--warnings", "off"]
    ended = subprocess.run(
        [*command, *checks, *limits, "--workers", "1", "--no-color", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


def answers(client: httpx.Client) -> dict[str, float]:
    """Return how often each status was answered to requests that ask a model."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("bln_requests_total{")]
    return {line.partition('status="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.parametrize("name", MODELS)
def test_asking_a_model(
    name: str, server: Server, client: httpx.Client, tmp_path: Path, unproxied: dict[str, str]
) -> None:
    before = answers(client)
    phases = ["--phases", f"examples{',coverage,fuzzing' if name in THOROUGH else ''}", "--max-examples", "6"]
    run(server, tmp_path, unproxied, KNOWN % name, "--include-path-regex", ASKED, *phases)
    after = answers(client)
    assert after["200"] > before.get("200", 0), "no request was right"
    assert after["422"] > before.get("422", 0)
    assert {status for status in after if status.startswith("5")} <= {"504"}


def test_every_other_route(server: Server, client: httpx.Client, tmp_path: Path, unproxied: dict[str, str]) -> None:
    phases = ["--phases", "coverage,fuzzing", "--max-examples", "6"]
    run(server, tmp_path, unproxied, KNOWN % "digits_cnn", "--exclude-path-regex", ASKED, *phases)


def test_names_and_times_that_nobody_foresaw(server: Server, tmp_path: Path, unproxied: dict[str, str]) -> None:
    run(server, tmp_path, unproxied, ANYTHING, "--phases", "fuzzing", "--max-examples", "6")
