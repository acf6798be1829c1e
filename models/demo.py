"""The whole way on real input: export both shipped models, serve them, and ask about images they have never seen.

Run it with `make demo`, or with `make serve` to leave the service running.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from bln_serve.repository import versions_in

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
CLIENTS = 4
START_TIMEOUT_S = 60.0

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """What is asked of one model: requests of `rows` images each."""

    model: str
    rows: int

    def requests(self, images: Rows) -> list[Rows]:
        """Cut the images into requests."""
        return [images[start : start + self.rows] for start in range(0, len(images), self.rows)]


QUESTIONS = (Question("digits_cnn", 1), Question("digits_rnn", 25))


def main() -> int:
    """Export, serve, ask, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repository", type=Path, default=HERE, help="where the exported versions go")
    parser.add_argument("--keep-serving", action="store_true", help="leave the service running until Ctrl-C")
    arguments = parser.parse_args()
    began = time.monotonic()
    pins = {}
    for question in QUESTIONS:
        show("bln-export", HERE / f"{question.model}.keras", "-o", arguments.repository)
        pins[question.model] = versions_in(arguments.repository / question.model)[-1]
    with np.load(HERE / "digits_samples.npz", allow_pickle=False) as samples:
        images, labels = samples["images"].astype(np.float32), samples["labels"]
    with service(arguments.repository, pins) as (url, process):
        for question in QUESTIONS:
            report(url, question, images, labels)
        print(f"\nAll of it took {time.monotonic() - began:.0f} s.", flush=True)
        if arguments.keep_serving:
            with contextlib.suppress(KeyboardInterrupt):
                print(f"\nServing at {url} until Ctrl-C. Try:\n\n{curl_line(url, images[:1])}\n", flush=True)
                process.wait()
    return 0


def show(command: str, *arguments: object) -> None:
    """Print a command as it would be typed, and run it."""
    words = [shown(argument) for argument in arguments]
    print(f"\n$ {' '.join([command, *words])}", flush=True)
    subprocess.run([BIN / command, *words], cwd=HERE.parent, check=True)


def shown(argument: object) -> str:
    """Return an argument as a person in the project's folder types it."""
    path = argument.resolve() if isinstance(argument, Path) else None
    return str(path.relative_to(HERE.parent)) if path and path.is_relative_to(HERE.parent) else str(path or argument)


@contextlib.contextmanager
def service(repository: Path, pins: dict[str, int]) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Start bln-serve on a free port with these versions, wait until it is ready, and stop it at the end."""
    command = ["bln-serve", shown(repository), "--port", "0", "--default-model", QUESTIONS[0].model]
    for name, version in pins.items():
        command += ["--model", f"{name}={version}"]
    print(f"\n$ {' '.join(command)}", flush=True)
    with subprocess.Popen(
        [BIN / command[0], *command[1:]], cwd=HERE.parent, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None  # noqa: S101 - asked for above
        try:
            url = ""
            while not url:
                line = process.stdout.readline()
                if not line:
                    raise SystemExit("bln-serve ended before it listened; what it said is above.")
                print(line, end="", flush=True)
                url = line.split()[-1] if " listening on " in line else ""
            # Its further lines must be read, or the pipe fills up and the service waits.
            threading.Thread(target=lambda: [print(line, end="", flush=True) for line in process.stdout or ()]).start()
            wait_until_ready(url)
            yield url, process
        finally:
            process.terminate()


def wait_until_ready(url: str) -> None:
    """Wait for /readyz."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while httpx.get(f"{url}/readyz", timeout=60).status_code != httpx.codes.OK:
        if time.monotonic() > deadline:
            raise SystemExit(f"The service was not ready after {START_TIMEOUT_S:.0f} s.")
        time.sleep(0.05)


def ask(client: httpx.Client, model: str, rows: Rows) -> dict[str, Any]:
    """Post one request and return its answer."""
    response = client.post(
        f"/models/{model}/predict",
        content=json.dumps({"instances": rows.tolist()}),
        headers={"content-type": "application/json"},
    )
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def ask_all(url: str, question: Question, images: Rows) -> tuple[Rows, dict[str, Any], float]:
    """Ask about all images and return the logits, the last answer and the seconds it took."""
    began = time.monotonic()
    with httpx.Client(base_url=url, timeout=60) as client:
        answers = [ask(client, question.model, rows) for rows in question.requests(images)]
    logits = np.concatenate([np.asarray(answer["predictions"], np.float32) for answer in answers])
    return logits, answers[-1], time.monotonic() - began


@contextlib.contextmanager
def other_clients(url: str, images: Rows) -> Iterator[list[int]]:
    """Keep the service busy with other people's images, and count the requests answered to each."""
    done = threading.Event()
    counts = [0] * CLIENTS

    def keep_asking(index: int) -> None:
        generator = np.random.default_rng(index)
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.is_set():
                question = QUESTIONS[int(generator.integers(len(QUESTIONS)))]
                rows = generator.choice(images, int(generator.integers(2, 26))) + generator.normal(0, 1, (8, 8))
                ask(client, question.model, rows.astype(np.float32))
                counts[index] += 1

    threads = [threading.Thread(target=keep_asking, args=[index]) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        done.set()
        for thread in threads:
            thread.join()


def report(url: str, question: Question, images: Rows, labels: NDArray[np.uint8]) -> None:
    """Ask one model about every image, alone and again among other clients, and print what came back."""
    alone, answer, seconds = ask_all(url, question, images)
    with other_clients(url, images) as counts:
        busy, _, busy_seconds = ask_all(url, question, images)
    metadata = httpx.get(f"{url}/models/{question.model}", timeout=60).json()
    predicted = alone.argmax(axis=1)
    kind = "single rows" if question.rows == 1 else f"mini-batches of {question.rows}"
    print(
        f"\n{answer['model']} version {answer['version']}: statistics {answer['statistics']}, row coupling "
        f"{metadata['row_coupling']}; {len(images)} unseen images as {kind}\n"
        f"  truth      {' '.join(map(str, labels[:25]))}\n"
        f"  predicted  {' '.join(map(str, predicted[:25]))}\n"
        f"  accuracy   {(predicted == labels).mean():.4f}\n"
        f"  alone      {len(question.requests(images))} requests in {seconds:.2f} s\n"
        f"  busy       the same in {busy_seconds:.2f} s, while {CLIENTS} other clients had {sum(counts)} answered\n"
        f"  moved      {np.abs(busy - alone).max():g} at most, of answers up to {np.abs(alone).max():.1f}",
        flush=True,
    )


def curl_line(url: str, images: Rows) -> str:
    """Return a command that asks about one image."""
    body = json.dumps({"instances": images.astype(int).tolist()}, separators=(",", ":"))
    return f"curl -s {url}/predict -H 'content-type: application/json' -d '{body}'"


if __name__ == "__main__":
    sys.exit(main())
