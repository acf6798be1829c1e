"""The service's own protocol, POST /predict: JSON or npy in, JSON or npy out, whichever the headers name."""

from types import ModuleType

from msgspec import structs

from bln_serve.errors import UnsupportedFormatError
from bln_serve.serving import predict_json, predict_npy
from bln_serve.serving.prediction import Message, PredictRequest
from bln_serve.signature import ModelSignature

FORMATS: dict[str, ModuleType] = {predict_json.MEDIA_TYPE: predict_json, predict_npy.MEDIA_TYPE: predict_npy}
"""A format's module by its media type. Each has `read(body)` and `write(prediction)`."""


def read(message: Message, signature: ModelSignature) -> PredictRequest:
    """Read a request.

    Raises:
        UnsupportedFormatError: its body is in a format that the service does not read.
        MalformedRequestError: it cannot be read, or asks for an answer that its format cannot hold.
        InvalidInputError: an input is no rectangular array of numbers.
        MiniBatchError: `mini_batch_rows` is no whole number from 0.
    """
    reader = FORMATS[_body_format(message.headers.get("content-type", ""))]
    writer = FORMATS[_answer_format(message.headers.get("accept", ""))]
    if writer is predict_npy:
        predict_npy.check_single_output([spec.name for spec in signature.outputs])
    request: PredictRequest = reader.read(message.body)
    if writer is reader:
        return request
    return structs.replace(request, write=writer.write, answers_text=writer is predict_json)


def slow_bytes(message: Message) -> int:
    """Return how many bytes are parsed slowly: those of a JSON body."""
    is_json = message.headers.get("content-type", "").lower().startswith(predict_json.MEDIA_TYPE)
    return len(message.body) if is_json else 0


def _body_format(received: str) -> str:
    media_type = received.partition(";")[0].strip().lower()
    if media_type not in FORMATS:
        raise UnsupportedFormatError(
            f"Expected Content-Type: {' or '.join(FORMATS)}. Received: {repr(received) if received else 'none'}."
        )
    return media_type


def _answer_format(accept: str) -> str:
    """Return the media type of the answer: of those that Accept names, the preferred; else JSON."""
    preferred, best = predict_json.MEDIA_TYPE, 0.0
    for item in accept.split(","):
        media_type, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((_quality(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
        if media_type in FORMATS and quality > best:
            preferred, best = media_type, quality
    return preferred


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
