"""The models of the service: which version of each is served, which one a request means, what is ready.

All that takes long, looking at the paths and loading, goes on in the background. A version takes over when it has
proved itself, and within one turn of the event loop: until then the one before it answers, and whoever found that one
is answered by it. Once at the start, and again every `repository_poll_s`:

    of each model, the versions that are there, from the latest down to the one that is served:
        the first that passes takes over; those that do not are known to be broken until their files change
    a served version that is not there any more goes when another has taken over, or when there is none that could
"""

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from bln_serve.errors import ModelNotFoundError, ModelNotReadyError
from bln_serve.repository import ModelVersion
from bln_serve.serving import memory
from bln_serve.serving.background import Background
from bln_serve.serving.known_versions import KnownVersions
from bln_serve.serving.loading import BrokenVersion, Loaded, load
from bln_serve.serving.metrics import Metrics
from bln_serve.serving.readiness import Readiness, VersionState
from bln_serve.serving.served_model import ServedModel, begin, describe
from bln_serve.serving.settings import Settings
from bln_serve.serving.together import WorkersReady
from bln_serve.serving.watching import Watch

logger = logging.getLogger(__name__)


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
        self._watch = Watch(settings.paths)
        self._known = KnownVersions(self._watch.versions, settings.model)
        self._default = _default_model(self._known.names, settings.default_model)
        self._served: dict[str, ServedModel] = {}
        self.alone: Callable[[], bool] = lambda: False
        self.workers_ready: Callable[[], WorkersReady | None] = lambda: None
        self._leaving: dict[asyncio.Task[None], ServedModel] = {}
        self._pending = self._known.names
        self._trying: ModelVersion | None = None
        self._started = False
        self._draining = False
        self._some_left = False
        self._background = Background()
        self._looking_after: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load in the background of the running event loop, and then to look for what is new."""
        self._looking_after = asyncio.get_running_loop().create_task(self._look_after(), name="catalog")

    def drain(self) -> None:
        """Be ready no more, and go on answering. May be called from a thread."""
        self._draining = True

    async def close(self) -> None:
        """Stop loading, answer what is queued, and end."""
        everyone = self._everyone()
        for task in (self._looking_after, *self._leaving):
            if task:
                task.cancel()
                await asyncio.wait({task})
        await asyncio.gather(*(served.queue.close() for served in everyone))

    def abort(self) -> int:
        """Refuse what is still queued; return how many rows that was."""
        rows = sum(served.queue.queued_rows for served in self._everyone())
        for served in self._everyone():
            served.queue.abort()
        return rows

    @property
    def threads_busy(self) -> bool:
        """Whether a model is inside a run."""
        return any(served.queue.thread_busy for served in self._everyone())

    @property
    def background_busy(self) -> bool:
        """Whether a version is being loaded or the disk looked at, be it that nobody waits for it any more."""
        return self._background.busy

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Return the model that a request means. Whoever asks it enters its `users` first, within this turn.

        Args:
            name: from the URL; None for the default model.
            version: from the URL, as written there; None for the one that is served.

        Raises:
            ModelNotFoundError: no such model or version, or no default.
            ModelNotReadyError: it is not loaded yet, or no version of it passed.
        """
        name = self._default if name is None else name
        if name is None or (served := self._served.get(name)) is None:
            raise self._not_served(name)
        if version is not None and version != str(served.version):
            raise ModelNotFoundError(
                f"Expected version {served.version} of model {name!r}, the one that is served. Received: {version!r}. "
                f"Use /models/{name}/versions/{served.version}/predict."
            )
        return served

    @property
    def ready_by_itself(self) -> bool:
        """Whether this process is ready, whatever other processes that share its port are."""
        wanted = set(self._settings.model)
        enough = wanted <= set(self._served) if wanted else bool(self._served)
        return enough and self._started and not self._draining

    def readiness(self) -> Readiness:
        """Return how far the loading is."""
        broken = (*self._known.missing, *self._known.tried)
        workers = self.workers_ready()
        ready = self.ready_by_itself and (workers is None or workers.ready == workers.count)
        return Readiness(ready, tuple(self._served.values()), tuple(self._pending), broken, workers)

    def states(self, name: str) -> list[VersionState]:
        """Return the versions of a model that are served, load, leave, or are broken, latest first.

        Raises:
            ModelNotFoundError: no such model.
        """
        if name not in self._known.names and name not in self._served:
            raise self._not_served(name)
        # What stands further down is what is told of a version that is several.
        states = [VersionState(each.version, "UNLOADING") for each in self._leaving.values() if each.name == name]
        if name in self._pending:
            states += [VersionState(each.version, "START") for each in self._known.to_try(name, None)[:1]]
        for broken in (*self._known.missing, *self._known.tried):
            if broken.version.name == name:
                states.append(VersionState(broken.version.version, "END", broken.reason))
        if self._trying and self._trying.name == name:
            states.append(VersionState(self._trying.version, "LOADING"))
        if served := self._served.get(name):
            states.append(VersionState(served.version, "AVAILABLE"))
        return sorted({state.version: state for state in states}.values(), reverse=True)

    def _everyone(self) -> list[ServedModel]:
        return [*self._served.values(), *self._leaving.values()]

    def _not_served(self, name: str | None) -> ModelNotFoundError | ModelNotReadyError:
        routes = ", ".join(f"/models/{each}/predict" for each in self._known.names) or "none"
        if name is None:
            return ModelNotFoundError(
                f"Expected the URL to name one of several models: {routes}. Received: /predict, for which the service "
                "has no default. Start it with --default-model NAME to give it one."
            )
        if name not in self._known.names:
            return ModelNotFoundError(f"Expected the name of a model that is here: {routes}. Received: {name!r}.")
        if name in self._pending:
            return ModelNotReadyError(
                f"Expected model {name!r} to be loaded. Received: it still loads. Try again later."
            )
        return ModelNotReadyError(
            f"Expected model {name!r} to have a version that passes its verification. Received: none; /readyz says why."
        )

    async def _look_after(self) -> None:
        await _whatever_happens(self._catch_up())
        # What was loaded stays: the collector need not look through it again during requests. A version that leaves
        # needs no collector: it holds nothing that holds it.
        gc.collect()
        gc.freeze()
        # What a request leaves behind has no cycles, and looking for some so often took a fiftieth of all time.
        gc.set_threshold(20_000, 20, 20)
        self._started = True
        if not (self.ready_by_itself or self._draining):
            logger.error("error: the service is not ready: a model it needs could not be loaded. /readyz says why.")
        await _whatever_happens(self._background.call(memory.give_back))
        while self._settings.repository_poll_s:
            await asyncio.sleep(self._settings.repository_poll_s)
            await _whatever_happens(self._look_again())

    async def _look_again(self) -> None:
        seen = await self._background.call(partial(self._watch.look, self._known.tried))
        alone = len(self._known.names) == 1
        self._known.take(seen)
        self._pending = [
            name for name in self._known.names if name not in self._served and self._known.to_try(name, None)
        ]
        self._default = self._default_from_now_on(alone)
        await self._catch_up()
        if self._some_left:
            self._some_left = False
            await self._background.call(memory.give_back)

    def _default_from_now_on(self, alone: bool) -> str | None:
        """Return the default model: it stays while it is there, so that no new model takes /predict away from it."""
        names = self._known.names
        if self._settings.default_model is None and self._default not in names:
            return _default_model(names, None)
        if self._settings.default_model is None and alone and len(names) > 1:
            logger.warning(
                "note: /predict goes on to ask %s, and after the next start asks none of %d models without "
                "--default-model %s",
                *(self._default, len(names), self._default),
            )
        return self._default

    async def _catch_up(self) -> None:
        for name in sorted({*self._known.names, *self._served}):
            await self._catch_up_with(name)
            self._pending = [each for each in self._pending if each != name]

    async def _catch_up_with(self, name: str) -> None:
        served = self._served.get(name)
        for version in self._known.to_try(name, served.source if served else None):
            outcome = await self._load(version)
            if isinstance(outcome, Loaded):
                self._known.note(version, None)
                self._serve(outcome)
                return
            self._known.note(version, outcome)
        if served and not self._known.has(served.source):
            self._part_with(self._served.pop(name))

    async def _load(self, version: ModelVersion) -> Loaded | BrokenVersion:
        self._trying = version
        try:
            run_rows, before = self._settings.run_rows_of(version.name), self._known.what_was(version)
            return await self._background.call(
                partial(load, version, self._settings.threads, max_run_rows=run_rows, before=before)
            )
        finally:
            self._trying = None

    def _serve(self, loaded: Loaded) -> None:
        """Let a version answer from now on."""
        name = loaded.version.name
        if before := self._served.get(name):
            self._part_with(before)
        self._served[name] = served = begin(loaded, self._settings, self._metrics, self.alone)
        logger.info("%s", describe(served))
        how = "as set" if self._settings.run_rows_of(name) else "measured; to keep it"
        rows = served.max_run_rows
        logger.info("runs of %s have at most %d rows (%s: --max-run-rows %s=%d)", name, rows, how, name, rows)

    def _part_with(self, served: ServedModel) -> None:
        """Let a version answer those who have found it, and go."""
        self._metrics.leave(served.name, served.version, served.manifest, served.max_run_rows)
        task = asyncio.get_running_loop().create_task(served.let_go(), name=f"leaving-{served.name}")
        self._leaving[task] = served
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            served = self._leaving.pop(task)
            self._some_left = True
            logger.info("%s version %d is not served any more; its memory goes back", served.name, served.version)


async def _whatever_happens(work: Awaitable[None]) -> None:
    try:
        await work
    except Exception:  # the service goes on with the models it has, and looks again later
        logger.exception("error: the models could not be looked after")


def _default_model(names: list[str], wanted: str | None) -> str | None:
    if wanted is None:
        return names[0] if len(names) == 1 else None
    if wanted not in names:
        raise ModelNotFoundError(
            f"Expected the default model to be one of {', '.join(names)}. Received: {wanted!r}. "
            "Correct --default-model."
        )
    return wanted
