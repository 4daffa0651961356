"""Repeat losses on the same inputs and compare the bits, which a race would change.

    python -m benchmarks.repeat                    # 200 times each
    python -m benchmarks.repeat --device cpu --quick

Shapes are near the edges of tiles, where a missing mask or barrier shows, and one is large enough
for many concurrent programs. Loss and gradient are compared on the device, so that nothing waits
between launches. One JSON line per loss, shape, dtype and kind of target; the exit status is 1 if
anything differed or failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import ghm_triton
from benchmarks.loss_cases import DTYPES
from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows

RESULTS = Path(__file__).parent / "results"
# A power of two and its neighbours; narrow, usual and wide rows.
SHAPES = [(1, 1), (127, 16), (128, 16), (129, 17), (1023, 15), (1024, 80), (1025, 81), (33, 333)]
LARGE = (2**17 + 1, 80)
BITS = {4: torch.int32, 2: torch.int16}
Trial = Callable[[Tensor, Tensor], Tensor]
Backend = Literal["triton", "torch"]


def trials(backend: Backend) -> Iterator[tuple[str, str, Trial]]:
    """Yield name, kind of target and loss, each without state."""
    for target in ("index", "dense"):
        yield "ghm_c", target, partial(ghm_triton.ghm_c_loss, strength=1.0, backend=backend)
        yield "focal", target, partial(ghm_triton.focal_loss, backend=backend)
    yield (
        "ghm_softmax",
        "class",
        partial(ghm_triton.ghm_softmax_loss, strength=1.0, backend=backend),
    )
    yield "ghm_r", "boxes", partial(ghm_triton.ghm_r_loss, strength=1.0, backend=backend)


def inputs(shape: tuple[int, int], dtype: str, target: str, device: str) -> tuple[Tensor, Tensor]:
    """Make predictions that require a gradient, and targets with ignored and background rows."""
    generator = torch.Generator(device).manual_seed(0)
    make: dict[str, Any] = {"device": device, "generator": generator}
    rows, columns = shape
    pred = (torch.randn(shape, **make) * 3).to(DTYPES[dtype]).requires_grad_()
    if target == "boxes":
        return pred, torch.randn(shape, **make).to(DTYPES[dtype])
    if target == "dense":
        return pred, torch.rand(shape, **make).to(DTYPES[dtype])
    if target == "class":
        return pred, torch.randint(-1, columns, (rows,), **make)
    return pred, torch.randint(-1, columns + 1, (rows,), **make)


def differing(trial: Trial, pred: Tensor, target: Tensor, times: int) -> int:
    """Count the runs of `times` that differ from the first in any bit of loss or gradient."""
    first = run_once(trial, pred, target)
    count = torch.zeros((), dtype=torch.int64, device=pred.device)
    for _ in range(times):
        again = run_once(trial, pred, target)
        # A sum of booleans, not `torch.equal`, which would wait for the device.
        count += sum((a != b).any() for a, b in zip(first, again, strict=True)) > 0
    return int(count)


def run_once(trial: Trial, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bits of loss and gradient, for an outer gradient other than 1."""
    loss = trial(pred, target)
    (gradient,) = torch.autograd.grad(loss, pred, torch.full_like(loss, 0.7))
    return bits(loss), bits(gradient)


def bits(tensor: Tensor) -> Tensor:
    """Reinterpret as integers, where NaN equals itself and 0 differs from -0."""
    return tensor.detach().view(BITS[tensor.element_size()]).clone()


def run(device: str, times: int, shapes: list[tuple[int, int]], rows: Rows, limit: float) -> bool:
    """Repeat everything while there is time; return whether nothing differed or failed."""
    backend: Backend = "triton" if device == "cuda" else "torch"
    begun, sound = time.monotonic(), True
    for shape in shapes:
        for dtype in DTYPES:
            for name, kind, trial in trials(backend):
                key = {"loss": name, "target": kind, "dtype": dtype, "shape": list(shape)}
                if rows.here({**key, "stage": "repeat", "differing": 0}):
                    continue
                if time.monotonic() - begun > limit:
                    print(f"no time left for {name}, {dtype}, {shape} and what follows", flush=True)
                    return sound
                row = rows.add(
                    {
                        "stage": "repeat",
                        "times": times,
                        **key,
                        **_outcome(trial, inputs(shape, dtype, kind, device), times),
                    }
                )
                sound &= row.get("differing") == 0
                if row.get("differing") != 0:
                    print({name: row[name] for name in row if name not in rows.origin}, flush=True)
    return sound


def _outcome(trial: Trial, given: tuple[Tensor, Tensor], times: int) -> Row:
    try:
        return {"differing": differing(trial, *given, times)}
    except Exception as error:  # noqa: BLE001 - recorded, and the run continues
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Repeat, write, and exit with 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="few and small, as a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS / "repeat.jsonl", help="appended to")
    options = parser.parse_args()
    shapes = SHAPES[:2] if options.quick else [LARGE, *SHAPES]
    times = 3 if options.quick else options.times
    rows = Rows(options.out, {"device": options.device, **provenance()})
    sound = run(options.device, times, shapes, rows, options.limit)
    print("the same bits every time" if sound else "NOT the same bits every time", flush=True)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
