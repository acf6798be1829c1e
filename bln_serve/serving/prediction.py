"""A request and its answer, whatever the wire protocol: Message -> PredictRequest -> Work -> Prediction -> Encoded.

Each protocol has a module with `read(message) -> PredictRequest`. What the answer has to look like is known then, and
travels along as the request's `write`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from numpy.typing import NDArray

from bln_serve.errors import MalformedRequestError
from bln_serve.manifest import Manifest
from bln_serve.signature import Arrays, rows_of
from bln_serve.statistics import run_length


class Message(Struct, frozen=True):
    """A request as it came over HTTP.

    Attributes:
        body: all of it.
        headers: by lower-case name; of several with one name the last.
        query: of the URL, by name.
    """

    body: bytes
    headers: Mapping[str, str]
    query: Mapping[str, str]


class PredictRequest(Struct, frozen=True):
    """What a client sent, read but not checked against the model.

    Attributes:
        inputs: by name, or one array without a name.
        write: turns the answer into what the client expects; raises NonFiniteAnswerError where that cannot say it.
        mini_batch_rows: as the body names it, 0 or more; None where it doesn't.
        answers_text: whether `write` makes text of the numbers, which takes long.
    """

    inputs: Mapping[str, NDArray[Any]] | NDArray[Any]
    write: Callable[["Prediction"], "Encoded"]
    mini_batch_rows: int | None = None
    answers_text: bool = True

    def slow_bytes(self, prediction: "Prediction") -> int:
        """Return how many bytes are slow to write: of text, some three for each in memory."""
        if not self.answers_text:
            return 0
        return 3 * sum([array.nbytes for array in prediction.outputs.values()])


class Work(Struct, frozen=True):
    """A checked request, ready to run.

    Attributes:
        inputs: as the model's signature demands, by name.
        sizes: the rows of each mini-batch; None where rows are independent.
    """

    inputs: Arrays
    sizes: tuple[int, ...] | None

    @property
    def rows(self) -> int:
        """How many rows the request has."""
        return rows_of(self.inputs)


class Prediction(Struct, frozen=True):
    """An answer and what it was computed with.

    Attributes:
        outputs: by name, each (rows, ...).
        model: the model's name.
        version: its version.
        statistics: its policy's code, `mixed`, or None without BLN layers.
        mini_batches: the rows of each mini-batch, run-length encoded; None where rows are independent.
    """

    outputs: Arrays
    model: str
    version: int
    statistics: str | None
    mini_batches: str | None

    @property
    def headers(self) -> dict[str, str]:
        """What it was computed with, for protocols whose bodies have no place for that; nulls are left out."""
        facts = {
            "bln-model": self.model,
            "bln-version": str(self.version),
            "bln-statistics": self.statistics,
            "bln-mini-batches": self.mini_batches,
        }
        return {name: value for name, value in facts.items() if value is not None}


class Encoded(Struct, frozen=True):
    """An answer in one wire format."""

    body: bytes
    media_type: str
    headers: Mapping[str, str]


def prepare(manifest: Manifest, request: PredictRequest, query_mini_batch_rows: int | None) -> Work:
    """Check a request against a model and cut its rows.

    Args:
        manifest: the model's.
        request: as read from the body.
        query_mini_batch_rows: as the URL names it, or None.

    Raises:
        MalformedRequestError: URL and body disagree on the rows of a mini-batch.
        InvalidInputError: an input has the wrong name, shape, dtype or values.
        MiniBatchError: the rows cannot be cut so.
    """
    inputs = manifest.signature.validate(manifest.signature.named(request.inputs))
    rows = one_value(query_mini_batch_rows, request.mini_batch_rows)
    return Work(inputs, manifest.rule.cut(rows_of(inputs), rows) if manifest.rule else None)


def one_value(in_url: int | None, in_body: int | None) -> int | None:
    """Return the rows of a mini-batch that a request names, or None.

    Raises:
        MalformedRequestError: it names two different values.
    """
    if in_url is not None and in_body is not None and in_url != in_body:
        raise MalformedRequestError(
            f"Expected one value of mini_batch_rows. Received: {in_url} in the URL and {in_body} in the body."
        )
    return in_body if in_url is None else in_url


def mini_batches(work: Work) -> str | None:
    """Return the rows of each mini-batch as the answer states them."""
    return None if work.sizes is None else run_length(work.sizes)
