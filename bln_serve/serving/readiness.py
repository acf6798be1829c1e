"""How far the loading is, of the service and of each version."""

from dataclasses import dataclass

from bln_serve.serving.loading import BrokenVersion
from bln_serve.serving.served_model import ServedModel
from bln_serve.serving.together import WorkersReady


@dataclass(frozen=True)
class Readiness:
    """How far the loading is.

    Attributes:
        ready: the first loading has ended, every pinned model, or with none pinned at least one, is served, and the
            service is not about to end; of several workers, that holds for each.
        served: the models that are.
        loading: names of models of which no version is served yet and one may be.
        broken: versions that are not served: they were tried and did not pass, or are pinned and were taken away.
        workers: of several that share the port, how many are ready by themselves; None where there is one process.
    """

    ready: bool
    served: tuple[ServedModel, ...]
    loading: tuple[str, ...]
    broken: tuple[BrokenVersion, ...]
    workers: WorkersReady | None = None


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
