"""What two processes with a share of the batch each compute, for `test_losses.py`, which runs this.

    python loss_ranks.py FOLDER

leaves `FOLDER/rank.pt`: by case and share, the loss and the gradients of that rank's rows. Without
a group the same functions are the single process with the whole batch.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.losses import Focal
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.config import TrainOptions

ROWS, CLASSES, SIZE = 24, 3, 2
# Rank 0 has half of the rows, a quarter, and none.
BOUNDS = {"half": 12, "quarter": 6, "none": 0}
# Detector, classifier, options.
CASES = {
    "guided sl1": ("retinanet", "sigmoid", {"reg_loss": "sl1"}),
    "guided asl1": ("retinanet", "sigmoid", {"reg_loss": "asl1", "average": "valid"}),
    "guided iou": (
        "retinanet",
        "sigmoid",
        {"reg_loss": "iou", "cls_loss": "ce", "guided_loss": True},
    ),
    "guided giou": ("fcos", "sigmoid", {"reg_loss": "giou"}),
    "guided focal": (
        "retinanet",
        "sigmoid",
        {"cls_loss": "focal", "reg_loss": "sl1", "guided_loss": True},
    ),
    "focal": ("fcos", "sigmoid", {"cls_loss": "focal", "reg_loss": "giou"}),
    "softmax": ("faster-rcnn", "softmax", {"cls_loss": "ce", "reg_loss": "sl1"}),
}


def batch() -> list[Tensor]:
    """Logits, labels, predicted and true boxes of the whole batch."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, CLASSES + 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES + 1, (ROWS,), generator=generator)
    corners = torch.rand(2, ROWS, 2, generator=generator, dtype=torch.float64)
    sides = 0.5 + torch.rand(2, ROWS, 2, generator=generator, dtype=torch.float64)
    return [logits, labels, *torch.cat([corners, corners + sides], dim=2)]


def learnt(case: str, group: dist.ProcessGroup | None, rows: slice) -> dict[str, Tensor]:
    """The loss of some rows, and its gradients."""
    architecture, classifier, chosen = CASES[case]
    options = TrainOptions(**chosen)
    losses = build_losses(options, group, architecture=architecture, classifier=classifier)
    logits, labels, predicted, expected = (tensor[rows].clone() for tensor in batch())
    logits = logits if classifier == "softmax" else logits[:, :CLASSES].contiguous()
    leaves = logits.requires_grad_(), predicted.requires_grad_()
    positive = (labels >= 0) & (labels < CLASSES)
    terms = (
        losses.classification(logits, labels),
        losses.regression(predicted[positive], expected[positive]),
    )
    if losses.guide is not None:
        terms = losses.guide.terms(*terms)
    total = torch.add(*terms)
    slopes = torch.autograd.grad(total, leaves)
    return {"loss": total.detach(), "logits": slopes[0], "boxes": slopes[1]}


def soft_focal(group: dist.ProcessGroup | None, rows: slice) -> dict[str, Tensor]:
    """The same of labels between 0 and 1, some of which do not count."""
    logits, labels, *_ = (tensor[rows].clone() for tensor in batch())
    target = torch.sigmoid(3 * logits)
    weight = (labels >= 0).double().unsqueeze(1)
    loss = Focal(process_group=group)(logits.requires_grad_(), target, weight)
    (slope,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.detach(), "logits": slope}


def own(architecture: str, group: dist.ProcessGroup | None) -> Detector:
    """A detector that has losses of its own beside those that it is given."""
    config = DetectorConfig(("a", "b", "c"), (64, 64), architecture=architecture, channels=16)
    options = TrainOptions(reg_loss="giou" if architecture == "fcos" else "sl1")
    return build_detector(config, build_losses(options, group, architecture=architecture))


def centerness(group: dist.ProcessGroup | None, rows: slice) -> dict[str, Tensor]:
    logits, labels, *_ = (tensor[rows].clone() for tensor in batch())
    logits.requires_grad_()
    points = labels >= 0
    goal = torch.sigmoid(logits.detach()[points, 1])
    loss = own("fcos", group).head.centre_loss(logits[points, 0], goal)
    (slope,) = torch.autograd.grad(loss, logits)
    return {"loss": loss.detach(), "logits": slope}


def proposals(group: dist.ProcessGroup | None, rows: slice) -> dict[str, Tensor]:
    _, labels, predicted, expected = (tensor[rows].clone() for tensor in batch())
    positive = labels >= 0
    predicted.requires_grad_()
    loss = own("faster-rcnn", group).rpn.box_loss(predicted[positive], expected[positive])
    (slope,) = torch.autograd.grad(loss, predicted)
    return {"loss": loss.detach(), "boxes": slope}


ALONE = {"soft focal": soft_focal, "centerness": centerness, "proposals": proposals}


def found(case: str, group: dist.ProcessGroup | None, rows: slice) -> dict[str, Tensor]:
    return ALONE[case](group, rows) if case in ALONE else learnt(case, group, rows)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=60),
    )
    rows = {name: (slice(0, at), slice(at, ROWS))[rank] for name, at in BOUNDS.items()}
    results = {
        (case, name): found(case, dist.group.WORLD, rows[name])
        for case in [*CASES, *ALONE]
        for name in BOUNDS
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    mp.start_processes(main, args=(Path(sys.argv[1]),), nprocs=SIZE, start_method="fork")
