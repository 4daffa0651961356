"""Fabricated rows of a study."""

import json

import pytest


def make(method="focal", seed=0, ap=0.5, **fields):
    row = {
        "grid": "cpu",
        "section": "methods",
        "data": "digits",
        "detector": "retinanet",
        "method": method,
        "seed": seed,
        "steps": 600,
        "batch_size": 16,
        "image_size": [128, 128],
        "channels": 48,
        "options": {},
        "config": {},
        "bins": None,
        "strength": None,
        "ap": ap,
        "ap50": 0.8,
        "ap75": 0.6,
        "ap_per_class": {},
        "step_ms": 80.0,
        "parallel": 1,
        "curves": None,
        "gradient_norms": None,
        "policies": None,
        "commit": "aaa",
        "source": "111",
        "python": "3.11.7",
        "versions": {"torch": "2.6.0", "triton": None},
        "cpu": "A CPU",
        "cpu_threads": 1,
        "gpu": None,
        "system": "Linux x86_64",
    }
    return {**row, **fields}


@pytest.fixture(name="make")
def make_fixture():
    """Make one row with a method, a seed, an AP and any other fields."""
    return make


@pytest.fixture
def write(tmp_path):
    """Write rows, or verbatim lines, to a file."""

    def write(*rows, name="study.jsonl", end="\n"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + end)
        return path

    return write


@pytest.fixture
def frame(write):
    """Rows as a study's data frame, baseline first."""
    from benchmarks.study.report.runs import read_study

    return lambda *rows: read_study([write(*rows)]).runs
