"""Worker of `benchmarks.against`: times the losses of the `ghm_triton` that is on the path.

Uses public names only, so that it runs with older checkouts. Reads lines of a loss and a number of
calls from stdin, separated by a tab, and answers each with the median milliseconds per call.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import ghm_triton

Step = Callable[[], object]
CLASSES = 80


def steps() -> dict[str, Step]:
    """Forward and backward passes by name: 10^6 and 10^4 entries, float32 and bfloat16."""
    found: dict[str, Step] = {}
    for entries in (10**6, 10**4):
        rows, make = entries // CLASSES, torch.Generator().manual_seed(0)
        logits = torch.randn(rows, CLASSES, generator=make) * 2 - 4
        labels = torch.randint(-1, CLASSES + 1, (rows,), generator=make)
        dense = torch.rand(rows, CLASSES, generator=make)
        boxes = torch.randn(entries // 4, 4, generator=make) * 0.1
        for dtype in (torch.float32, torch.bfloat16):
            about = f"{entries:.0e}, {str(dtype).removeprefix('torch.')}"
            for name, loss, pred, target in (
                ("GHM-C, class indices", ghm_triton.GHMCLoss(), logits, labels),
                ("GHM-C, dense", ghm_triton.GHMCLoss(), logits, dense),
                ("GHM-R", ghm_triton.GHMRLoss(), boxes, torch.zeros_like(boxes)),
                ("softmax GHM", ghm_triton.GHMSoftmaxLoss(), logits, labels.clamp(max=79)),
                ("focal", ghm_triton.FocalLoss(), logits, labels),
            ):
                found[f"{name}, {about}"] = _step(loss, pred.to(dtype), target)
    return found


def _step(loss: Callable[[Tensor, Tensor], Tensor], pred: Tensor, target: Tensor) -> Step:
    pred = pred.clone().requires_grad_()
    target = target.to(pred.dtype) if target.is_floating_point() else target
    return lambda: torch.autograd.grad(loss(pred, target), pred)


def main() -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(int(sys.argv[1]))
    ready = steps()
    for step in ready.values():
        step()
    print("\t".join(ready), flush=True)
    for line in sys.stdin:
        name, calls = line.rstrip("\n").split("\t")
        taken = []
        for _ in range(int(calls)):
            start = time.perf_counter()
            ready[name]()
            taken.append((time.perf_counter() - start) * 1000)
        print(statistics.median(taken), flush=True)


if __name__ == "__main__":
    main()
