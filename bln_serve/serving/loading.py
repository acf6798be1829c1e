"""From an exported version on disk to a model that has proved itself, or to the reason why it has not."""

import logging
from dataclasses import dataclass

from bln_serve.artifact import Artifact
from bln_serve.errors import ArtifactError, BlnServeError
from bln_serve.repository import ModelVersion, Stamp, stamp
from bln_serve.runtime import Model, replay
from bln_serve.serving.cost import CostCurve, measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenVersion:
    """A version that is not served.

    Attributes:
        version: which.
        reason: why, in a sentence.
        stamp: of its files, from before it was tried.
    """

    version: ModelVersion
    reason: str
    stamp: Stamp = ()


@dataclass(frozen=True)
class Loaded:
    """A version that can be served.

    Attributes:
        version: which.
        model: that version, warmed by its own samples.
        cost: what its runs cost.
    """

    version: ModelVersion
    model: Model
    cost: CostCurve


def load(
    version: ModelVersion,
    threads: int | None,
    *,
    max_run_rows: int | None = None,
    before: BrokenVersion | None = None,
) -> Loaded | BrokenVersion:
    """Load a version, verify it and learn what its runs cost.

    Args:
        version: what to load.
        threads: of one run; None for as many as the CPU quota and the affinity allow.
        max_run_rows: the most rows of several requests in one run, where that is given; else it is measured.
        before: what became of it when it was last tried: the same reason is not logged again.
    """
    tried = stamp(version.path)
    try:
        model = load_verified(version, threads)
        return Loaded(version, model, measure(Artifact.open(version.path), model, max_run_rows))
    except (BlnServeError, OSError) as error:  # of the system's own: no permission, a disk that fails
        reason = str(error)
        if before is None or before.reason != reason:
            logger.error("error: %s version %d is not served: %s", version.name, version.version, reason)
    except Exception as error:  # one broken artifact must not keep the service from serving the others
        reason = f"{type(error).__name__} while loading; the service's log has the details"
        logger.exception("error: %s version %d is not served: %s", version.name, version.version, error)
    return BrokenVersion(version, reason, tried)


def load_verified(version: ModelVersion, threads: int | None) -> Model:
    """Load one version, check its files' hashes and have it answer its own samples.

    Returns:
        The model. Its first, slower runs are behind it.

    Raises:
        ArtifactError: the folder is no artifact, or its answers are not Keras's.
        IntegrityError: a file is missing or differs from its hash.
        RequestError: a sample is not a request that the model takes.
        RunError: ONNX Runtime refused the model or a run.
    """
    artifact = Artifact.open(version.path)
    artifact.check_hashes()
    for name in artifact.unknown_files:
        logger.warning("note: %s in %s is not in the manifest, and is not served", name, version.path)
    model = Model(artifact, threads)
    report = replay(artifact, model)
    if not report.passed:
        raise ArtifactError(
            f"Expected {version.path} to answer its samples as Keras did. Received: {len(report.failures)} of "
            f"{len(report.checks)} answers beyond the tolerance. See bln-verify {version.path}, and export again."
        )
    return model
