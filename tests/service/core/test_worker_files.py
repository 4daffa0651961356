"""Files of real processes: prometheus_client takes to them when it is imported, or never."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.core import worker_files
from service.core.worker_files import VARIABLE, WorkerFiles, shared_folder

# A worker: counts as it is told and says its pid; ends as it is told.
WORKER = """
import os, signal, sys
from prometheus_client import Counter, Gauge, Histogram
from service.core.worker_files import WorkerFiles

number = int(sys.argv[1])
Counter("ghm_a_total", "A.", ("kind",), registry=None).labels("x").inc(number)
Gauge("ghm_b", "B.", registry=None, multiprocess_mode="livesum").set(number)
Histogram("ghm_c_seconds", "C.", buckets=(1, 10), registry=None).observe(number)
WorkerFiles.of_environment().own_counts("model", (2, 3))[1, 2] = number
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def files(tmp_path) -> WorkerFiles:
    return WorkerFiles(tmp_path)


@pytest.fixture
def worker(files):
    """Runs a worker to its violent end; returns its pid."""

    def run(number: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", WORKER, str(number)],
            env=os.environ | {VARIABLE: str(files.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == -9, done.stderr
        return int(done.stdout)

    return run


def values(files: WorkerFiles) -> dict[str, float]:
    class Registry:
        def collect(self):
            return files.collect()

    text = generate_latest(Registry()).decode()
    return {
        one.name + "".join(f" {value}" for value in one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_sums_over_workers_and_what_stays_of_those_that_ended(files, worker):
    one, other = worker(2), worker(5)
    expected = {
        "ghm_a_total x": 7,
        "ghm_b": 7,
        "ghm_c_seconds_bucket 1.0": 0,
        "ghm_c_seconds_bucket 10.0": 2,
        "ghm_c_seconds_bucket +Inf": 2,
        "ghm_c_seconds_count": 2,
        "ghm_c_seconds_sum": 7,
    }
    assert values(files) == expected
    assert files.all_counts("model", (2, 3)).tolist() == [[0, 0, 0], [0, 0, 7]]
    files.retire(one)
    assert values(files) == expected | {"ghm_b": 5}  # counters never fall
    assert files.all_counts("model", (2, 3))[1, 2] == 5
    files.retire(other)
    files.retire(other)  # a second time changes nothing
    assert values(files) == {name: value for name, value in expected.items() if name != "ghm_b"}
    assert not files.all_counts("model", (2, 3)).any()
    left = {path.name for path in files.folder.iterdir()}
    assert left == {"counter_retired.db", "histogram_retired.db", "lock"}


def test_a_file_that_is_being_made_is_passed_over(files):
    (files.folder / "counter_1.db").touch()
    (files.folder / "live-model-1.f64").touch()
    assert values(files) == {}
    assert not files.all_counts("model", (2, 3)).any()
    files.retire(1)
    assert {path.name for path in files.folder.iterdir()} == {"lock"}


def test_counts_of_another_model_are_others(files):
    files.own_counts("model", (2, 3))[0, 0] = 1
    assert not files.all_counts("mode", (2, 3)).any()
    assert files.all_counts("model", (2, 3))[0, 0] == 1


def test_own_counts_begin_at_zero(files):
    files.own_counts("model", (1, 2))[:] = 7
    assert np.array_equal(files.own_counts("model", (1, 2)), np.zeros((1, 2)))


def test_the_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert WorkerFiles.of_environment() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert WorkerFiles.of_environment().folder == Path(tmp_path)


def test_files_are_allocated_so_that_a_full_disk_ends_no_process(files, worker):
    worker(1)
    for path in (*files.folder.glob("*.db"), *files.folder.glob("live-*")):
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 0


@pytest.mark.parametrize("memory", [True, False])
def test_the_folder_is_in_memory_or_among_temporary_files(monkeypatch, tmp_path, memory):
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not memory:

        def refuse(*, prefix, dir=None):  # noqa: A002
            if dir is not None:
                raise OSError("read-only")
            return TemporaryDirectory(prefix=prefix)

        monkeypatch.setattr("service.core.worker_files.TemporaryDirectory", refuse)
    with shared_folder() as folder:
        assert (Path(folder).parent == tmp_path) is not memory


def test_a_folder_without_room_gives_way_to_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    allocate = worker_files.allocate

    def fill(file, size):
        if file.name.startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        allocate(file, size)

    monkeypatch.setattr(worker_files, "allocate", fill)
    with worker_files.shared_folder() as folder:
        assert not folder.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
