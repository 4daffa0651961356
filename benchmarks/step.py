"""Time of a whole training step of RetinaNet-R50 with each loss.

    python -m benchmarks.step                      # batches of 8 images of 800x1066, bfloat16
    python -m benchmarks.step --device cpu --quick

torchvision's `retinanet_resnet50_fpn`, channels last, under autocast, with SGD. All losses train
the same network in turns, with the same head and matching of anchors; `ratios` compares them turn
by turn. One JSON line per loss, with provenance.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import figures
from benchmarks.peers import ReleasedGHMC, ReleasedGHMR, dense_targets, focal_entries
from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows
from benchmarks.timing import race

RESULTS = Path(__file__).parent / "results"
CLASSES = 80
BOXES = 7  # per image, as in COCO
KEY = {"task": "retinanet", "stage": "step"}
ANCHORS = ("bce", "bce compiled")


class PlainBCE(nn.Module):
    """Binary cross entropy of anchors that are not ignored, divided by the positives."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of logits `[B, A, C]` and labels `[B, A]` of the head."""
        target = dense_targets(logits, labels.clamp(min=0))
        valid = (labels >= 0).to(logits.dtype)[..., None]
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, target, valid, reduction="sum"
        )
        return loss / positives(labels, logits.shape[-1])


class PlainFocal(nn.Module):
    """torchvision's focal loss of anchors that are not ignored, divided by the positives."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As `PlainBCE`."""
        target = dense_targets(logits, labels.clamp(min=0))
        loss = focal_entries(logits, target) * (labels >= 0)[..., None]
        return loss.sum() / positives(labels, logits.shape[-1])


class Released(nn.Module):
    """MMDetection's GHM-C, once for the whole batch instead of once per pyramid level."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = ReleasedGHMC()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As `PlainBCE`."""
        labels = labels.flatten()
        return self.loss(logits.flatten(0, 1), labels, (labels >= 0).float())


class ReleasedRegression(nn.Module):
    """MMDetection's GHM-R, with the weight of its released configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = ReleasedGHMR()

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Deltas `[P, 4]`."""
        return 10.0 * self.loss(pred, target)


def positives(labels: Tensor, classes: int) -> Tensor:
    """Number of anchors with an object, at least 1, without waiting for the device."""
    return ((labels >= 0) & (labels < classes)).sum().clamp(min=1)


def losses(compiler: str | None) -> Iterator[tuple[str, Any]]:
    """Yield every choice of losses by name."""
    from ghm_triton.detection.models.heads import HeadLosses
    from ghm_triton.detection.models.losses import SmoothL1
    from ghm_triton.detection.training.build import build_losses
    from ghm_triton.detection.training.config import TrainOptions

    yield "bce", HeadLosses(PlainBCE(), SmoothL1())
    yield "ghm", build_losses(TrainOptions())
    if compiler is not None:
        compiled: Any = torch.compile(PlainBCE(), dynamic=False, backend=compiler)
        yield "bce compiled", HeadLosses(compiled, SmoothL1())
    yield "ghm released", HeadLosses(Released(), ReleasedRegression())
    yield "focal", build_losses(TrainOptions(cls_loss="focal", reg_loss="sl1"))
    yield "focal torchvision", HeadLosses(PlainFocal(), SmoothL1())
    if compiler is not None:
        compiled = torch.compile(PlainFocal(), dynamic=False, backend=compiler)
        yield "focal torchvision compiled", HeadLosses(compiled, SmoothL1())


class Bench:
    """A network, one batch and an optimiser."""

    def __init__(self, device: str, batch: int, size: tuple[int, int]) -> None:
        from torchvision.models.detection import retinanet_resnet50_fpn

        from ghm_triton.detection.models.heads import HarmonizedRetinaNetHead
        from ghm_triton.detection.models.registry import channels_last

        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        short, long = sorted(size)
        model = retinanet_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            min_size=short,
            max_size=long,
        )
        anchors = model.anchor_generator.num_anchors_per_location()[0]
        model.head = HarmonizedRetinaNetHead(model.backbone.out_channels, anchors, CLASSES)
        model.head.set_prior(0.01)
        self.device = device
        self.model: Any = channels_last(model.to(device)).train()
        # The rate is so small that every loss has the same network.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.9)
        self.images = [torch.rand(3, *size, device=device) for _ in range(batch)]
        self.targets = [_objects(size, device) for _ in range(batch)]
        self.last = torch.zeros(())

    def step(self, chosen: Any) -> None:
        """Run forward, backward and an update."""
        head = self.model.head
        head.classification_loss, head.regression_loss = chosen.classification, chosen.regression
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            parts = self.model(self.images, self.targets)
        loss = parts["classification"] + parts["bbox_regression"]
        loss.backward()
        self.optimizer.step()
        self.last = loss.detach()


def _objects(size: tuple[int, int], device: str) -> dict[str, Tensor]:
    height, width = size
    sides = torch.rand(BOXES, 2) * 0.4 + 0.1
    corner = torch.rand(BOXES, 2) * (1 - sides)
    boxes = torch.cat([corner, corner + sides], 1) * torch.tensor([width, height, width, height])
    labels = torch.randint(0, CLASSES, (BOXES,))
    return {"boxes": boxes.to(device), "labels": labels.to(device)}


def fitting(device: str, batches: Sequence[int], size: tuple[int, int], chosen: Any) -> Bench:
    """Make a bench with the first of the batch sizes that fits into memory."""
    for batch in batches:
        try:
            bench = Bench(device, batch, size)
            bench.step(chosen)
        except torch.cuda.OutOfMemoryError:
            print(f"batches of {batch} do not fit", flush=True)
        else:
            return bench
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError(f"no batch of {', '.join(map(str, batches))} images fits into memory")


def measure(bench: Bench, field: dict[str, Any], seconds: float, rounds: int) -> Iterator[Row]:
    """Yield a row per loss, with its times or its error."""
    shape = {"batch": len(bench.images), "image_size": list(bench.images[0].shape[1:])}
    key = {**KEY, **shape}
    values: dict[str, float] = {}
    for name, chosen in field.items():
        try:
            bench.step(chosen)
            value = float(bench.last)
            if not math.isfinite(value):
                raise ArithmeticError(f"the loss is {value}")
        except Exception as error:  # noqa: BLE001 - any failure of a peer is its result
            yield key | {"loss": name, "error": describe(error)}
            continue
        values[name] = value
    works = {name: partial(bench.step, field[name]) for name in values}
    timings, errors = race(works, bench.device, seconds, rounds)
    for name, failure in errors.items():
        yield key | {"loss": name, "error": describe(failure)}
    for name, timing in timings.items():
        ratios = {each: timing.ratio(timings[each]) for each in ANCHORS if each in timings}
        row = {"loss": name, "value": values[name], **figures(timing), "ratios": ratios}
        yield key | row


def describe(error: Exception) -> str:
    """Format an error for a row."""
    return f"{type(error).__name__}: {error}"[:500]


def run(options: argparse.Namespace, rows: Rows) -> None:
    """Measure unless the file has the rows already."""
    if any("error" not in row for row in rows.here({**KEY, "loss": "ghm"})):
        print("the training step is measured already", flush=True)
        return
    quick = options.quick
    compiler = "aot_eager" if quick else "inductor" if options.device == "cuda" else None
    try:
        field = dict(losses(compiler))
        batches, size = ((1,), (64, 64)) if quick else ((8, 4, 2, 1), (800, 1066))
        bench = fitting(options.device, batches, size, field["bce"])
    except Exception as error:  # noqa: BLE001 - recorded as the reason
        print(describe(error), flush=True)
        rows.add({**KEY, "loss": "ghm", "error": describe(error)})
        return
    for row in measure(bench, field, options.seconds, rounds=2 if quick else 8):
        rows.add(row)
        print(line(row), flush=True)


def line(row: Row) -> str:
    """Format a row for the terminal."""
    if "error" in row:
        return f"  {row['loss']:<28} {row['error'].splitlines()[0][:120]}"
    text = f"  {row['loss']:<28} {row['median_ms']:>9.2f} ms per step"
    return text + "".join(f" {ratio:>8.4f} x {name}" for name, ratio in row["ratios"].items())


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--seconds", type=float, default=3.0, help="on each loss, about")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds until it is given up")
    parser.add_argument("--quick", action="store_true", help="tiny images, as a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl", help="appended to")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.01
    if options.limit < 1e9:
        faulthandler.dump_traceback_later(options.limit, exit=True)
    run(options, Rows(options.out, {"device": options.device, **provenance()}))


if __name__ == "__main__":
    main()
