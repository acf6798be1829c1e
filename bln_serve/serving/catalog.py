"""The models of the service: which there are, which are loaded, which one a request means.

Loading goes on in the background, so that the service answers that it is alive from its first moment.
"""

import asyncio
import gc
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from bln_serve.errors import ModelNotFoundError, ModelNotReadyError, UsageError
from bln_serve.manifest import Manifest
from bln_serve.repository import ModelVersion, candidates, check_name, find
from bln_serve.runtime import Model
from bln_serve.serving.batching import RunQueue
from bln_serve.serving.cost import CostCurve
from bln_serve.serving.loading import BrokenVersion, load_first_verified
from bln_serve.serving.merging import Portion, SharedRun, join, parts_of
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.prediction import Work
from bln_serve.serving.settings import Settings
from bln_serve.signature import Arrays

logger = logging.getLogger(__name__)

MAX_RUN_ON_LOOP_S = 0.002
"""A run no longer than this is made on the event loop, which spares every request two changes of thread."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded and verified version with its queue.

    Attributes:
        name: as the repository calls it.
        version: as the repository numbers it.
        manifest: what it says of itself.
        max_run_rows: the most rows of a run, unless a single mini-batch has more.
        shared: whether requests share runs.
        queue: where its requests wait and run.
    """

    name: str
    version: int
    manifest: Manifest
    max_run_rows: int
    shared: bool
    queue: RunQueue[Portion, Arrays]

    async def answer(self, work: Work, deadline: float | None = None) -> Arrays:
        """Answer a checked request: what it would get alone, whatever shares its runs.

        Args:
            work: as `prepare` returns it for this model.
            deadline: when the answer is too late, in the event loop's time; None for never.

        Raises:
            RequestTooLargeError, OverloadedError, DeadlineExceededError: as the queue does.
            RunError: ONNX Runtime refused a run.
        """
        several = self.manifest.several_mini_batches
        parts = parts_of(work, self.max_run_rows, several_mini_batches=several, shared=self.shared)
        return join(await self.queue.answer(parts, deadline))


@dataclass(frozen=True)
class Readiness:
    """How far the loading is.

    Attributes:
        ready: loading has ended, and every pinned model, or with none pinned at least one, is served.
        served: the models that are.
        loading: names of models whose loading has not ended.
        broken: versions that were tried and are not served.
    """

    ready: bool
    served: tuple[ServedModel, ...]
    loading: tuple[str, ...]
    broken: tuple[BrokenVersion, ...]


class Catalog:
    """The models found under the settings' paths.

    Args:
        settings: paths, pins, default model, threads and the queues' bound.
        metrics: where each model's runs are counted.

    Raises:
        ModelNotFoundError: nothing is under a path, or a pinned or default model is not there.
        UsageError: two paths hold the same version of a model, or a model's name cannot be in a URL.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        found = [version for path in settings.paths for version in find(path)]
        _check_found(found)
        self._candidates: Mapping[str, list[ModelVersion]] = candidates(found, settings.model)
        self._default = _default_model(list(self._candidates), settings.default_model)
        self._served: dict[str, ServedModel] = {}
        self._broken: list[BrokenVersion] = []
        self._pending = list(self._candidates)
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load in the background of the running event loop."""
        self._loading = asyncio.get_running_loop().create_task(self._load_all(), name="loading")

    async def close(self) -> None:
        """Stop loading, answer what is queued, and end."""
        if self._loading:
            self._loading.cancel()
            await asyncio.wait({self._loading})
        await asyncio.gather(*(served.queue.close() for served in self._served.values()))

    def abort(self) -> int:
        """Refuse what is still queued; return how many rows that was."""
        rows = sum(served.queue.queued_rows for served in self._served.values())
        for served in self._served.values():
            served.queue.abort()
        return rows

    @property
    def threads_busy(self) -> bool:
        """Whether a model is inside a run."""
        return any(served.queue.thread_busy for served in self._served.values())

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Return the model that a request means.

        Args:
            name: from the URL; None for the default model.
            version: from the URL, as written there; None for the one that is served.

        Raises:
            ModelNotFoundError: no such model or version, or no default.
            ModelNotReadyError: it is not loaded yet, or no version of it passed.
        """
        name = self._default if name is None else name
        if name is None or name not in self._candidates:
            raise self._unknown(name)
        if (served := self._served.get(name)) is None:
            raise self._not_served(name)
        if version is not None and version != str(served.version):
            raise ModelNotFoundError(
                f"Expected version {served.version} of model {name!r}, the one that is served. Received: {version!r}. "
                f"Use /models/{name}/versions/{served.version}/predict."
            )
        return served

    def readiness(self) -> Readiness:
        """Return how far the loading is."""
        wanted = set(self._settings.model)
        enough = wanted <= set(self._served) if wanted else bool(self._served)
        return Readiness(
            enough and not self._pending, tuple(self._served.values()), tuple(self._pending), tuple(self._broken)
        )

    def _unknown(self, name: str | None) -> ModelNotFoundError:
        routes = _routes(self._candidates)
        if name is None:
            return ModelNotFoundError(
                f"Expected the URL to name one of several models: {routes}. Received: /predict, for which the service "
                "has no default. Start it with --default-model NAME to give it one."
            )
        return ModelNotFoundError(f"Expected the name of a model that is here: {routes}. Received: {name!r}.")

    def _not_served(self, name: str) -> ModelNotReadyError:
        if name in self._pending:
            return ModelNotReadyError(
                f"Expected model {name!r} to be loaded. Received: it still loads. Try again later."
            )
        return ModelNotReadyError(
            f"Expected model {name!r} to have a version that passes its verification. Received: none; /readyz says why."
        )

    async def _load_all(self) -> None:
        for name, versions in self._candidates.items():
            max_run_rows = self._settings.run_rows_of(name)
            load = partial(load_first_verified, versions, self._settings.threads, max_run_rows=max_run_rows)
            loaded = await asyncio.to_thread(load)
            self._broken += loaded.broken
            if loaded.version and loaded.model and loaded.cost:
                self._serve(loaded.version, loaded.model, loaded.cost)
            self._pending.remove(name)
        if not self.readiness().ready:
            logger.error("error: the service is not ready: a model it needs could not be loaded. /readyz says why.")
        # What was loaded stays: the collector need not look through it again during requests.
        gc.collect()
        gc.freeze()

    def _serve(self, version: ModelVersion, model: Model, cost: CostCurve) -> None:
        name, manifest = version.name, model.manifest
        given = self._settings.run_rows_of(name)
        max_run_rows = given or cost.max_run_rows
        queue = RunQueue[Portion, Arrays](
            SharedRun(model),
            max_queued_rows=self._settings.max_queued_rows,
            max_run_rows=max_run_rows,
            in_thread=cost.run_s > MAX_RUN_ON_LOOP_S,
            report=self._metrics.serve(name, version.version, manifest, max_run_rows),
            name=name,
        )
        self._metrics.watch_queue(name, version.version, lambda: queue.queued_rows)
        self._served[name] = ServedModel(
            name, version.version, manifest, max_run_rows, not self._settings.deterministic, queue
        )
        logger.info("%s", describe(self._served[name]))
        how = "as set" if given else "measured; to keep it"
        logger.info(
            "runs of %s have at most %d rows (%s: --max-run-rows %s=%d)", name, max_run_rows, how, name, max_run_rows
        )


def describe(served: ServedModel) -> str:
    """Say in one line what is served and what may be sent."""
    manifest = served.manifest
    inputs = ", ".join(f"{spec.name!r} {spec.describe()}" for spec in manifest.signature.inputs)
    rule = manifest.rule
    may_be_sent = "any number of rows"
    if rule:
        most = f", at most {rule.max_rows}" if rule.max_rows else ""
        may_be_sent = f"rows in mini-batches of {rule.default_rows}, at least {rule.min_rows}{most}"
    return (
        f"serving {served.name} version {served.version}: statistics {manifest.statistics or 'none'}, "
        f"row coupling {manifest.row_coupling} ({manifest.row_coupling_reason}); send {inputs}, {may_be_sent}, "
        f"to /models/{served.name}/predict"
    )


def _check_found(found: Iterable[ModelVersion]) -> None:
    seen: dict[tuple[str, int], ModelVersion] = {}
    for version in found:
        first = seen.setdefault((check_name(version.name), version.version), version)
        if first is not version:
            raise UsageError(
                f"Expected each version of a model at one path. Received: {version.name} version {version.version} "
                f"at {first.path} and {version.path}."
            )


def _default_model(names: list[str], wanted: str | None) -> str | None:
    if wanted is None:
        return names[0] if len(names) == 1 else None
    if wanted not in names:
        raise ModelNotFoundError(
            f"Expected the default model to be one of {', '.join(names)}. Received: {wanted!r}. "
            "Correct --default-model."
        )
    return wanted


def _routes(names: Iterable[str]) -> str:
    return ", ".join(f"/models/{name}/predict" for name in names)
