"""Signal and noise in the gradient of each loss, to explain why full-strength GHM learns slowly.

Trains one small RetinaNet with plain cross entropy, partially. Then every loss is evaluated on the
same network and the same batches, so that only the weights of the entries differ. Measures:

- `agreement`: mean inner product of the gradients (of everything but the head's last layers) of
  two batches, over their mean square: 1 for equal gradients, 0 for noise.
- `cls_to_reg`: norm of the classification's mean gradient over that of smooth L1's.
- `rms_to_reg`: root mean square of the classification's gradients over that of smooth L1's, the
  ratio of the optimiser's second moments.
- `positives`, `easy`, `hard`: shares of the gradient of the logits on positives, on entries with
  `g < 0.1` and with `g > 0.9`.
- `thin`: share of the occupied unit regions with fewer than 16 entries per batch (the relative
  error of their weight is above a quarter).

One JSON line per loss, with provenance.

    python -m benchmarks.gradient_signal
    python -m benchmarks.gradient_signal --data digits:noise=0.3 --steps 1600
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, latest, markdown, read
from benchmarks.trainings import trained, training_parser
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import Batch, StepSampler, TrainingView, training_loader
from ghm_triton.detection.models.losses import SmoothL1
from ghm_triton.detection.models.retinanet import RetinaNetDetector
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.losses import focal_loss, ghm_c_loss
from ghm_triton.losses.density import GradientDensity

RESULTS = Path(__file__).parent / "results" / "gradient_signal.jsonl"
KEY = ("data", "train_split", "image_size", "channels", "steps", "seed", "batch_size", "loss")
BATCHES = 32
WARM = 8  # first batches, which only move the averages
THIN = 16
EASY, HARD = 0.1, 0.9
Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure, write and print."""
    parser = training_parser(__doc__.splitlines()[0], RESULTS)
    parser.set_defaults(steps=400)
    arguments = parser.parse_args()
    if not arguments.table:
        rows = Rows(arguments.out, provenance())
        for seed in arguments.seeds:
            head = {
                "data": arguments.data.rsplit("/", 1)[-1],
                "train_split": arguments.train_split,
                "image_size": list(arguments.image_size),
                "channels": arguments.channels,
                "steps": arguments.steps,
                "seed": seed,
                "batch_size": arguments.batch_size,
            }
            for name, found in look(arguments, seed).items():
                rows.add({**head, "loss": name, **found})
    print(table(latest(read(arguments.out), KEY)))


def losses() -> dict[str, Loss]:
    """Return the losses to compare, each harmonized one with its own moving average."""
    harmonized = {
        "GHM-C, strength 0.25": {"strength": 0.25},
        "GHM-C, strength 0.5": {"strength": 0.5},
        "GHM-C, strength 1": {"strength": 1.0},
        "GHM-C, strength 1, 10 regions": {"strength": 1.0, "bins": 10},
        "GHM-C, strength 1, 5 regions": {"strength": 1.0, "bins": 5},
        "GHM-C, strength 1, momentum 0.99": {"strength": 1.0, "momentum": 0.99},
        "GHM-C, strength 1, weights up to 1": {"strength": 1.0, "max_weight": 1.0},
    }
    found: dict[str, Loss] = {
        "cross entropy": partial(ghm_c_loss, strength=0.0, average="positives"),
        "focal": focal_loss,
    }
    for name, options in harmonized.items():
        found[name] = _with_average(**options)
    found["GHM-C, strength 1, a density a level"] = by_level(strength=1.0)
    return found


def _with_average(bins: int = 30, momentum: float = 0.75, **options: Any) -> Loss:
    state = GradientDensity(bins, momentum, **options)
    return partial(ghm_c_loss, state=state, average="positives")


def by_level(strength: float) -> Loss:
    """Make GHM-C with a separate density per level of the pyramid.

    `128 x 128` pixels have `16^2 + 8^2 + 4^2` locations with nine anchors.
    """
    states: dict[int, GradientDensity] = {}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        places = logits.shape[1]
        sizes = [places * 16 // 21, places * 4 // 21, places // 21]
        positives = ((labels >= 0) & (labels < logits.shape[2])).sum().clamp(min=1)
        parts = []
        levels = zip(logits.split(sizes, 1), labels.split(sizes, 1), strict=True)
        for level, (part, own) in enumerate(levels):
            state = states.setdefault(level, GradientDensity(30, 0.75, strength))
            parts.append(ghm_c_loss(part, own, state=state, reduction="sum"))
        return torch.stack(parts).sum() / positives

    return loss


@dataclass
class Gradients:
    """Sums over batches of the gradients of one loss."""

    total: Tensor | None = None
    squares: float = 0.0
    batches: int = 0

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of one batch."""
        self.total = gradient.double() if self.total is None else self.total + gradient
        self.squares += float(gradient.double().square().sum())
        self.batches += 1

    def agreement(self) -> float:
        """Mean inner product of two batches, over the mean square of one."""
        pairs = (float(self._sum().square().sum()) - self.squares) / (
            self.batches * (self.batches - 1)
        )
        return pairs / (self.squares / self.batches)

    def mean_norm(self) -> float:
        """Norm of the mean over batches."""
        return float(self._sum().norm()) / self.batches

    def rms(self) -> float:
        """Root of the mean square norm."""
        return (self.squares / self.batches) ** 0.5

    def _sum(self) -> Tensor:
        if self.total is None:
            raise ValueError("no batch was taken in")
        return self.total


def look(arguments: argparse.Namespace, seed: int) -> dict[str, Row]:
    """Measure every loss on one partially trained network; see the module."""
    detector, batches = _half_trained(arguments, seed)
    trunk = [p for name, p in detector.named_parameters() if not _is_last(name)]
    compared = losses()
    gradients = {name: Gradients() for name in compared}
    boxes = Gradients()
    found_shares: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    for number, (images, targets) in enumerate(batches):
        logits, deltas = detector.raw(images)
        labels = detector.labels(targets)
        for name, loss in compared.items():
            value = loss(logits, labels)
            if number < WARM:
                continue
            (slope,) = torch.autograd.grad(value, logits, retain_graph=True)
            found_shares[name].append(shares(slope, logits, labels))
            gradients[name].add(_flat(logits, trunk, slope))
        if number >= WARM:
            outputs = {"cls_logits": logits, "bbox_regression": deltas}
            matches = [detector.match(detector.anchors, target) for target in targets]
            anchors = [detector.anchors] * len(targets)
            value = SmoothL1()(*detector.head.pairs(targets, outputs, anchors, matches)[:2])
            boxes.add(_flat(value, trunk))
    return {
        name: {
            "agreement": found.agreement(),
            "cls_to_reg": found.mean_norm() / boxes.mean_norm(),
            "rms_to_reg": found.rms() / boxes.rms(),
            **{
                key: sum(x[key] for x in found_shares[name]) / len(found_shares[name])
                for key in found_shares[name][0]
            },
        }
        for name, found in gradients.items()
    }


def _half_trained(
    arguments: argparse.Namespace, seed: int
) -> tuple[RetinaNetDetector, Iterator[Batch]]:
    options = TrainOptions(
        data=arguments.data,
        train_split=arguments.train_split,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=seed,
        cls_loss="ce",
        reg_loss="sl1",
        guided_loss=False,
    )
    saved = trained(options, image_size=arguments.image_size, channels=arguments.channels)
    dataset, detector = open_dataset(options.data, options.train_split), saved.detector()
    if not isinstance(detector, RetinaNetDetector):
        raise TypeError(f"signal looks at a RetinaNet, not at {type(detector).__name__}")
    steps = options.steps, options.steps + WARM + BATCHES
    sampler = StepSampler(len(dataset), options.batch_size, seed, *steps, 0, 1)
    view = TrainingView(dataset, saved.config, (0.0, 0.0))
    return detector.eval(), iter(training_loader(view, sampler, 0))


def _is_last(name: str) -> bool:
    return "cls_logits" in name or "bbox_reg." in name


def _flat(value: Tensor, parameters: list[Tensor], slope: Tensor | None = None) -> Tensor:
    found = torch.autograd.grad(value, parameters, slope, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if part is None else part).flatten()
            for parameter, part in zip(parameters, found, strict=True)
        ]
    )


def shares(slope: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of the logits' gradient `[B, A, C]`, and of thin regions; see the module."""
    counted = labels >= 0
    one_hot = torch.nn.functional.one_hot(labels[counted], logits.shape[2] + 1)[:, :-1]
    norms = (logits[counted].detach().sigmoid() - one_hot).abs()
    heard = slope[counted].abs()
    total = heard.sum()
    regions = torch.bincount((norms.flatten() * 30).long().clamp(max=29), minlength=30)
    occupied = regions[regions > 0]
    return {
        "positives": float(heard[one_hot == 1].sum() / total),
        "easy": float(heard[norms < EASY].sum() / total),
        "hard": float(heard[norms > HARD].sum() / total),
        "thin": float((occupied < THIN).double().mean()),
    }


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    names = ("agreement", "cls_to_reg", "rms_to_reg", "positives", "easy", "hard", "thin")
    head = ("data", "steps", "seed", "loss")
    return markdown(
        {name: row[name] for name in head} | {name: f"{row[name]:.3g}" for name in names}
        for row in rows
    )


if __name__ == "__main__":
    main()
