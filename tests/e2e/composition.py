"""Does a server keep what it batches apart? Each request alone first, then among many others; how far do answers move?

    python tests/e2e/composition.py http://127.0.0.1:8000 --model digits_rnn --protocol v2 --rows 2 25 60

It asks any server that speaks one of the protocols, and needs httpx and NumPy alone. An answer moved by

    max |together - alone| / max |alone|        over each of its outputs; the largest counts

which is rounding (1e-7 to 1e-5) where a request's rows are kept apart, and far more where a live statistic saw others'.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import httpx
import numpy as np

Arrays = Mapping[str, np.ndarray]
ProtocolName = Literal["predict", "v1", "v2", "v2-binary"]
PROTOCOLS: tuple[ProtocolName, ...] = ("predict", "v1", "v2", "v2-binary")

ONLY = ""
"""The name of an output where the protocol gives it none."""

_DTYPES = {
    "BOOL": np.dtype("?"),
    **{f"INT{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"UINT{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
_DATATYPES = {dtype.newbyteorder("="): name for name, dtype in _DTYPES.items()}
_TIMEOUT_S = 60


class RefusedError(Exception):
    """The server did not answer with 200."""


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        inputs: by name, each (rows, ...).
        mini_batch_rows: what the request says of it; None for nothing, as for a server that is not ours.
    """

    inputs: Arrays
    mini_batch_rows: int | None = None

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Answered:
    """What became of a question.

    Attributes:
        question: what was asked.
        alone: the answer while nobody else asked.
        together: each answer among others.
    """

    question: Question
    alone: Arrays
    together: Sequence[Arrays] = field(repr=False)

    @property
    def moved(self) -> float:
        """How far the worst answer among others is from the one alone."""
        return max(map(self._moved, self.together), default=0.0)

    def _moved(self, answer: Arrays) -> float:
        return distance(self.alone, answer)


@dataclass(frozen=True)
class Composition:
    """What came out.

    Attributes:
        answered: each question, in the order given.
        cancelled: how many more requests were given up midway.
    """

    answered: Sequence[Answered]
    cancelled: int

    @property
    def worst(self) -> Answered:
        """The question whose answer moved furthest."""
        return max(self.answered, key=lambda each: each.moved)


def distance(alone: Arrays, together: Arrays) -> float:
    """Return how far an answer moved; infinity where it is another answer altogether."""
    if alone.keys() != together.keys():
        return np.inf
    return max(_distance(alone[name], together[name]) for name in alone)


def _distance(alone: np.ndarray, together: np.ndarray) -> float:
    if np.array_equal(alone, together, equal_nan=alone.dtype.kind == "f"):
        return 0.0
    if alone.shape != together.shape or not (np.isfinite(alone).all() and np.isfinite(together).all()):
        return np.inf
    difference = np.abs(alone.astype(np.float64) - together.astype(np.float64)).max()
    return float(difference / (np.abs(alone.astype(np.float64)).max() or 1.0))


async def ask(client: httpx.AsyncClient, protocol: ProtocolName, model: str, question: Question) -> Arrays:
    """Ask once.

    Args:
        client: whose base URL is the server's.
        protocol: in which to ask.
        model: its name.
        question: what to ask.

    Returns:
        The outputs by name; under `ONLY` where the protocol gives the only one no name.

    Raises:
        RefusedError: the status was not 200.
    """
    response = await client.send(request_of(client, protocol, model, question))
    if response.status_code != httpx.codes.OK:
        raise RefusedError(f"Expected status 200. Received: {response.status_code} {response.text[:300]}")
    if protocol.startswith("v2"):
        return _v2_answer(response)
    document = response.json()
    outputs = document["predictions"] if "predictions" in document else document["outputs"]
    return _named(outputs)


def request_of(client: httpx.AsyncClient, protocol: ProtocolName, model: str, question: Question) -> httpx.Request:
    """Return the request that asks a question."""
    rows = question.mini_batch_rows
    query = {} if rows is None else {"mini_batch_rows": rows}
    if protocol == "predict":
        document = {"inputs": _lists(question.inputs)}
        return client.build_request("POST", f"/models/{model}/predict", params=query, json=document)
    if protocol == "v1":
        return client.build_request("POST", f"/v1/models/{model}:predict", params=query, json=_v1(question.inputs))
    body, headers = _v2(question, binary=protocol == "v2-binary")
    return client.build_request("POST", f"/v2/models/{model}/infer", content=body, headers=headers)


def _lists(inputs: Arrays) -> dict[str, Any]:
    return {name: array.tolist() for name, array in inputs.items()}


def _v1(inputs: Arrays) -> dict[str, Any]:
    columns = _lists(inputs)
    if len(columns) == 1:
        return {"instances": next(iter(columns.values()))}
    return {"instances": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}


def _v2(question: Question, *, binary: bool) -> tuple[bytes, dict[str, str]]:
    parameters: dict[str, Any] = {}
    if question.mini_batch_rows is not None:
        parameters["bln_mini_batch_rows"] = question.mini_batch_rows
    if binary:
        parameters["binary_data_output"] = True
    tensors, tail = list[dict[str, Any]](), list[bytes]()
    for name, array in question.inputs.items():
        datatype = _DATATYPES[array.dtype]
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            tail.append(np.ascontiguousarray(array, _DTYPES[datatype]).tobytes())
            tensor["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    document: dict[str, Any] = {"inputs": tensors}
    if parameters:
        document["parameters"] = parameters
    head = json.dumps(document).encode()
    if not binary:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return head + b"".join(tail), headers


def _v2_answer(response: httpx.Response) -> Arrays:
    body = response.content
    at = int(response.headers.get("inference-header-content-length", len(body)))
    outputs: dict[str, np.ndarray] = {}
    for tensor in json.loads(body[:at])["outputs"]:
        dtype, shape = _DTYPES[tensor["datatype"]], tensor["shape"]
        if "data" in tensor:
            outputs[tensor["name"]] = np.array(tensor["data"], dtype).reshape(shape)
        else:
            size = tensor["parameters"]["binary_data_size"]
            outputs[tensor["name"]] = np.frombuffer(body[at : at + size], dtype).reshape(shape)
            at += size
    return outputs


def _named(outputs: Any) -> Arrays:
    if isinstance(outputs, dict):
        return {name: np.array(rows) for name, rows in outputs.items()}
    if outputs and isinstance(outputs[0], dict):
        return {name: np.array([row[name] for row in outputs]) for name in outputs[0]}
    return {ONLY: np.array(outputs)}


async def compose(
    url: str,
    protocol: ProtocolName,
    model: str,
    questions: Sequence[Question],
    *,
    clients: int = 64,
    rounds: int = 4,
    cancelled: float = 0.1,
    seed: int = 0,
) -> Composition:
    """Ask each question alone, and then all of them at the same time.

    Args:
        url: of the server. Nobody else should ask it meanwhile.
        protocol: in which to ask.
        model: its name.
        questions: with data of their own each: a mean over copies of the same rows does not move.
        clients: how many ask at the same time, each on a connection of its own.
        rounds: how often each question is asked, each time in an order newly drawn.
        cancelled: of how many answers' number there are requests besides that are given up midway.
        seed: of orders and cancellations.

    Raises:
        RefusedError: a question was not answered.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False) as client:
        alone, seconds = [], []
        for question in questions:
            began = perf_counter()
            alone.append(await ask(client, protocol, model, question))
            seconds.append(perf_counter() - began)
        # The median: one answer that was held up must not make everybody too patient to give anything up.
        crowd = _Crowd(client, protocol, model, questions, float(np.median(seconds)) * clients)
        given_up = await crowd.ask(clients, rounds, cancelled, np.random.default_rng(seed))
    answered = [Answered(*each) for each in zip(questions, alone, crowd.answers, strict=True)]
    return Composition(answered, given_up)


class _Crowd:
    """Many clients that ask at the same time."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        protocol: ProtocolName,
        model: str,
        questions: Sequence[Question],
        patience_s: float,
    ) -> None:
        self._client = client
        self._protocol = protocol
        self._model = model
        self._questions = questions
        self._patience_s = patience_s
        self.answers: list[list[Arrays]] = [[] for _ in questions]

    async def ask(self, clients: int, rounds: int, cancelled: float, rng: np.random.Generator) -> int:
        """Ask all, and return how many requests were given up."""
        order = np.concatenate([rng.permutation(len(self._questions)) for _ in range(rounds)]).tolist()
        # What is given up comes on top, so that every question is answered in every round.
        turns = [(index, None) for index in order] + [
            (int(rng.choice(order)), float(rng.uniform(0, self._patience_s)))
            for _ in range(int(cancelled * len(order)))
        ]
        waiting = [turns[place] for place in rng.permutation(len(turns))]
        return sum(await asyncio.gather(*(self._one(waiting) for _ in range(clients))))

    async def _one(self, waiting: list[tuple[int, float | None]]) -> int:
        given_up = 0
        while waiting:
            index, patience_s = waiting.pop()
            try:
                async with asyncio.timeout(patience_s):
                    answer = await ask(self._client, self._protocol, self._model, self._questions[index])
                self.answers[index].append(answer)
            except TimeoutError:
                given_up += 1
        return given_up


@contextlib.asynccontextmanager
async def stuttering(process_id: int, stopped_s: float = 0.05, going_s: float = 0.02) -> AsyncIterator[None]:
    """Stop a server of this machine again and again, as a container's CPU quota does: its requests pile up meanwhile.

    Without it a client in Python is slower than a small model, and hardly ever do two requests meet.
    """

    async def stutter() -> None:
        while True:
            os.kill(process_id, signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
            os.kill(process_id, signal.SIGCONT)
            await asyncio.sleep(going_s)

    task = asyncio.create_task(stutter())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        os.kill(process_id, signal.SIGCONT)


async def drawn(url: str, model: str, rows: Sequence[int], each: int, mini_batch_rows: int | None) -> list[Question]:
    """Draw questions of these sizes for what the server says that the model takes.

    Args:
        url: of the server.
        model: its name.
        rows: sizes.
        each: how many questions of each size.
        mini_batch_rows: what each says of it.
    """
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
        inputs = await _inputs(client, model)
    rng = np.random.default_rng(0)
    return [
        Question({name: _values(rng, dtype, (size, *shape)) for name, dtype, shape in inputs}, mini_batch_rows)
        for size in rows
        for _ in range(each)
    ]


async def _inputs(client: httpx.AsyncClient, model: str) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    for path in (f"/v2/models/{model}", f"/models/{model}"):
        response = await client.get(path)
        if response.status_code == httpx.codes.OK:
            return [
                (each["name"], _DTYPES.get(each.get("datatype")) or np.dtype(each["dtype"]), tuple(each["shape"][1:]))
                for each in response.json()["inputs"]
            ]
    raise RefusedError(
        f"Expected a description of model {model}. Received: {response.status_code} {response.text[:300]}"
    )


def _values(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype.newbyteorder("="))
    return rng.integers(0, 2, shape).astype(dtype.newbyteorder("="))  # an index that any table has


def report(composition: Composition, clients: int) -> str:
    """Return what came out in a few lines."""
    asked = sum(len(each.together) for each in composition.answered)
    lines = [f"{asked} answers to {clients} clients at the same time, {composition.cancelled} more given up midway"]
    for size in sorted({each.question.rows for each in composition.answered}):
        moved = max(each.moved for each in composition.answered if each.question.rows == size)
        lines.append(f"{size:6d} rows: moved by at most {moved:.1e} of the largest answer")
    return "\n".join([*lines, f"  worst: {composition.worst.moved:.1e}, {composition.worst.question.rows} rows"])


def main() -> int:
    """Print what came out; exit with 1 where an answer moved further than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="v2")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 25], help="sizes of the requests")
    parser.add_argument("--each", type=int, default=16, help="requests of each size (default: %(default)s)")
    parser.add_argument("--mini-batch-rows", type=int, help="what each request says of it; nothing by default")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cancelled", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1e-5, help="how far an answer may move (default: %(default)s)")
    given = parser.parse_args()

    async def run() -> Composition:
        questions = await drawn(given.url, given.model, given.rows, given.each, given.mini_batch_rows)
        load = {name: getattr(given, name) for name in ("clients", "rounds", "cancelled", "seed")}
        return await compose(given.url, given.protocol, given.model, questions, **load)

    try:
        composition = asyncio.run(run())
    except (RefusedError, httpx.HTTPError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 1
    print(report(composition, given.clients))
    return int(composition.worst.moved > given.limit)


if __name__ == "__main__":
    sys.exit(main())
