"""How far the loading is, of the service and of each version."""

from dataclasses import dataclass

from bln_serve.serving.loading import BrokenVersion
from bln_serve.serving.served_model import ServedModel


@dataclass(frozen=True)
class Readiness:
    """How far the loading is.

    Attributes:
        ready: the first loading has ended, every pinned model, or with none pinned at least one, is served, and the
            service is not about to end.
        served: the models that are.
        loading: names of models of which no version is served yet and one may be.
        broken: versions that are not served: they were tried and did not pass, or are pinned and were taken away.
    """

    ready: bool
    served: tuple[ServedModel, ...]
    loading: tuple[str, ...]
    broken: tuple[BrokenVersion, ...]


@dataclass(frozen=True, order=True)
class VersionState:
    """What a version of a model is doing.

    Attributes:
        version: its number.
        state: in TensorFlow Serving's words: START (its turn comes), LOADING, AVAILABLE, UNLOADING or END.
        reason: why it is broken; otherwise empty.
    """

    version: int
    state: str
    reason: str = ""
