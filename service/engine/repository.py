"""The models that are served: found, loaded, looked up, and replaced while requests run.

A model is replaced as a whole and only once its successor has answered an image, so a request has
one model from beginning to end, and a file that cannot be served leaves its predecessor serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol

from export.card import CardError
from export.file import read_detector
from service.core.errors import ProblemError, short
from service.engine.catalogue import CatalogueError, Listed, Signature, list_models, version_key
from service.engine.session import ModelError, ServedModel

logger = logging.getLogger("ghm.service")

Loader = Callable[[Listed], ServedModel]


class LoadObserver(Protocol):
    """Whoever wants to know of loads: the metrics."""

    def model_loaded(self, model: ServedModel) -> None:
        """A model has begun to serve."""

    def reload_failed(self, name: str) -> None:
        """A file could not be loaded; its predecessor, if any, goes on."""


@dataclass(frozen=True)
class Entry:
    """One file, and the model that serves for it.

    Attributes:
        listed: The file, and the name that its place gives it.
        model: What serves; None where nothing could be loaded from it yet.
        problem: Why the file as it is now is not what serves; None where it is.
        loaded_at: When the model began to serve, UTC.
        signature: The file that was last tried.
    """

    listed: Listed
    model: ServedModel | None = None
    problem: str | None = None
    loaded_at: datetime | None = None
    signature: Signature | None = None

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.listed.name or (self.model.name if self.model else self.listed.path.stem)

    @property
    def version(self) -> str:
        """Which of the models of its name it is."""
        return self.listed.version

    @property
    def path(self) -> Path:
        """The file."""
        return self.listed.path

    @property
    def ready(self) -> bool:
        """Whether its model answers."""
        return self.model is not None and self.model.warm

    @property
    def warming(self) -> bool:
        """Whether its model has yet to answer for the first time, and may."""
        return self.model is not None and not self.model.warm and self.problem is None

    @property
    def served(self) -> ServedModel:
        """The model.

        Raises:
            ProblemError: 503 where none is loaded.
        """
        if self.model is None:
            raise _not_ready([self])
        return self.model


class Registry:
    """Every model of one file or folder.

    Its methods belong to the event loop; files are read and models loaded in threads.

    Args:
        source: A `.onnx` file or a folder of them.
        provider: As `ServedModel` takes it.
        threads: As `ServedModel` takes it.
        spin: As `ServedModel` takes it.
        observer: Told of loads and failures.
        loader: Loads one model; from the file where None.

    Attributes:
        source: The file or folder.
        problem: Why the folder as it is now is not what serves; None where it is.
    """

    def __init__(
        self,
        source: Path,
        *,
        provider: str = "auto",
        threads: int = 1,
        spin: bool = True,
        observer: LoadObserver | None = None,
        loader: Loader | None = None,
    ) -> None:
        self.source = source
        self._provider = provider
        self._threads = threads
        self._spin = spin
        self._observer = observer
        self._loader = loader or self._read
        self._entries: dict[Path, Entry] = {}
        self._busy = asyncio.Lock()
        self.problem: str | None = None

    def entries(self) -> list[Entry]:
        """Every model, by name and then by version, the newest last."""
        return sorted(self._entries.values(), key=lambda e: (e.name, version_key(e.version)))

    def problems(self) -> list[str]:
        """What an operator should know: files that are there and not served as they are."""
        found = [f"{entry.path}: {entry.problem}" for entry in self.entries() if entry.problem]
        return [self.problem, *found] if self.problem else found

    def get(self, name: str | None = None, version: str | None = None) -> ServedModel:
        """The model that a request means.

        Args:
            name: Its name; may be None where only one name is served.
            version: Its version; the newest that serves where None.

        Raises:
            ProblemError: 404 for a model that is not there, 422 where one must be named, 503 for
                one that is not ready.
        """
        if len(self._entries) == 1:  # as nearly always; this is asked for every request
            (only,) = self._entries.values()
            if only.ready and name in (None, only.name) and version in (None, only.version):
                return only.served
        entries = self._matching(name, version)
        ready = [entry for entry in entries if entry.ready]
        if not ready:
            raise _not_ready(entries)
        return ready[-1].served

    def loaded(self, name: str | None = None, version: str | None = None) -> Entry:
        """The entry of a loaded model, whether or not it has answered yet.

        Raises:
            ProblemError: As `get`.
        """
        entries = self._matching(name, version)
        loaded = [entry for entry in entries if entry.model]
        if not loaded:
            raise _not_ready(entries)
        return loaded[-1]

    def check_ready(self) -> list[Entry]:
        """The entries, once at least one model answers and none is still warming up.

        Raises:
            ProblemError: 503 before that.
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
        found = [entry for entry in named if version in (None, entry.version)]
        if named and not found:
            versions = ", ".join(entry.version for entry in named)
            raise ProblemError(
                404, f"no version {short(version)} of {named[0].name!r}; there is {versions}"
            )
        return found

    def adopt(self, model: ServedModel) -> None:
        """Serve a model that somebody else has loaded, in place of the file's."""
        listed = Listed(self.source, None, model.version)
        self._entries[self.source] = Entry(
            listed, model, None, datetime.now(UTC), Signature.of(self.source)
        )
        if self._observer:
            self._observer.model_loaded(model)

    async def load(self) -> None:
        """Load everything, at the start; models are ready after `warm_up`.

        A folder may hold files that cannot be served, as long as one can.

        Raises:
            CardError, ModelError, OSError: The only file cannot be served.
            CatalogueError: The folder is unclear, or empty, or none of its files can be served.
        """
        listing = await asyncio.to_thread(self.files)
        for listed in listing:
            signature = Signature.of(listed.path)
            try:
                model = await asyncio.to_thread(self._loader, listed)
            except (CardError, ModelError, OSError) as error:
                if listed.name is None:
                    raise
                self._failed(Entry(listed, signature=signature), error)
            else:
                self._began(Entry(listed, model, signature=signature))
        if not any(entry.model for entry in self._entries.values()):
            raise CatalogueError("; ".join(["no model can be served", *self.problems()]))

    def files(self) -> list[Listed]:
        """The files as they are now.

        Raises:
            CatalogueError: The folder is unclear or holds no model.
        """
        listing = list_models(self.source)
        if not listing:
            raise CatalogueError(f"{self.source}: no .onnx file in this folder")
        return listing

    async def warm_up(self) -> None:
        """Let every loaded model answer once. One that cannot stays unready and says why."""
        for entry in self.entries():
            if entry.model is None or entry.model.warm:
                continue
            try:
                await asyncio.to_thread(entry.model.warm_up)
            except ModelError as error:
                logger.error("%s failed its warm-up: %s", entry.path, error)
                self._entries[entry.path] = replace(
                    entry, problem=f"the model failed its warm-up: {error}"
                )

    async def reload(self, name: str) -> list[Entry]:
        """Read the files of a model again, whether or not they look changed.

        Args:
            name: The model's; every version of it is read.

        Returns:
            Its entries. Where the file cannot be served, the old model goes on, and the entry's
            `problem` says why.

        Raises:
            ProblemError: 404 for a model that is not there.
        """
        paths = [entry.path for entry in self._matching(name, None)]
        async with self._busy:
            for path in paths:
                if path in self._entries:
                    await self._replace(self._entries[path])
        return [self._entries[path] for path in paths if path in self._entries]

    async def refresh(self) -> None:
        """Follow the files: load what is new or changed, drop what has gone."""
        async with self._busy:
            try:
                listing = await asyncio.to_thread(self.files)
            except (CatalogueError, OSError) as error:
                self._unclear(str(error))
                return
            self.problem = None
            await self._follow({listed.path: listed for listed in listing})

    async def watch(self, seconds: float) -> NoReturn:
        """Follow the files for ever.

        Args:
            seconds: How often to look.
        """
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception:  # a watcher that dies is worse than any single failure
                logger.exception("looking for changed models failed")

    async def _follow(self, listing: dict[Path, Listed]) -> None:
        for path in set(self._entries) - set(listing):
            gone = self._entries.pop(path)
            logger.info("%s has gone: %s is served no longer", path, gone.name)
        for path, listed in listing.items():
            signature = await asyncio.to_thread(Signature.of, path)
            entry = self._entries.get(path, Entry(listed))
            if signature != entry.signature:
                await self._replace(entry)

    async def _replace(self, entry: Entry) -> None:
        """Try the file as it is now, and serve it only if it answers."""
        # Taken before the file is read: a change while reading is then seen the next time.
        signature = await asyncio.to_thread(Signature.of, entry.path)
        entry = replace(entry, signature=signature)
        try:
            model = await asyncio.to_thread(self._loader, entry.listed)
            if entry.model and model.sha256 == entry.model.sha256:
                model = entry.model
            await asyncio.to_thread(model.warm_up)
        except (CardError, ModelError, OSError) as error:
            self._failed(entry, error)
        else:
            self._began(replace(entry, model=model))

    def _began(self, entry: Entry) -> None:
        before = self._entries.get(entry.path)
        same = before is not None and before.model is entry.model
        loaded_at = entry.loaded_at if same else datetime.now(UTC)
        self._entries[entry.path] = replace(entry, problem=None, loaded_at=loaded_at)
        if same or entry.model is None:
            return
        logger.info("%s: serving %s, sha256 %s", entry.path, entry.name, entry.model.sha256[:12])
        if self._observer:
            self._observer.model_loaded(entry.model)

    def _failed(self, entry: Entry, error: Exception) -> None:
        self._entries[entry.path] = replace(entry, problem=str(error))
        goes_on = "its predecessor goes on serving" if entry.model else "nothing serves for it"
        logger.error("%s cannot be served, %s: %s", entry.path, goes_on, error)
        if self._observer:
            self._observer.reload_failed(entry.name)

    def _unclear(self, problem: str) -> None:
        if problem != self.problem:
            logger.error("the models are not followed: %s", problem)
        self.problem = problem

    def _read(self, listed: Listed) -> ServedModel:
        return ServedModel(
            read_detector(listed.path),
            provider=self._provider,
            threads=self._threads,
            spin=self._spin,
            name=listed.name,
            version=listed.version,
        )


def _not_ready(entries: list[Entry]) -> ProblemError:
    """Says why none of these models answers."""
    problems = [entry.problem for entry in entries if entry.problem]
    if any(entry.warming for entry in entries):
        reason = "the model is warming up"
    elif problems:
        reason = problems[-1]
    else:
        reason = "the model is not loaded"
    return ProblemError(503, f"not ready: {reason}", {"Retry-After": "1"})
