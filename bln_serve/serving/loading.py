"""From an exported version on disk to a model that has proved itself, falling back to older versions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from bln_serve.artifact import Artifact
from bln_serve.errors import ArtifactError, BlnServeError
from bln_serve.repository import ModelVersion
from bln_serve.runtime import Model, replay
from bln_serve.serving.cost import CostCurve, measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenVersion:
    """A version that is there and is not served.

    Attributes:
        version: which.
        reason: why, in a sentence.
    """

    version: ModelVersion
    reason: str


@dataclass(frozen=True)
class Loaded:
    """What became of one model's versions.

    Attributes:
        version: the one to serve, or None where none passed.
        model: that version, warmed by its own samples.
        cost: what its runs cost.
        broken: the versions that were tried before it.
    """

    version: ModelVersion | None
    model: Model | None
    cost: CostCurve | None
    broken: tuple[BrokenVersion, ...]


def load_first_verified(
    candidates: Sequence[ModelVersion], threads: int | None, *, max_run_rows: int | None = None
) -> Loaded:
    """Load the first version that passes its verification.

    Args:
        candidates: versions of one model, in the order to try them.
        threads: of one run; None for as many as the CPU quota and the affinity allow.
        max_run_rows: the most rows of several requests in one run, where that is given; else it is measured.
    """
    broken: list[BrokenVersion] = []
    for version in candidates:
        try:
            model = load_verified(version, threads)
            cost = measure(Artifact.open(version.path), model, max_run_rows)
            return Loaded(version, model, cost, tuple(broken))
        except (BlnServeError, OSError) as error:  # of the system's own: no permission, a disk that fails
            reason = str(error)
            logger.error("error: %s version %d is not served: %s", version.name, version.version, reason)
        except Exception as error:  # one broken artifact must not keep the service from serving the others
            reason = f"{type(error).__name__} while loading; the service's log has the details"
            logger.exception("error: %s version %d is not served: %s", version.name, version.version, error)
        broken.append(BrokenVersion(version, reason))
    return Loaded(None, None, None, tuple(broken))


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
