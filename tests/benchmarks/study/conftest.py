"""A grid of runs for tests that do not train."""

from pathlib import Path

import pytest

from benchmarks.study.grid import Grid

# Each method is another training, but `copy`, which is `good`.
GRID = """
data: {d: {source: digits, image_size: [96, 96], channels: 16, batch_size: 4}}
methods:
  good: {}
  copy: {}
  bad: {bins: 5}
  dead: {bins: 6}
  slow: {bins: 7}
  fine: {bins: 8}
sections:
"""
SECTION = "  %s: {data: [d], detectors: [retinanet], methods: [%s], seeds: %s, steps: %d}\n"


class Place:
    """A folder with a grid and its result file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.out = folder, folder / "fake.yaml", folder / "out.jsonl"
        self.path.write_text(GRID)

    def add(self, section, methods, seeds="[0]", steps=10):
        with self.path.open("a") as stream:
            stream.write(SECTION % (section, methods, seeds, steps))
        return self

    def runs(self):
        return Grid(self.path).runs()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)
