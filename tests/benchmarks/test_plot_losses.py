"""The plots have a line per loss, at its points."""

import json
import sys

import pytest
from matplotlib.figure import Figure

from benchmarks import plot_losses
from benchmarks.loss_cases import plan

BOTH = "forward+backward"


def rows_of(dtypes=("float32", "bfloat16")):
    """Make rows with distinct times and shares."""
    rows = []
    for case in plan("cuda"):
        if case.dtype not in dtypes:
            continue
        ms = case.entries * (1e-6 if case.dtype == "float32" else 5e-7)
        base = {**case.key, "gpu": "H100", "device": "cuda", "source": "new"}
        rows.append({**base, "loss": "copy", "stage": "copy", "median_ms": ms / 4})
        name = {"classification": "ghm_c", "regression": "ghm_r"}.get(case.task, "ghm_softmax")
        ours = {**base, "loss": f"{name} triton", "ratios": {}}
        rows.append({**ours, "stage": BOTH, "median_ms": ms, "share_of_copy": 0.9})
        rows.append({**ours, "stage": "forward", "median_ms": 1e9})
        if case.entries <= 2**23:
            rows.append({**ours, "stage": "graph", "median_ms": ms / 2, "share_of_copy": 0.95})
        rows.append({**base, "loss": "bce compiled", "stage": BOTH, "median_ms": 3 * ms})
        rows.append({**base, "loss": "bce", "stage": BOTH, "error": "OutOfMemoryError"})
    return rows


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plot_losses", *map(str, arguments)])
    plot_losses.main()


def test_both_plots(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of()))
    run(monkeypatch, path, "--out", tmp_path / "images")
    for name in ("losses_time.png", "losses_bandwidth.png"):
        assert (tmp_path / "images" / name).read_bytes()[:4] == b"\x89PNG"
    times, bandwidth = figures
    panels = {axes.get_title(): axes for axes in times.axes}
    lines = {line.get_label(): line for line in panels["class indices, float32"].lines}
    assert set(lines) == {"copy", "GHM, ours", "plain loss, compiled"}
    sizes = [10**5, 10**6, 2**23, 2**25, 2**26, 2**28]
    assert list(lines["GHM, ours"].get_xdata()) == sizes
    assert list(lines["GHM, ours"].get_ydata()) == pytest.approx([1e-6 * size for size in sizes])
    shares = {line.get_label(): line for line in bandwidth.axes[0].lines}
    assert list(shares["class indices, float32"].get_ydata()) == [0.9] * 6
    assert list(shares["box regression, bfloat16, CUDA graph"].get_ydata()) == [0.95] * 3
    with pytest.raises(SystemExit, match="nothing to draw"):
        run(monkeypatch, tmp_path / "none.jsonl")
