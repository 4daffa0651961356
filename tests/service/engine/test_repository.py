import asyncio
import shutil
from pathlib import Path

import pytest

from export.card import CardError
from export.file import read_detector
from service.core.errors import ProblemError
from service.core.settings import Settings
from service.engine.catalogue import CatalogueError
from service.engine.repository import Registry
from service.engine.session import ModelError

pytestmark = pytest.mark.anyio


class Watcher:
    """Remembers what it was told."""

    def __init__(self):
        self.loaded, self.failed = [], []

    def model_loaded(self, model):
        self.loaded.append((model.name, model.version))

    def reload_failed(self, name):
        self.failed.append(name)


@pytest.fixture(scope="module")
def other(write_detector) -> Path:
    """A detector with another backbone, so another digest."""
    return write_detector(backbone="another")


@pytest.fixture
def start():
    """Loads and warms up what a file or folder holds."""

    async def load(source: Path) -> tuple[Registry, Watcher]:
        watcher = Watcher()
        registry = Registry(Settings(models=source, provider="cpu"), watcher)
        await registry.load()
        await registry.warm_up()
        return registry, watcher

    return load


def folder_of(root: Path, **files: Path) -> Path:
    for name, source in files.items():
        target = root / f"{name.replace('__', '/')}.onnx"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
    return root


def refused(registry: Registry, *which) -> tuple[int, str]:
    with pytest.raises(ProblemError) as caught:
        registry.get(*which)
    return caught.value.status, caught.value.detail


async def test_a_single_file_is_called_by_its_card(start, detector):
    registry, watcher = await start(detector)
    assert registry.get() is registry.get("colours") is registry.get("colours", "1")
    assert watcher.loaded == [("colours", "1")]
    assert refused(registry, "cars") == (404, "no model 'cars'; there is colours")


async def test_a_folder_by_name_and_version(start, detector, other, tmp_path):
    files = {"pets__2": detector, "pets__10": other, "cars": detector}
    registry, _ = await start(folder_of(tmp_path, **files))
    assert [(e.name, e.version) for e in registry.entries()] == [
        ("cars", "1"),
        ("pets", "2"),
        ("pets", "10"),
    ]
    assert registry.get("pets").version == "10"
    assert registry.get("pets", "2").card.backbone != registry.get("pets").card.backbone
    assert refused(registry)[0] == 422  # which of the two?
    assert refused(registry, "pets", "3") == (
        404,
        "no version '3' of 'pets'; there is 2, 10",
    )


async def test_nothing_answers_before_its_warm_up(detector):
    registry = Registry(Settings(model=detector, provider="cpu"), Watcher())
    assert refused(registry) == (503, "not ready: the model is not loaded")
    await registry.load()
    assert refused(registry) == (503, "not ready: the model is warming up")
    assert registry.loaded().name == "colours"
    with pytest.raises(ProblemError, match="warming up"):
        registry.check_ready()
    await registry.warm_up()
    assert registry.check_ready()[0].ready


async def test_a_bad_file_beside_a_good_one(start, detector, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")

    registry, watcher = await start(folder_of(tmp_path, good=detector))
    assert watcher.failed == ["bad"]
    assert registry.get("good").warm
    assert refused(registry, "bad")[0] == 503
    assert "bad.onnx" in registry.problems()[0]
    assert [entry.ready for entry in registry.check_ready()] == [False, True]


async def test_what_cannot_start(start, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(CatalogueError, match=r"no model can be served; .*bad\.onnx"):
        await start(tmp_path)
    with pytest.raises(CardError):
        await start(tmp_path / "bad.onnx")
    (tmp_path / "bad.onnx").unlink()
    with pytest.raises(CatalogueError, match=r"no \.onnx file"):
        await start(tmp_path)


async def test_refresh_follows_the_files(start, detector, other, tmp_path):
    registry, watcher = await start(folder_of(tmp_path, a=detector, b=detector))
    kept = registry.get("a")
    folder_of(tmp_path, b=other, c=detector)
    await registry.refresh()
    assert registry.get("a") is kept
    assert registry.get("b").card.backbone == "another"
    assert registry.get("c").warm
    assert watcher.loaded == [("a", "1"), ("b", "1"), ("b", "1"), ("c", "1")]
    (tmp_path / "a.onnx").unlink()
    await registry.refresh()
    assert refused(registry, "a")[0] == 404


async def test_a_bad_new_file_leaves_the_old_model_until_it_is_mended(
    start, detector, other, tmp_path
):
    path = tmp_path / "served.onnx"
    shutil.copy(detector, path)

    registry, watcher = await start(path)
    old = registry.get()
    path.write_bytes(other.read_bytes()[:1000])
    await registry.refresh()
    assert registry.get() is old
    assert "served.onnx" in registry.problems()[0]
    await registry.refresh()  # tried once, not again and again
    assert watcher.failed == ["colours"]
    path.unlink()
    await registry.refresh()
    assert registry.get() is old
    shutil.copy(other, path)
    await registry.refresh()
    assert registry.get().card.backbone == "another"
    assert registry.problems() == []


async def test_an_entry_that_is_no_model_stops_neither_the_start_nor_the_others(
    start, detector, tmp_path
):
    registry, _ = await start(folder_of(tmp_path, good=detector, **{"odd (1)": detector}))
    assert [entry.name for entry in registry.check_ready()] == ["good"]
    assert "odd (1).onnx: 'odd (1)' is no name" in registry.problems()[0]
    folder_of(tmp_path, new=detector, **{"odd (2)": detector})
    await registry.refresh()
    assert registry.get("new").warm
    assert len(registry.problems()) == 2


async def test_a_folder_that_cannot_be_read_for_a_while_keeps_its_models(
    start, detector, tmp_path, monkeypatch
):
    registry, _ = await start(folder_of(tmp_path, a=detector, pets__2=detector))
    listing = [registry.entries()[0].listed]
    unreadable = {tmp_path / "pets": "Permission denied"}
    monkeypatch.setattr("service.engine.repository.list_models", lambda _: (listing, unreadable))
    await registry.refresh()
    assert registry.get("pets").version == "2"
    assert registry.problems() == [f"{tmp_path / 'pets'}: Permission denied"]


async def test_a_file_that_may_be_read_later_is_served_then(start, detector, tmp_path, monkeypatch):
    forbidden = True

    def read(path):  # as for a user without permission; the tests may run as root
        if forbidden and path.name == "later.onnx":
            raise PermissionError(13, "Permission denied")
        return read_detector(path)

    monkeypatch.setattr("service.engine.repository.read_detector", read)

    registry, _ = await start(folder_of(tmp_path, good=detector, later=detector))
    assert "Permission denied" in registry.problems()[0]
    forbidden = False
    (tmp_path / "later.onnx").chmod(0o600)
    await registry.refresh()
    assert registry.get("later").warm
    assert registry.problems() == []


async def test_a_file_with_the_version_of_another_is_a_problem_until_that_is_gone(
    start, detector, tmp_path
):
    registry, _ = await start(folder_of(tmp_path, pets=detector))
    folder_of(tmp_path, pets__1=detector, cars=detector)
    await registry.refresh()
    paths = [entry.path for entry in registry.entries()]
    assert paths == [tmp_path / "cars.onnx", tmp_path / "pets/1.onnx"]
    assert "is version 1 of pets already" in registry.problems()[0]
    (tmp_path / "pets/1.onnx").unlink()
    await registry.refresh()
    assert registry.problems() == []
    assert registry.entries()[1].path == tmp_path / "pets.onnx"


async def test_problems_are_text_whatever_the_bytes_of_a_name(start, detector, tmp_path):
    registry, _ = await start(folder_of(tmp_path, good=detector, **{"a\udcff": detector}))
    assert registry.problems()[0].encode().startswith(bytes(tmp_path / "a") + b"\\udcff.onnx")


async def test_an_empty_folder_is_a_mistake_and_changes_nothing(start, detector, tmp_path):
    registry, _ = await start(folder_of(tmp_path, a=detector))
    (tmp_path / "a.onnx").unlink()
    await registry.refresh()
    assert registry.get("a").warm
    assert "no .onnx file" in registry.problems()[0]
    folder_of(tmp_path, a=detector)
    await registry.refresh()
    assert registry.problems() == []


async def test_a_touched_file_keeps_its_model(start, detector, tmp_path):
    path = tmp_path / "served.onnx"
    shutil.copy(detector, path)

    registry, watcher = await start(path)
    (before,) = registry.entries()
    path.touch()
    await registry.reload("colours")
    (after,) = registry.entries()
    assert after.model is before.model
    assert after.loaded_at == before.loaded_at
    assert len(watcher.loaded) == 1


async def test_a_successor_that_does_not_answer_is_not_taken(
    start, detector, other, tmp_path, monkeypatch
):
    path = tmp_path / "served.onnx"
    shutil.copy(detector, path)

    registry, _ = await start(path)
    old = registry.get()
    shutil.copy(other, path)

    def fail(self, options):
        raise ModelError("it does not run")

    monkeypatch.setattr("service.engine.session.ServedModel.warm_up", fail)
    (entry,) = await registry.reload("colours")
    assert registry.get() is entry.model is old
    assert entry.problem == "it does not run"


async def test_a_model_whose_warm_up_does_not_end_is_a_problem_and_the_others_serve(
    start, detector, endless_detector, tmp_path, told
):
    shutil.copy(detector, tmp_path / "good.onnx")
    shutil.copy(endless_detector, tmp_path / "endless.onnx")

    settings = told(model=None, models=tmp_path, load_seconds=0.5)
    registry = Registry(settings, Watcher())
    await registry.load()
    await registry.warm_up()
    endless, good = registry.check_ready()
    assert good.ready
    assert not endless.ready
    assert endless.problem.endswith("takes over 0.5 s")
    shutil.copy(detector, tmp_path / "later.onnx")
    await registry.refresh()
    assert [entry.name for entry in registry.entries() if entry.ready] == ["good", "later"]


def test_the_watch_goes_on_after_an_unexpected_failure(start, detector, monkeypatch, caplog):
    async def check():
        registry, _ = await start(detector)
        seen = asyncio.Event()
        rounds = []

        async def refresh():
            rounds.append(1)
            if len(rounds) == 1:
                raise RuntimeError("a surprise")
            seen.set()

        monkeypatch.setattr(registry, "refresh", refresh)
        watching = asyncio.create_task(registry.watch(0))
        await asyncio.wait_for(seen.wait(), 10)
        watching.cancel()

    asyncio.run(check())
    assert "a surprise" in caplog.text
