"""Plot the results of `benchmarks.losses` on a GPU: time by size, and bandwidth.

python -m benchmarks.plot_losses                 # benchmarks/results -> docs/images
python -m benchmarks.plot_losses runs/gpu/losses.jsonl --out runs/gpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.claims import ROOF
from benchmarks.result_file import BOTH, COPY, GRAPH, Row, current, latest, matches, read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "losses_gpu.jsonl"
KEYS = ("gpu", "task", "entries", "dtype", "target", "loss", "stage")
PANELS = (
    ("classification", "index", "class indices"),
    ("classification", "dense", "dense targets"),
    ("regression", "dense", "box regression"),
    ("softmax", "index", "softmax"),
)
DTYPES = ("float32", "bfloat16")
# Losses that share colour, dash and name of a line; the last are drawn on top.
OURS = ("ghm_c triton", "ghm_r triton", "ghm_softmax triton")
STYLES = {
    ("copy",): ("#bbbbbb", "-", "copy"),
    ("ghm_c released", "ghm_r released"): ("#000000", "-", "GHM, MMDetection's"),
    ("ghm_c torch", "ghm_r torch", "ghm_softmax torch"): ("#ff9896", ":", "GHM, plain torch"),
    ("focal torchvision", "focal torchvision one-hot"): ("#98df8a", "-", "focal, torchvision's"),
    ("bce one-hot",): ("#17becf", ":", "BCE, one-hot made"),
    ("bce one-hot compiled",): ("#17becf", "-", "BCE, one-hot made, compiled"),
    ("bce", "smooth_l1", "cross_entropy"): ("#1f77b4", ":", "plain loss"),
    ("bce compiled", "smooth_l1 compiled", "cross_entropy compiled"): (
        "#1f77b4",
        "-",
        "plain loss, compiled",
    ),
    ("focal triton",): ("#2ca02c", "-", "focal, ours"),
    OURS: ("#d62728", "-", "GHM, ours"),
}


def plot_times(rows: Sequence[Row], path: Path) -> None:
    """Plot forward and backward time by size: a column per kind of target, a row per dtype.

    Args:
        rows: Rows of one GPU.
        path: PNG to write.
    """
    panels = [panel for panel in PANELS if _of(rows, *panel[:2])]
    dtypes = [dtype for dtype in DTYPES if any(row.get("dtype") == dtype for row in rows)]
    shape = (len(dtypes), len(panels))
    figure = Figure(figsize=(4.2 * shape[1] + 0.4, 3.4 * shape[0] + 1.9), layout="constrained")
    grid = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for dtype, line in zip(dtypes, grid, strict=True):
        for (task, target, title), axes in zip(panels, line, strict=True):
            _times(axes, [row for row in _of(rows, task, target) if row["dtype"] == dtype])
            axes.set_title(f"{title}, {dtype}", fontsize=10)
    for axes in grid[:, 0]:
        axes.set_ylabel("forward + backward, ms")
    for axes in grid[-1]:
        axes.set_xlabel("entries")
    known: dict[str, Artist] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"Time of a loss with its gradient on {_gpu(rows)}", fontsize=11)
    _save(figure, path)


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    for losses, (colour, dash, label) in STYLES.items():
        stage = COPY if losses == (COPY,) else BOTH
        points = _points(rows, losses, stage, "median_ms")
        if points:
            width = 2.2 if losses == OURS else 1.2
            axes.plot(*zip(*points, strict=True), dash, color=colour, lw=width, label=label)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot_bandwidth(rows: Sequence[Row], path: Path) -> None:
    """Plot the share of the copy bandwidth that our losses reach on their minimum traffic.

    Args:
        rows: Rows of one GPU.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(PANELS, ("#d62728", "#ff7f0e", "#1f77b4", "#9467bd"), strict=True))
    for (task, target, title), colour in colours.items():
        for dtype, dash in zip(DTYPES, ("-", "--"), strict=True):
            own = [row for row in _of(rows, task, target) if row["dtype"] == dtype]
            for stage, marker, mark in ((BOTH, "o", ""), (GRAPH, ".", ", CUDA graph")):
                points = _points(own, OURS, stage, "share_of_copy")
                if points:
                    label = f"{title}, {dtype}{mark}"
                    xs, ys = zip(*points, strict=True)
                    alpha = 1.0 if stage == BOTH else 0.4
                    axes.plot(xs, ys, dash, marker=marker, color=colour, label=label, alpha=alpha)
    axes.axhline(1.0, color="#bbbbbb", lw=1)
    axes.plot((ROOF, axes.get_xlim()[1]), (0.85, 0.85), color="black", lw=1, ls=":")
    axes.annotate(
        "85 %",
        (ROOF, 0.85),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
    )
    axes.set(xscale="log", ylim=(0, None), xlabel="entries", ylabel="share of copy bandwidth")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"GHM, forward + backward, on {_gpu(rows)}", fontsize=11)
    _save(figure, path)


def _of(rows: Sequence[Row], task: str, target: str) -> list[Row]:
    return [row for row in rows if matches(row, {"task": task, "target": target})]


def _points(
    rows: Sequence[Row], losses: Sequence[str], stage: str, figure: str
) -> list[tuple[int, float]]:
    return sorted(
        (row["entries"], row[figure])
        for row in rows
        if row["loss"] in losses and row["stage"] == stage and figure in row
    )


def _gpu(rows: Sequence[Row]) -> str:
    return str(rows[-1]["gpu"] or "a CPU")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Plot the recorded rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder")
    options = parser.parse_args()
    rows = latest(current(read(options.file)), KEYS)
    rows = [row for row in rows if "task" in row]
    if not rows:
        sys.exit(f"nothing to draw: {options.file} has no rows; measure on a GPU first")
    rows = [row for row in rows if row["gpu"] == rows[-1]["gpu"]]
    plot_times(rows, options.out / "losses_time.png")
    if any("share_of_copy" in row and row["loss"] in OURS for row in rows):
        plot_bandwidth(rows, options.out / "losses_bandwidth.png")


if __name__ == "__main__":
    main()
