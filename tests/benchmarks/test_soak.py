"""A soak in little: it runs, loses nothing and writes its row."""

import numpy as np
import pytest

from benchmarks.result_file import read
from benchmarks.soak import BOUNDS, broken, main, shortened, summary
from benchmarks.soak_traffic import SHAPES
from tests.service import conftest as detectors


def test_a_short_soak_loses_no_request_and_writes_its_row_and_plot(tmp_path):
    model = tmp_path / "colours.onnx"
    model.write_bytes(detectors.build_detector(detectors.make_card()))
    out, plot = tmp_path / "soak.jsonl", tmp_path / "images" / "soak.png"
    words = f"--model {model} --minutes 0.2 --clients 2 --out {out} --plot {plot}"
    main(words.split())
    (row,) = read(out)
    assert row["lost_by_reason"] == {}
    assert [row[name] for name in ("wrong", "workers_replaced", "tracebacks", "exit_status")] == (
        [0] * 4
    )
    assert row["answers"]["200"] > 0
    assert set(row["hostile"]) == set(SHAPES)
    assert set(row["hostile"]["bomb"]) == {"refused"}
    assert row["series"]["workers_mb"]
    assert row["commit"]
    assert BOUNDS.keys() <= row.keys()
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_growth_is_that_after_the_warm_up():
    seconds = np.arange(0, 3600, 5.0)
    warming = np.minimum(seconds, 600)
    series = {
        "seconds": seconds.tolist(),
        "supervisor_mb": (50 + warming).tolist(),
        "workers_mb": (200 + warming + 2 * seconds / 3600).tolist(),
        "descriptors": (80 + 3 * (seconds > 3000)).tolist(),
        "threads": (15 - (seconds < 60)).tolist(),
        "live_p50_ms": [2.0] * len(seconds),
    }
    found = summary(series)
    assert found["rss_mb_per_hour"] == pytest.approx(2.0, abs=1e-3)
    assert (found["descriptors_growth"], found["threads_growth"]) == (3, 0)
    assert shortened(series)["seconds"][:2] == [12.5, 42.5]
    row = {**dict.fromkeys(BOUNDS, 0), **found, "live_p99_ms": 101.0, "minutes": 60}
    assert broken(row) == [
        "rss_mb_per_hour is 2.0, which is above 1.0",
        "descriptors_growth is 3.0, which is above 2.0",
        "live_p99_ms is 101.0, which is above 100.0",
    ]
    assert broken({**row, "minutes": 5}) == ["live_p99_ms is 101.0, which is above 100.0"]
