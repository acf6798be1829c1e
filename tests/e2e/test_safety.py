"""What SECURITY.md promises, asked of real servers."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.artifacts import copy_of, edit_manifest
from support.onnx_bytes import adding
from support.raw import RawClient
from support.server import Server
from support.sockets import family_of, listeners

from bln_serve.artifact import ONNX_MODEL, sha256
from bln_serve.manifest import read_manifest

ROOT = Path(__file__).parents[2]
TOKEN, OTHER = "a-token-for-everybody-0123456789", "an-older-one-of-them-9876543210"
BODY = {"instances": [[[0.5] * 8] * 8]}
MAIN = "from bln_serve.cli.serve import main; sys.exit(main())"


def ready(server: Server, **headers: str) -> httpx.Client:
    """Wait until a server's models are loaded, and return a client of it."""
    client = httpx.Client(base_url=server.url, trust_env=False, timeout=60)

    async def wait() -> None:
        async with server.client() as waiting:
            waiting.headers.update(headers)
            await server.wait_until_ready(waiting)

    asyncio.run(wait())
    return client


# Nothing listens but where told


@pytest.mark.parametrize(("workers", "host"), [("1", "127.0.0.1"), ("1", "127.0.0.2"), ("2", "127.0.0.1")])
def test_nothing_listens_but_where_told(
    start_server: Callable[..., Server], golden_artifacts: Path, workers: str, host: str
) -> None:
    server = start_server(str(golden_artifacts / "digits_cnn"), "--workers", workers, "--host", host)
    with ready(server) as client:
        assert client.post("/predict", json=BODY).status_code == 200
    family = family_of(server.process.pid)
    found = listeners(family)
    assert set(found) == {(host, httpx.URL(server.url).port)}
    assert len(found) == int(workers)
    assert len(family) >= int(workers)


# Telemetry of ONNX Runtime

SITE = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            with open(os.environ["WATCHED"], "a") as file:
                file.write(f"{os.getpid()} {os.environ.get('ORT_DISABLE_TELEMETRY')}\\n")

sys.meta_path.insert(0, Watch())
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_onnx_runtime_s_telemetry_is_off_before_it_is_imported_in_every_process(
    start_server: Callable[..., Server], golden_artifacts: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    watched = tmp_path / "watched"
    server = start_server(
        str(golden_artifacts / "digits_cnn"),
        "--workers",
        str(workers),
        PYTHONPATH=str(tmp_path),
        WATCHED=str(watched),
    )
    ready(server).close()
    seen = [line.split() for line in watched.read_text().splitlines()]
    assert {value for _, value in seen} == {"1"}
    assert len({pid for pid, _ in seen}) == workers


# No stack trace in an answer

FAILING = f"""
import sys
from bln_serve.serving import app
from bln_serve.serving.served_model import ServedModel

async def fail(*_):
    raise ZeroDivisionError("/secret/of/the/house")

ServedModel.answer = fail
made = app.create_app
def make(*given):
    application = made(*given)
    application.add_api_route("/fails", fail_in_a_route)
    return application
def fail_in_a_route():
    raise ZeroDivisionError("/secret/of/the/house")
from bln_serve.serving import server
server.create_app = make
{MAIN}
"""


def test_no_stack_trace_in_an_answer_and_all_of_it_in_the_log(golden_artifacts: Path) -> None:
    folder = str(golden_artifacts / "digits_cnn")
    server = Server(folder, "--log-format", "json", command=[sys.executable, "-c", FAILING])
    try:
        with ready(server) as client:
            answers = [client.post("/predict", json=BODY), client.get("/fails"), client.post("/predict", json=BODY)]
            assert client.get("/healthz").status_code == 200
    finally:
        server.terminate()
        assert server.wait() == 0
        server.end()
    for answer in answers:
        assert answer.status_code == 500
        assert answer.json() == {
            "error": "Expected to be able to answer. Received: an error inside the service; its log has the details."
        }
        assert "secret" not in str(answer.headers)
    said = [json.loads(line) for line in [server.first_line, *server.lines]]
    failures = [line for line in said if line["level"] == "ERROR"]
    assert [line["request_id"] for line in failures] == [answer.headers["x-request-id"] for answer in answers]
    for line in failures:
        assert line["error"].startswith("Traceback (most recent call last):\n")
        assert line["error"].endswith("ZeroDivisionError: /secret/of/the/house")
        assert line["status"] == 500


# Names cannot leave the repository

AUDITED = f"""
import os, sys
said = os.open(os.environ["AUDIT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def say(what, path):
    os.write(said, f"{{what}} {{path!r}}\\n".encode(errors="backslashreplace"))
sys.addaudithook(lambda event, args: say(event, args[0]) if event in {{"open", "os.listdir", "os.scandir"}} else None)
for name in ("stat", "lstat", "access", "readlink"):
    def watched(path, *args, _real=getattr(os, name), _name=name, **more):
        say(_name, path)
        return _real(path, *args, **more)
    setattr(os, name, watched)
{MAIN}
"""
MARK = "zzmarkzz"
NAMES = [
    "..",
    ".",
    f"../{MARK}",
    f"../../outside/{MARK}",
    "%2e%2e",
    f"%2e%2e%2f{MARK}",
    f"..%2f..%2foutside%2f{MARK}",
    f"..%5c..%5c{MARK}",
    f"%252e%252e%252f{MARK}",
    f"%c0%ae%c0%ae%c0%af{MARK}",
    f"/{MARK}",
    f"//{MARK}",
    f"%2f{MARK}",
    f"%2Fetc%2Fpasswd%00{MARK}",
    f"{MARK}%00",
    f"%00{MARK}",
    f"digits_cnn%2f..%2f{MARK}",
    f"digits_cnn%00{MARK}",
    f"{MARK}%0d%0aset-cookie:a",
    f"%F0%9F%98%80{MARK}",
    f"%ff%fe{MARK}",
    f"~{MARK}",
    f"$HOME{MARK}",
    MARK * 1000,
    f"file:%2f%2f%2f{MARK}",
]
ROUTES = [
    "POST /models/{}/predict",
    "POST /models/{}/versions/1/predict",
    "POST /models/digits_cnn/versions/{}/predict",
    "POST /v1/models/{}:predict",
    "POST /v1/models/digits_cnn/versions/{}:predict",
    "POST /v2/models/{}/infer",
    "POST /v2/models/digits_cnn/versions/{}/infer",
    "GET /models/{}",
    "GET /v1/models/{}",
    "GET /v1/models/{}/metadata",
    "GET /v2/models/{}",
    "GET /v2/models/{}/ready",
    "GET /v2/models/digits_cnn/versions/{}",
    "GET /{}",
    "GET /docs/{}",
    "GET /static/{}",
]


@pytest.fixture(scope="module")
def audited(golden_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that writes down each file it looks at, and beside its repository a model that it was not given."""
    folder = tmp_path_factory.mktemp("audited")
    copy_of(golden_artifacts / "digits_cnn" / "1", folder / "models" / "digits_cnn" / "1")
    copy_of(golden_artifacts / "digits_cnn" / "1", folder / "outside" / MARK / "1")
    copy_of(golden_artifacts / "digits_cnn" / "1", folder / MARK / "1")
    command = [sys.executable, "-c", AUDITED]
    server = Server(str(folder / "models"), command=["env", f"AUDIT={folder / 'audit'}", *command])
    ready(server).close()
    yield server, folder / "audit"
    server.end()


@pytest.mark.parametrize("route", ROUTES)
def test_a_name_that_leads_elsewhere_is_unknown_and_no_file_is_looked_for(
    audited: tuple[Server, Path], route: str
) -> None:
    server, audit = audited
    assert re.search(r"open .*models/digits_cnn/1/manifest\.json", audit.read_text())
    assert re.search(r"stat .*models", audit.read_text())
    body = json.dumps(BODY).encode()
    with RawClient(server.url) as client:
        for name in NAMES:
            head = (f"{route.format(name)} HTTP/1.1", "host: x", "content-type: application/json")
            client.send(*head, f"content-length: {len(body)}", body=body)
            answer = client.answer()
            if route in {"GET /{}", "GET /docs/{}"} and name in {".", "..", "/"}:
                assert answer.status in {200, 404}
                continue
            assert answer.status in {400, 404}, name
            assert answer.error.startswith("Expected ")
            assert "set-cookie" not in answer.headers
    assert MARK not in audit.read_text()


# Tokens


def everything_said(server: Server) -> str:
    server.terminate()
    assert server.wait() == 0
    return "\n".join([server.first_line, *server.lines])


@pytest.mark.parametrize(("workers", "log_format"), [("1", "text"), ("2", "json")])
def test_tokens_stand_nowhere_but_where_they_were_put(
    start_server: Callable[..., Server], golden_artifacts: Path, tmp_path: Path, workers: str, log_format: str
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# the new one\n{TOKEN}\n")
    server = start_server(
        str(golden_artifacts / "digits_cnn"),
        *("--workers", workers, "--token-file", str(file), "--log-format", log_format, "--log-requests"),
        BLN_SERVE_TOKEN=OTHER,
    )
    answers = []
    with ready(server, authorization=f"Bearer {TOKEN}") as client:
        for token in (TOKEN, OTHER):
            right = {"authorization": f"Bearer {token}"}
            assert client.post("/predict", json=BODY, headers=right).status_code == 200
            answers.append(client.post("/predict", content=b"{", headers={**right, "accept": "text/csv"}))
            answers.append(client.post("/predict", json=BODY, headers={**right, "bln-timeout-ms": "x"}))
            answers.append(client.get("/metrics", headers=right))
            for value in (f"Basic {token}", token, f"Bearer {token}x", f"Bearer {token}, Bearer {token}"):
                answers.append(client.post("/predict", json=BODY, headers={"authorization": value}))
                assert answers[-1].status_code == 401
        answers += [client.post("/predict", json=BODY), client.get("/readyz"), client.get("/metrics")]
    assert answers[-2].json() == {"ready": True}
    with RawClient(server.url) as raw:
        for lines in ([f"Authorization: Bearer {TOKEN}\x00"], [f"Authorization: Bearer {TOKEN}"] * 2):
            raw.send("GET /metrics HTTP/1.1", "host: x", *lines)
            refused = raw.answer()
            assert refused.status in {400, 401}
            answers.append(httpx.Response(refused.status, content=refused.body))
            if refused.headers.get("connection") == "close":
                break
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in family_of(server.process.pid)]
    said = everything_said(server)
    if log_format == "json":
        assert all(json.loads(line)["time"] for line in said.splitlines())
    assert said.count("401") >= 9
    for shown in [said, *commands, *(f"{answer.headers} {answer.text}" for answer in answers)]:
        assert TOKEN not in shown
        assert OTHER not in shown


def test_the_refusal_of_a_stranger_does_not_wait_for_a_body(
    start_server: Callable[..., Server], golden_artifacts: Path
) -> None:
    server = start_server(str(golden_artifacts / "digits_cnn"), BLN_SERVE_TOKEN=TOKEN)
    with RawClient(server.url) as client:
        client.send("POST /predict HTTP/1.1", "host: x", "content-type: application/json", "content-length: 8000000")
        answer = client.answer()
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    with RawClient(server.url) as client:
        client.send_bytes(b"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\xe9\r\n\r\n")
        assert client.answer().status == 401


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "Received: No such file or directory."),
        ("", "Received: none."),
        ("tooshort-secret", "Received: 15 characters."),
        ("secret with secret spaces", "Received: a space or another character."),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_tokens_that_are_none_end_the_service_with_2_and_a_sentence(
    *,
    run_command: Callable[..., subprocess.CompletedProcess[str]],
    golden_artifacts: Path,
    tmp_path: Path,
    content: str | None,
    sentence: str,
    workers: str,
) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_text(content)
    ended = run_command(str(golden_artifacts), "--token-file", str(file), "--workers", workers, "--port", "0")
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert str(file) in ended.stderr
    assert "secret" not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr


# What an artifact may do


def test_a_version_whose_weights_are_elsewhere_is_not_served_and_the_one_before_is(
    start_server: Callable[..., Server], golden_artifacts: Path, tmp_path: Path
) -> None:
    copy_of(golden_artifacts / "digits_cnn" / "1", tmp_path / "models" / "digits_cnn" / "1")
    bad = copy_of(golden_artifacts / "digits_cnn" / "1", tmp_path / "models" / "digits_cnn" / "2")
    (tmp_path / "secret").write_bytes(bytes(16))
    (bad / ONNX_MODEL).write_bytes(adding("../../../secret"))
    edit_manifest(bad, version=2, files={**read_manifest(bad).files, ONNX_MODEL: sha256(bad / ONNX_MODEL)})
    server = start_server(str(tmp_path / "models"))
    with ready(server) as client:
        (broken,) = client.get("/readyz").json()["broken"]
        assert client.post("/predict", json=BODY).json()["version"] == 1
    assert broken["version"] == 2
    assert "files of its folder that the manifest names. Received: '../../../secret'." in broken["reason"]


def test_folders_may_be_links_as_mounted_volumes_make_them_and_files_may_not_lead_out(
    start_server: Callable[..., Server], golden_artifacts: Path, tmp_path: Path
) -> None:
    stored = copy_of(golden_artifacts / "digits_cnn" / "1", tmp_path / "store" / "content")
    volume = tmp_path / "volume"
    model = volume / "..2026_01_01" / "digits_cnn"
    copy_of(golden_artifacts / "digits_cnn" / "1", model / "1")
    (volume / "..data").symlink_to("..2026_01_01")
    (volume / "digits_cnn").symlink_to("..data/digits_cnn")
    (volume / "digits_rnn").mkdir()
    shutil.copytree(golden_artifacts / "digits_rnn" / "1", tmp_path / "store" / "rnn")
    (volume / "digits_rnn" / "1").symlink_to(tmp_path / "store" / "rnn")
    (volume / "tiny").mkdir()
    edit_manifest(stored, name="tiny")
    (volume / "tiny" / "1").mkdir()
    for file in stored.iterdir():
        (volume / "tiny" / "1" / file.name).symlink_to(file)
    server = start_server(str(volume))
    with ready(server) as client:
        document = client.get("/readyz").json()
    assert [each["name"] for each in document["models"]] == ["digits_cnn", "digits_rnn"]
    (broken,) = document["broken"]
    assert broken["name"] == "tiny"
    assert "Received: a path that leaves it" in broken["reason"]


# SECURITY.md itself


def test_every_test_that_security_md_names_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 15
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
