"""How long a loss takes, forward and with its gradient, and how much memory.

    python -m benchmarks.losses                    # what this machine has
    python -m benchmarks.losses --device cpu --quick

One JSON line a loss, size, dtype, kind of target and stage, each with its provenance. `copy` reads
and writes the predictions once: the roof for everything else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import ReleasedGHMC, ReleasedGHMR, one_hot_bce, torchvision_focal
from benchmarks.provenance import provenance
from ghm_triton import FocalLoss, GHMCLoss, GHMRLoss

RESULTS = Path(__file__).parent / "results" / "losses.jsonl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"cuda": [10**5, 10**6, 2**23, 2**26], "cpu": [10**5, 10**6]}
QUICK = [20_000]
CLASSES = 80
POSITIVES = 1e-3  # of the rows; a detector's anchors are as unbalanced
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured: a problem of one size, dtype and kind of target."""

    task: str  # classification or regression
    entries: int
    dtype: str
    target: str  # index or dense
    device: str

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Predictions, which want a gradient, and targets; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        columns = CLASSES if self.task == "classification" else 4
        rows = max(1, self.entries // columns)
        shape = (rows, columns)
        make: dict[str, Any] = {"device": self.device, "generator": generator}
        if self.task == "regression":
            target = torch.zeros(shape, device=self.device)
            pred = torch.randn(shape, **make) * 0.1
            return self._leaf(pred), target.to(DTYPES[self.dtype])
        logits = torch.randn(shape, **make) * 2 - 4
        index = torch.randint(0, CLASSES, (rows,), **make)
        background = torch.rand(rows, **make) >= POSITIVES
        index[background] = CLASSES
        if self.target == "index":
            return self._leaf(logits), index
        dense = torch.zeros(shape, device=self.device)
        dense.scatter_(1, index.clamp(max=CLASSES - 1)[:, None], (~background).float()[:, None])
        return self._leaf(logits), dense.to(DTYPES[self.dtype])

    def _leaf(self, tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[self.dtype]).requires_grad_()


def losses(task: str, device: str) -> Iterator[tuple[str, Callable[[], Loss]]]:
    """Every loss of a task by name, and how to make it anew.

    The harmonized ones are set up alike, as the released code is, so that their values agree.
    """
    released: dict[str, Any] = {"ema": "mmdet", "normalizer": "valid_bins", "strength": 1.0}
    on = torch.device(device)
    backends = {"torch": "torch"} | ({"triton": "triton"} if device == "cuda" else {})
    if task == "regression":
        for name, backend in backends.items():
            yield f"ghm_r {name}", partial(_on, on, GHMRLoss, backend=backend, **released)
        yield "ghm_r released", ReleasedGHMR
        yield "smooth_l1", nn.SmoothL1Loss
        return
    for name, backend in backends.items():
        yield f"ghm_c {name}", partial(_on, on, GHMCLoss, backend=backend, **released)
    yield "ghm_c released", ReleasedGHMC
    yield "focal", FocalLoss
    if importlib.util.find_spec("torchvision") is not None:
        yield "focal torchvision", lambda: torchvision_focal
    yield "bce", lambda: one_hot_bce


def _on(device: torch.device, module: type[nn.Module], **options: Any) -> nn.Module:
    return module(**options).to(device)


def cases(device: str, sizes: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every problem, small ones first."""
    for entries in sizes:
        for dtype in dtypes:
            for target in ("index", "dense"):
                yield Case("classification", entries, dtype, target, device)
            yield Case("regression", entries, dtype, "dense", device)


def measure(case: Case, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one case: the copy, then every loss, forward and with its gradient."""
    predictions, target = case.tensors()
    entries = predictions.numel()
    base = {"task": case.task, "entries": entries, "dtype": case.dtype, "target": case.target}
    took = copy_ms(predictions.detach(), case.device, seconds)
    yield base | {"loss": "copy", "stage": "copy", "median_ms": took}
    for name, make in losses(case.task, case.device):
        criterion = make()
        value = float(criterion(predictions, target).detach())

        def forward(criterion: Loss = criterion) -> Tensor:
            return criterion(predictions, target)

        def both(criterion: Loss = criterion) -> None:
            predictions.grad = None
            torch.autograd.backward(criterion(predictions, target))

        row = base | {"loss": name, "value": value}
        yield row | {"stage": "forward", "median_ms": median_ms(forward, case.device, seconds)}
        took = median_ms(both, case.device, seconds)
        predictions.grad = None
        peak = peak_bytes(both, case.device)
        yield row | {"stage": "forward+backward", "median_ms": took, "peak_bytes": peak}
        predictions.grad = None


def copy_ms(source: Tensor, device: str, seconds: float) -> float:
    """Median time of reading a tensor once and writing it once."""
    destination = torch.empty_like(source)
    return median_ms(lambda: destination.copy_(source), device, seconds)


def median_ms(work: Callable[[], object], device: str, seconds: float) -> float:
    """Median time of `work` in milliseconds, after warming up."""
    if device == "cuda":
        from triton.testing import do_bench

        spent = seconds * 1000
        return float(do_bench(work, warmup=spent / 4, rep=spent, return_mode="median"))
    work()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        took.append((time.perf_counter() - start) * 1000)
    return statistics.median(took)


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """What `work` allocates at its height beyond what is there; on the GPU only."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[dict[str, Any]]) -> str:
    """Forward with gradient, relative to plain binary cross entropy or smooth L1."""
    lines = [f"{'entries':>10} {'dtype':<9} {'target':<6} {'loss':<18} {'ms':>9} {'x plain':>8}"]
    plain = {
        _key(row): row["median_ms"]
        for row in rows
        if row["stage"] == "forward+backward" and row["loss"] in ("bce", "smooth_l1")
    }
    for row in rows:
        if row["stage"] == "forward":
            continue
        ratio = row["median_ms"] / plain[_key(row)]
        lines.append(
            f"{row['entries']:>10} {row['dtype']:<9} {row['target']:<6} {row['loss']:<18}"
            f" {row['median_ms']:>9.3f} {ratio:>8.2f}"
        )
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "entries", "dtype", "target"))


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--sizes", type=int, nargs="+", help="entries; default by device")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=0.15, help="spent on each measurement")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; added to")
    options = parser.parse_args()
    sizes = options.sizes or (QUICK if options.quick else SIZES[options.device])
    seconds = 0.01 if options.quick else options.seconds
    origin = {"device": options.device, **provenance()}
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        for case in cases(options.device, sizes, options.dtypes):
            for row in measure(case, seconds):
                rows.append(row)
                file.write(json.dumps(row | origin) + "\n")
                file.flush()
    print(table(rows))


if __name__ == "__main__":
    main()
