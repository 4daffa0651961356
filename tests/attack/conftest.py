from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.core import Service, serving
from tests.service import conftest as detectors

IMPATIENT = {
    "GHM_HEADER_SECONDS": "1",
    "GHM_KEEP_ALIVE_SECONDS": "1",
    "GHM_RECEIVE_SECONDS": "1",
    "GHM_WRITE_SECONDS": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.attack)


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "colours.onnx"
    path.write_bytes(detectors.build_detector(detectors.make_card()))
    return path


@pytest.fixture(scope="session")
def png() -> bytes:
    """Three patches of colour, which the detector finds."""
    patches = {(32, 32, 64, 64): "#ff0000", (128, 32, 160, 64): "#00d000"}
    patches[64, 80, 96, 112] = "#0000ff"
    return detectors.encode_image(detectors.make_scene(192, 128, patches))


@pytest.fixture(scope="session")
def service(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One worker with the defaults."""
    with serving(detector, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="session")
def workers(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two workers with the defaults."""
    with serving(detector, tmp_path_factory.mktemp("workers"), "--workers", 2) as running:
        yield running


@pytest.fixture(scope="session")
def impatient(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One worker that waits a second at most for anything."""
    folder = tmp_path_factory.mktemp("impatient")
    with serving(detector, folder, **IMPATIENT) as running:
        yield running
