"""The served models: loaded, looked up, and replaced while requests run.

A model is replaced as a whole, and only after its successor has run once. A request therefore uses
one model throughout, and a file that cannot be served leaves its predecessor in place.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import onnxruntime

from export.card import CardError
from export.file import read_detector
from service.core.errors import ProblemError, short
from service.core.settings import Settings
from service.engine.catalogue import CatalogueError, Listed, Signature, list_models, version_key
from service.engine.session import ModelError, ServedModel
from service.observability.metrics import Metrics

T = TypeVar("T")

logger = logging.getLogger("ghm.service")


@dataclass(frozen=True)
class Entry:
    """One file, and the model served from it.

    Attributes:
        listed: The file, and its name and version in the folder.
        model: The model in use; None if nothing could be loaded from the file yet.
        problem: Why the current file is not what is served; None if it is.
        loaded_at: Time at which the model came into use, UTC.
        signature: Signature of the file that was tried last.
    """

    listed: Listed
    model: ServedModel | None = None
    problem: str | None = None
    loaded_at: datetime | None = None
    signature: Signature | None = None

    @property
    def name(self) -> str:
        """Name of the model in requests."""
        return self.listed.name or (self.model.name if self.model else self.listed.path.stem)

    @property
    def version(self) -> str:
        """Version of the model in requests."""
        return self.listed.version

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.listed.path

    @property
    def ready(self) -> bool:
        """Whether the model answers."""
        return self.model is not None and self.model.warm

    @property
    def warming(self) -> bool:
        """Whether the model is loaded but has not run yet."""
        return self.model is not None and not self.model.warm and self.problem is None

    @property
    def served(self) -> ServedModel:
        """The model.

        Raises:
            ProblemError: 503 if none is loaded.
        """
        if self.model is None:
            raise _not_ready([self])
        return self.model


class Registry:
    """All models of one file or folder.

    Methods must be called on the event loop; files are read and models loaded in threads.

    Args:
        settings: Provides `source`, `provider`, `threads` and `inferences`.
        metrics: Counts loads and failures.
        loader: Loads one model; reads the file if None.

    Attributes:
        source: The file or folder.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        loader: Callable[[Listed], ServedModel] | None = None,
    ) -> None:
        self.source = settings.source
        self._settings = settings
        self._metrics = metrics
        self._loader = loader or self._read
        self._entries: dict[Path, Entry] = {}
        self._skipped: dict[Path, str] = {}  # entries of the folder that cannot be listed
        self._busy = asyncio.Lock()

    def entries(self) -> list[Entry]:
        """Return all models, by name and then by version, the newest last."""
        return sorted(self._entries.values(), key=lambda e: (e.name, version_key(e.version)))

    def problems(self) -> list[str]:
        """Return one sentence per file that is present but not served as it is."""
        failed = {entry.path: entry.problem for entry in self.entries() if entry.problem}
        problems = [f"{path}: {problem}" for path, problem in (self._skipped | failed).items()]
        # Half of a surrogate pair, from a path that is not UTF-8, cannot be sent.
        return [text.encode(errors="backslashreplace").decode() for text in problems]

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """Return the model for a request.

        Args:
            name: Name of the model; may be None if only one name is served.
            version: Its version; the newest that is ready if None.

        Raises:
            ProblemError: 404 for an unknown model, 422 if a name is required, 503 if it is not
                ready.
        """
        if len(self._entries) == 1:  # the usual case, once per request
            (only,) = self._entries.values()
            if only.ready and name in (None, only.name) and version in (None, only.version):
                return only.served
        entries = self._matching(name, version)
        ready = [entry for entry in entries if entry.ready]
        if not ready:
            raise _not_ready(entries)
        return ready[-1].served

    def loaded(self, name: str | None = None, version: str | None = None) -> Entry:
        """Return the entry of a loaded model, whether or not it is warm.

        Raises:
            ProblemError: As for `get`.
        """
        entries = self._matching(name, version)
        loaded = [entry for entry in entries if entry.model]
        if not loaded:
            raise _not_ready(entries)
        return loaded[-1]

    def check_ready(self) -> list[Entry]:
        """Return the entries if at least one model is ready and none is warming up.

        Raises:
            ProblemError: 503 otherwise.
        """
        entries = self.entries()
        if any(entry.warming for entry in entries) or not any(entry.ready for entry in entries):
            raise _not_ready(entries)
        return entries

    def _matching(self, name: str | None, version: str | None) -> list[Entry]:
        entries = self.entries()
        names = sorted({entry.name for entry in entries})
        if name is None and len(names) > 1:
            raise ProblemError(
                422, f"model: several models are served, say which one: {', '.join(names)}"
            )
        named = [entry for entry in entries if name in (None, entry.name)]
        if entries and not named:
            raise ProblemError(404, f"no model {short(name)}; there is {', '.join(names)}")
        matching = [entry for entry in named if version in (None, entry.version)]
        if named and not matching:
            versions = ", ".join(entry.version for entry in named)
            raise ProblemError(
                404, f"no version {short(version)} of {named[0].name!r}; there is {versions}"
            )
        return matching

    def adopt(self, model: ServedModel) -> None:
        """Serve a model that the caller has loaded, in place of the file's."""
        signature = Signature.of(self.source)
        self._serve(Entry(Listed(self.source, None, model.version), model, signature=signature))

    async def load(self) -> None:
        """Load all models at the start; they are ready after `warm_up`.

        Files of a folder that cannot be served are reported by `problems`, if at least one can.

        Raises:
            CardError, ModelError, OSError: The only file cannot be served.
            CatalogueError: The folder is empty, or none of its files can be served.
        """
        for listed in await self._list():
            entry = Entry(listed, signature=Signature.of(listed.path))
            try:
                model = await self._load(listed)
            except (CardError, ModelError, OSError) as error:
                if listed.name is None:
                    raise
                self._failed(entry, error)
            else:
                self._serve(replace(entry, model=model))
        if not any(entry.model for entry in self._entries.values()):
            raise CatalogueError("; ".join(["no model can be served", *self.problems()]))

    async def warm_up(self) -> None:
        """Run every loaded model once. One that fails stays unready, with a problem."""
        for entry in self.entries():
            if not entry.warming:
                continue
            try:
                await self._warm_up(entry.served)
            except ModelError as error:
                logger.error("%s failed its warm-up: %s", entry.path, error)
                problem = f"the model failed its warm-up: {error}"
                self._entries[entry.path] = replace(entry, problem=problem)

    async def reload(self, name: str) -> list[Entry]:
        """Read the files of a model again, whether or not they have changed.

        Args:
            name: Name of the model; every version of it is read.

        Returns:
            Its entries. Where a file cannot be served, the old model stays in use, and the entry's
            `problem` has the reason.

        Raises:
            ProblemError: 404 for an unknown model.
        """
        paths = [entry.path for entry in self._matching(name, None)]
        async with self._busy:
            for path in paths:
                if path in self._entries:
                    await self._replace(self._entries[path])
        return [self._entries[path] for path in paths if path in self._entries]

    async def refresh(self) -> None:
        """Load new and changed files, and drop the models of files that are gone."""
        async with self._busy:
            try:
                listing = {listed.path: listed for listed in await self._list()}
            except (CatalogueError, OSError) as error:
                self._skip({self.source: str(error).removeprefix(f"{self.source}: ")})
                return
            for path, listed in listing.items():
                signature = await asyncio.to_thread(Signature.of, path)
                entry = self._entries.get(path, Entry(listed))
                if signature != entry.signature:
                    await self._replace(entry)
            listed_as = {(listed.name, listed.version) for listed in listing.values()}
            for path in set(self._entries) - set(listing):
                gone = self._entries[path]
                unreadable = self._skipped.keys() & {path, *path.parents}  # perhaps still there
                if unreadable and (gone.listed.name, gone.version) not in listed_as:
                    continue
                del self._entries[path]
                logger.info("%s is gone: %s is no longer served", path, gone.name)

    async def watch(self, seconds: float) -> NoReturn:
        """Call `refresh` every so many seconds, whatever fails."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception:  # the watch must survive any single failure
                logger.exception("looking for changed models failed")

    async def _list(self) -> list[Listed]:
        listing, problems = await asyncio.to_thread(list_models, self.source)
        self._skip(problems)
        if not listing:
            reasons = [f"{self.source}: no .onnx file in this folder", *self.problems()]
            raise CatalogueError("; ".join(reasons))
        return listing

    def _skip(self, problems: dict[Path, str]) -> None:
        for path in problems.keys() - self._skipped.keys():
            logger.error("%s is not served: %s", path, problems[path])
        self._skipped = problems

    async def _replace(self, entry: Entry) -> None:
        """Load the current file, and serve it only if it runs."""
        # Taken before the file is read: a change while reading is then seen the next time.
        signature = await asyncio.to_thread(Signature.of, entry.path)
        entry = replace(entry, signature=signature)
        try:
            model = await self._load(entry.listed)
            if entry.model and model.sha256 == entry.model.sha256:
                model = entry.model
            await self._warm_up(model)
        except (CardError, ModelError, OSError) as error:
            self._failed(entry, error)
        else:
            self._serve(replace(entry, model=model))

    async def _load(self, listed: Listed) -> ServedModel:
        return await self._in_time(self._loader, listed)

    async def _warm_up(self, model: ServedModel) -> None:
        options = onnxruntime.RunOptions()
        try:
            await self._in_time(model.warm_up, options)
        finally:
            options.terminate = True

    async def _in_time(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in a thread of its own; one that does not end fills no pool."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def finish(value: T | None, error: Exception | None) -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(cast(T, value))

        def work() -> None:
            outcome: tuple[T | None, Exception | None]
            try:
                outcome = function(*arguments), None
            except Exception as error:  # noqa: BLE001  raised in the task that waits
                outcome = None, error
            with suppress(RuntimeError):  # the loop has closed: nothing waits any more
                loop.call_soon_threadsafe(finish, *outcome)

        threading.Thread(target=work, name="load", daemon=True).start()
        limit = self._settings.load_seconds
        try:
            async with asyncio.timeout(limit):
                return await result
        except TimeoutError:
            raise ModelError(f"loading it and running it once takes over {limit:g} s") from None

    def _serve(self, entry: Entry) -> None:
        before = self._entries.get(entry.path)
        same = before is not None and before.model is entry.model
        loaded_at = entry.loaded_at if same else datetime.now(UTC)
        self._entries[entry.path] = replace(entry, problem=None, loaded_at=loaded_at)
        if same or entry.model is None:
            return
        logger.info("%s: serving %s, sha256 %s", entry.path, entry.name, entry.model.sha256[:12])
        self._metrics.model_loaded(entry.model)

    def _failed(self, entry: Entry, error: Exception) -> None:
        self._entries[entry.path] = replace(entry, problem=str(error))
        kept = "the model before it stays in use" if entry.model else "no model is in its place"
        logger.error("%s cannot be served, %s: %s", entry.path, kept, error)
        self._metrics.reload_failed(entry.name)

    def _read(self, listed: Listed) -> ServedModel:
        return ServedModel(
            read_detector(listed.path),
            provider=self._settings.provider,
            threads=self._settings.threads,
            spin=self._settings.inferences == 1,
            name=listed.name,
            version=listed.version,
        )


def _not_ready(entries: list[Entry]) -> ProblemError:
    """Return the error for models none of which is ready."""
    problems = [entry.problem for entry in entries if entry.problem]
    if any(entry.warming for entry in entries):
        reason = "the model is warming up"
    elif problems:
        reason = problems[-1]
    else:
        reason = "the model is not loaded"
    return ProblemError(503, f"not ready: {reason}", {"Retry-After": "1"})
