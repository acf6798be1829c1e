"""Every error that bln_serve raises on purpose, as one tree.

    BlnServeError
    ├── UsageError                  the call or the command line is wrong
    │   └── MissingExtraError       an optional part is not installed
    ├── ModelError                  a Keras model cannot be exported
    │   ├── ModelLoadError          the file cannot be read safely
    │   ├── UnsupportedModelError   the model holds something the export cannot keep true
    │   └── UnusableStatisticsError the policy asks for stored statistics that were never estimated
    ├── ParityError                 the exported model does not answer as Keras does
    ├── ArtifactError               an artifact on disk is not what it should be
    │   ├── ArtifactExistsError     the version is already there
    │   └── IntegrityError          a file differs from its recorded SHA-256, or is missing
    ├── ModelNotFoundError          no such model or version
    ├── ModelNotReadyError          the model is known, and is not loaded yet
    ├── RequestError                a request cannot be answered, and nothing was run for it
    │   ├── BodyTimeoutError        its body did not come in time
    │   ├── MalformedRequestError   the body cannot be read at all
    │   ├── InvalidInputError       an input has the wrong name, shape, dtype or values
    │   ├── MiniBatchError          its rows cannot be cut into mini-batches that mean anything
    │   ├── RequestTooLargeError    it is larger than the service accepts
    │   └── UnsupportedFormatError  its body is in a format that the service does not read
    ├── NonFiniteAnswerError        the model's answer holds NaN or infinity, which the answer's format cannot say
    ├── OverloadedError             the queue is full, or the service is going down
    ├── DeadlineExceededError       the request's time passed before it was answered
    └── RunError                    ONNX Runtime refused a run

Every message says what was expected, what was received and what to do. Nothing here knows of HTTP or of exit codes.
"""


class BlnServeError(Exception):
    """Base of everything that bln_serve raises on purpose."""


class UsageError(BlnServeError):
    """The call or the command line is wrong."""


class MissingExtraError(UsageError):
    """An optional part of bln_serve is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed. Install them with: pip install 'bln-serve[{extra}]' "
            f"(in a checkout: pip install '.[{extra}]')"
        )


class ModelError(BlnServeError):
    """A Keras model cannot be exported."""


class ModelLoadError(ModelError):
    """A model file cannot be read, or not safely."""


class UnsupportedModelError(ModelError):
    """A model holds something that the export cannot keep true."""


class UnusableStatisticsError(ModelError):
    """A policy asks for stored statistics that were never estimated or are not finite."""


class ParityError(BlnServeError):
    """The exported model does not answer as Keras does."""


class ArtifactError(BlnServeError):
    """An artifact on disk is not what it should be."""


class ArtifactExistsError(ArtifactError):
    """The version to be written is already there."""


class IntegrityError(ArtifactError):
    """A file of an artifact differs from its recorded SHA-256, or is missing."""


class ModelNotFoundError(BlnServeError):
    """No such model, or no such version of it."""


class ModelNotReadyError(BlnServeError):
    """The model is known, and is not loaded yet."""


class RequestError(BlnServeError):
    """A request cannot be answered; nothing was run for it."""


class BodyTimeoutError(RequestError):
    """A request's body was not complete in time."""


class MalformedRequestError(RequestError):
    """A request's body cannot be read at all."""


class InvalidInputError(RequestError):
    """An input has the wrong name, shape, dtype or values."""


class MiniBatchError(RequestError):
    """A request's rows cannot be cut into mini-batches that mean anything."""


class RequestTooLargeError(RequestError):
    """A request is larger than the service accepts."""


class UnsupportedFormatError(RequestError):
    """A request's body is in a format that the service does not read."""


class NonFiniteAnswerError(BlnServeError):
    """The model's answer holds NaN or infinity, and the answer's format has no word for them."""


class OverloadedError(BlnServeError):
    """The queue is full, or the service is going down: try again later."""


class DeadlineExceededError(BlnServeError):
    """The request's time passed before it was answered."""


class RunError(BlnServeError):
    """ONNX Runtime refused a run."""
