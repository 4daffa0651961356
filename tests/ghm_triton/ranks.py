"""What the ranks of a process group compute, for `test_distributed.py`, which runs this file.

    python ranks.py FOLDER SIZE DEVICE BACKEND JOB...

starts SIZE processes. Each does the jobs in turn and leaves `FOLDER/rank.pt`: a dictionary from
each job to what it found, or to the traceback of what it raised. The same functions without a group
are the single process with the whole batch.
"""

import copy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ghm_triton import GHMCLoss, GHMRLoss, GHMSoftmaxLoss, GradientDensity, StrengthSchedule
from ghm_triton.reference import RegionCounts

OUTER = 3.7
ROWS, CLASSES, BATCHES, STEPS = 48, 3, 4, 4
ANCHORS = 2 * 12 * 12
POISON = {"nan": torch.nan, "inf": torch.inf}

# A loss and the kind of its target.
LOSSES = {
    "index": (GHMCLoss, "index", {"strength": 0.5}),
    "index positives": (GHMCLoss, "index", {"average": "positives", "strength": 1.0}),
    "dense positives": (GHMCLoss, "dense", {"average": "positives"}),
    "label weight": (GHMCLoss, "weight", {"weighted": True, "normalizer": "bins"}),
    "streaming": (GHMCLoss, "index", {"density": "streaming", "strength": 1.0}),
    "streaming positives": (
        GHMCLoss,
        "dense",
        {"density": "streaming", "average": "positives", "bins": 10},
    ),
    "released": (GHMCLoss, "index", {"ema": "mmdet", "strength": 1.0, "max_weight": 3.0}),
    "schedule": (GHMCLoss, "index", {"strength": StrengthSchedule(1.0, 0.0, 3)}),
    "sum": (GHMCLoss, "index", {"reduction": "sum", "strength": 1.0}),
    "none": (GHMCLoss, "dense", {"reduction": "none", "strength": 1.0}),
    "regression": (GHMRLoss, "deltas", {"strength": 1.0, "loss_weight": 10.0}),
    "regression sum": (GHMRLoss, "deltas", {"reduction": "sum"}),
    "regression streaming": (GHMRLoss, "deltas", {"density": "streaming", "strength": 1.0}),
    "softmax": (GHMSoftmaxLoss, "classes", {"strength": 1.0}),
}


def batch(kind: str, n: int) -> list[Tensor]:
    """Predictions, targets and, for `weight`, label weights of the whole batch `n`."""
    generator = torch.Generator().manual_seed(n)
    # From row to row further out: ranks see different regions.
    spread = torch.linspace(0.2, 6.0, ROWS).unsqueeze(1)
    shape = (ROWS, CLASSES)
    values = torch.randn(shape, generator=generator) * spread
    if kind == "deltas":
        return [values * 0.02, torch.randn(shape, generator=generator) * 0.02]
    index = torch.randint(-1, CLASSES + 1, shape[:1], generator=generator)
    if kind in ("index", "classes"):  # a softmax has a background of its own, the last
        return [values, index.clamp(max=CLASSES - (kind == "classes"))]
    dense = torch.rand(shape, generator=generator)
    if kind == "dense":
        return [values, dense]
    return [values, index, torch.randint(0, 3, shape, generator=generator) / 2]


def share(n: int, rank: int, size: int) -> slice:
    """The rows of a rank: as many each; more and more; none on rank 0; all on the last."""
    if size == 1:
        return slice(None)
    ranks = range(size)
    parts = (
        [1 for _ in ranks],
        [1 + other for other in ranks],
        [min(other, 1) for other in ranks],
        [int(other == size - 1) for other in ranks],
    )[n]
    bounds = [ROWS * sum(parts[:other]) // sum(parts) for other in range(size + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def build(name: str, group: dist.ProcessGroup | None, backend: str) -> nn.Module:
    made, _, options = LOSSES[name]
    return made(process_group=group, backend=backend, **options)


def call(criterion: nn.Module, given: list[Tensor], device: str) -> dict[str, Tensor]:
    """Loss, gradient and state after one call."""
    values, *rest = (tensor.to(device) for tensor in given)
    values.requires_grad_()
    loss = criterion(values, *rest)
    (loss * OUTER).sum().backward()
    state = criterion.density.state_dict()
    found = {"loss": loss.detach(), "slope": values.grad, **state}
    return {key: value.cpu().clone() for key, value in found.items()}


def several_steps(name, group, rank, size, backend, device) -> list[dict[str, Tensor]]:
    """A step with a share of every batch."""
    criterion = build(name, group, backend).to(device)
    seen = []
    for n in range(BATCHES):
        rows = share(n, rank, size)
        seen.append(call(criterion, [t[rows] for t in batch(LOSSES[name][1], n)], device))
    return seen


def poisoned(name, value, group, rank, size, backend, device) -> list[dict[str, Tensor]]:
    """A good step, one with a bad value on the last rank and nothing on rank 0, a good one."""
    criterion = build(name, group, backend).to(device)
    seen = []
    for n in (0, 2, 0):
        given = batch(LOSSES[name][1], n)
        if n == 2:
            given[1][-1] = given[1][-1].clamp(min=0)  # not an ignored row
            given[0][-1, 0] = value
        seen.append(call(criterion, [t[share(n, rank, size)] for t in given], device))
    return seen


def two_groups(rank, size) -> list[dict[str, Tensor]]:
    """Each half of the ranks shares a batch of its own."""
    halves = [range(size // 2), range(size // 2, size)]
    groups = [dist.new_group(half) for half in halves]
    mine = int(rank in halves[1])
    criterion = build("index", groups[mine], "torch")
    rows = share(0, rank % (size // 2), size // 2)
    return [call(criterion, [t[rows] for t in batch("index", mine)], "cpu")]


class Detector(nn.Module):
    """Two anchors a pixel, each with class logits and four deltas; with or without its losses.

    In float64, so that no rounding moves an entry into another unit region.
    """

    def __init__(self, losses: nn.Module | None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.logits = nn.Conv2d(8, 2 * CLASSES, 1)
        self.deltas = nn.Conv2d(8, 2 * 4, 1)
        self.losses = losses
        self.double()

    def forward(self, images: Tensor, *targets: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.trunk(images)
        predictions = (
            head(features).permute(0, 2, 3, 1).reshape(len(images), -1, last)
            for head, last in ((self.logits, CLASSES), (self.deltas, 4))
        )
        if self.losses is None:
            return tuple(predictions)
        return self.losses(*predictions, *targets)


class Losses(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.classify = GHMCLoss(average="positives", strength=1.0, process_group=group)
        self.regress = GHMRLoss(strength=1.0, process_group=group)

    def forward(self, logits: Tensor, deltas: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        # On some rank there may be no positive at all: it calls the loss as the others do.
        positive = (labels >= 0) & (labels < CLASSES)
        return self.classify(logits, labels) + self.regress(deltas[positive], boxes[positive])

    def state(self) -> list[Tensor]:
        return [value.clone() for value in self.state_dict().values()]


def scenes(n: int) -> list[Tensor]:
    """Four images, their labels and box deltas; nine in ten anchors are background."""
    generator = torch.Generator().manual_seed(100 + n)
    images = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES + 1, (4, ANCHORS), generator=generator)
    background = torch.rand(4, ANCHORS, generator=generator) < 0.9
    labels[background] = CLASSES
    labels[3] = CLASSES  # the last rank never has a positive, if it has one image
    return [images, labels, torch.randn(4, ANCHORS, 4, generator=generator, dtype=torch.float64)]


def fit(model, criterion, rank, size, steps=STEPS) -> list[Tensor]:
    """Train on a share of the scenes; the losses. Without `criterion` the model has its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = slice(rank * 4 // size, (rank + 1) * 4 // size)
    losses = []
    for n in range(steps):
        frames, *targets = (tensor[images] for tensor in scenes(n))
        out = model(frames) if criterion else model(frames, *targets)
        loss = criterion(*out, *targets) if criterion else out
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def detector(group, inside: bool) -> tuple[Detector, Losses]:
    torch.manual_seed(7)
    losses = Losses(group)
    return Detector(losses if inside else None), losses


def trained(model: nn.Module, losses: Losses, seen: list[Tensor]) -> dict[str, list[Tensor]]:
    """What is compared: every parameter, the state, and the losses on the way."""
    parameters = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    kept = [p.detach().clone() for p in parameters]
    return {"parameters": kept, "state": losses.state(), "losses": seen}


def alone() -> dict[str, list[Tensor]]:
    model, losses = detector(None, inside=True)
    return trained(model, losses, fit(model, None, 0, 1))


def ddp(inside: bool, group, rank, size) -> dict[str, list[Tensor]]:
    model, losses = detector(group, inside)
    wrapped = DistributedDataParallel(model)
    return trained(model, losses, fit(wrapped, None if inside else losses, rank, size))


def ddp_without_a_group(rank, size) -> tuple[list[Tensor], list[Tensor]]:
    """The state after a step, and after DDP has handed out rank 0's buffers."""
    model, losses = detector(None, inside=True)
    wrapped = DistributedDataParallel(model)
    fit(wrapped, None, rank, size, steps=1)
    own = losses.state()
    wrapped.eval()(*scenes(1))
    return own, losses.state()


def shard(model: Detector, size: int, dtype: torch.dtype | None = None) -> Detector:
    mesh = init_device_mesh("cpu", (size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    fully_shard(model.trunk, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fsdp(group, rank, size) -> dict[str, list[Tensor]]:
    model, losses = detector(group, inside=True)
    return trained(model, losses, fit(shard(model, size), None, rank, size))


def fsdp_mixed(group, rank, size) -> list[Tensor]:
    """The state after one step in bfloat16."""
    model, losses = detector(group, inside=True)
    fit(shard(model.float(), size, torch.bfloat16), None, rank, size, steps=1)
    return losses.state()


def fsdp_checkpoint(group, rank, size, folder: Path) -> list[list[Tensor]]:
    """The losses that follow a checkpoint: of the model itself, and of two that read it."""
    model, _ = detector(group, inside=True)
    fit(shard(model, size), None, rank, size)
    options = StateDictOptions(full_state_dict=True)
    full = get_model_state_dict(model, options=options)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
    # From all of the parameters into a model without memory to begin with.
    with torch.device("meta"):
        empty, _ = detector(group, inside=True)
    shard(empty, size).to_empty(device="cpu")
    for module in empty.losses.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    set_model_state_dict(empty, full, options=options)
    # From the shards in files, into a model that has been somewhere else.
    other, _ = detector(group, inside=True)
    fit(shard(other, size), None, rank, size, steps=1)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    return [fit(each, None, rank, size, steps=2) for each in (model, empty, other)]


def large_counts(group, rank) -> list[int]:
    """What ranks with more entries than float32 counts have together."""
    density = GradientDensity(2, process_group=group)
    counts = RegionCounts(
        torch.tensor([2**40 + rank, rank]), torch.tensor([0.25, 0.5]).double(), torch.tensor(rank)
    )
    gathered = density.gather(counts)
    return [*gathered.regions.tolist(), float(gathered.positives.sum()), int(gathered.invalid)]


def copied(group) -> tuple[list[float], bool]:
    """Losses of a module and of its copy, which may be called as often; whose group it has."""
    criterion = GHMCLoss(process_group=group)
    call(criterion, batch("index", 0), "cpu")
    twin = copy.deepcopy(criterion)
    average = torch.optim.swa_utils.AveragedModel(criterion).module
    losses = [float(call(each, batch("index", 1), "cpu")["loss"]) for each in (criterion, twin)]
    return losses, twin.density.process_group is average.density.process_group is group


def job(name: str, rank: int, size: int, device: str, backend: str, folder: Path):
    group = dist.group.WORLD
    kind, _, what = name.partition(":")
    if kind == "steps":
        return several_steps(what, group, rank, size, backend, device)
    if kind == "poisoned":
        loss, _, value = what.partition(" by ")
        return poisoned(loss, POISON[value], group, rank, size, backend, device)
    return {
        "two groups": lambda: two_groups(rank, size),
        "ddp inside": lambda: ddp(True, group, rank, size),
        "ddp outside": lambda: ddp(False, group, rank, size),
        "ddp without a group": lambda: ddp_without_a_group(rank, size),
        "large counts": lambda: large_counts(group, rank),
        "fsdp": lambda: fsdp(group, rank, size),
        "fsdp mixed": lambda: fsdp_mixed(group, rank, size),
        "fsdp checkpoint": lambda: fsdp_checkpoint(group, rank, size, folder),
        "copied": lambda: copied(group),
    }[kind]()


def main(rank: int, folder: Path, size: int, device: str, backend: str, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    found = {}
    for name in jobs:
        try:
            found[name] = job(name, rank, size, device, backend, folder)
        except Exception:  # noqa: BLE001 - of whatever kind, it is the test's to report
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    where, count, device, backend, *jobs = sys.argv[1:]
    given = (Path(where), int(count), device, backend, jobs)
    # Forked, so that torch is imported once; no thread has been started yet. CUDA cannot be.
    method = "fork" if device == "cpu" else "spawn"
    mp.start_processes(main, args=given, nprocs=int(count), start_method=method)
