"""The problems that losses are timed on, and the losses timed on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from ghm_triton import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 80
COLUMNS = {"classification": CLASSES, "regression": 4, "softmax": CLASSES + 1}
POSITIVES = 1e-3  # of the rows; a detector's anchors are as unbalanced
SMALL = 2**23  # entries up to which the time of launching may count
QUICK = 20_000  # entries of a run that only shows that it runs
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A problem of one size, dtype and kind of target."""

    task: str  # classification, regression or softmax
    entries: int  # minimum; rounded up to whole rows
    dtype: str
    target: str  # index or dense
    device: str

    @property
    def key(self) -> dict[str, Any]:
        """Fields that identify its rows."""
        return {name: getattr(self, name) for name in ("task", "entries", "dtype", "target")}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the predictions."""
        columns = COLUMNS[self.task]
        return -(-self.entries // columns), columns

    @property
    def logits_bytes(self) -> int:
        """Bytes of one set of predictions."""
        rows, columns = self.shape
        return rows * columns * DTYPES[self.dtype].itemsize

    @property
    def dynamic(self) -> bool:
        """Whether peers are compiled once for all small sizes instead of for this size.

        Compiling takes longer than measuring, and small sizes are bound by launching.
        """
        return self.entries <= SMALL

    @property
    def thorough(self) -> bool:
        """Whether peers other than the plain losses are compiled too."""
        return self.entries in (QUICK, 2**26)

    def tensors(self, seed: int) -> tuple[Tensor, Tensor]:
        """Make predictions that require a gradient, and targets."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make: dict[str, Any] = {"device": self.device, "generator": generator}
        dtype = DTYPES[self.dtype]
        pred = torch.randn(self.shape, **make)
        if self.task == "regression":
            target = torch.randn(self.shape, **make)
            pred = target + 0.1 * pred
            return pred.to(dtype).requires_grad_(), target.to(dtype)
        if self.task == "classification":
            pred = pred.mul_(2).sub_(4)
        index = self._classes(make)
        target = index if self.target == "index" else peers.dense_targets(pred, index).to(dtype)
        return pred.to(dtype).requires_grad_(), target

    def _classes(self, make: dict[str, Any]) -> Tensor:
        rows = self.shape[0]
        index = torch.randint(0, CLASSES, (rows,), **make)
        return index.masked_fill_(torch.rand(rows, **make) >= POSITIVES, CLASSES)

    def traffic(self, loss: str) -> int | None:
        """Minimum traffic of forward and backward in bytes per entry; None for a peer.

        A harmonized loss reads predictions and targets to count, reads them again to form loss and
        gradient, and writes the gradient; focal loss reads them once. Class indices, a few bytes a
        row, are left out.
        """
        size = DTYPES[self.dtype].itemsize
        read = size * (2 if self.target == "dense" else 1)
        name, _, backend = loss.partition(" ")
        if backend not in ("triton", "torch"):
            return None
        return size + (read if name == "focal" else 2 * read)


@dataclass(frozen=True)
class Contender:
    """A named loss.

    Attributes:
        make: Makes a new one on the device.
        dense: Whether it always gets dense targets.
        compiled: Whether it is passed through `torch.compile`.
        capturable: Whether a CUDA graph can capture it: it never waits for the device.
    """

    name: str
    make: Callable[[], Loss]
    dense: bool = False
    compiled: bool = False
    capturable: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is a loss of this library, uncompiled."""
        return not self.compiled and self.name.endswith((" triton", " torch"))


def contenders(case: Case, compiler: str | None) -> list[Contender]:
    """List the losses of a case, the most important first.

    The harmonized ones are configured like the released code, so that their values agree.

    Args:
        case: The problem.
        compiler: Backend of `torch.compile`, or None to leave compiled losses out.
    """
    names = {"classification": _classification, "regression": _regression, "softmax": _softmax}
    made: list[Contender] = []
    for contender, compilable in names[case.task](case):
        made.append(contender)
        if compilable and compiler is not None:
            name = f"{contender.name} compiled"
            make = partial(_compiled, contender.make, compiler, case.dynamic)
            made.append(replace(contender, name=name, make=make, compiled=True))
    return made


def _compiled(make: Callable[[], Loss], compiler: str, dynamic: bool) -> Loss:
    compiled: Loss = torch.compile(make(), dynamic=dynamic, backend=compiler)
    return compiled


Offer = tuple[Contender, bool]  # and whether to compile it as well


def _classification(case: Case) -> Iterator[Offer]:
    yield from _ours("ghm_c", GHMCLoss, case)
    if case.target == "index":
        yield Contender("bce one-hot", lambda: peers.one_hot_bce), True
    yield Contender("bce", lambda: peers.bce, dense=True), True
    yield Contender("ghm_c released", peers.ReleasedGHMC, capturable=False), False
    yield from _ours("focal", FocalLoss, case)
    yield from _windows(case)
    if case.target == "index":
        yield Contender(f"{peers.FOCAL} one-hot", lambda: peers.one_hot_focal), case.thorough
    else:
        yield Contender(peers.FOCAL, lambda: peers.focal), case.thorough


def _windows(case: Case) -> Iterator[Offer]:
    """Yield the paper's sliding window where it does not take too long."""
    if case.device == "cuda" and case.thorough:
        for density in ("streaming", "exact"):
            make = _on(case, GHMCLoss, backend="triton", strength=1.0, density=density)
            yield Contender(f"ghm_c triton {density}", make, capturable=False), False


def _regression(case: Case) -> Iterator[Offer]:
    yield from _ours("ghm_r", GHMRLoss, case)
    yield Contender("smooth_l1", nn.SmoothL1Loss), True
    yield Contender("ghm_r released", peers.ReleasedGHMR, capturable=False), False


def _softmax(case: Case) -> Iterator[Offer]:
    yield from _ours("ghm_softmax", GHMSoftmaxLoss, case)
    yield Contender("cross_entropy", nn.CrossEntropyLoss), True


def _ours(name: str, module: type[nn.Module], case: Case) -> Iterator[Offer]:
    released: dict[str, Any] = {"ema": "mmdet", "normalizer": "valid_bins", "strength": 1.0}
    options = {} if module is FocalLoss else released
    if case.device == "cuda":
        yield (
            Contender(f"{name} triton", _on(case, module, backend="triton", **options)),
            case.thorough,
        )
    # The reference allocates as it goes and may look at values: it is no candidate for a graph.
    make = _on(case, module, backend="torch", **options)
    yield Contender(f"{name} torch", make, capturable=False), case.thorough


def _on(case: Case, module: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: module(**options).to(case.device)


TASKS: tuple[tuple[str, str], ...] = (
    ("classification", "index"),
    ("classification", "dense"),
    ("regression", "dense"),
    ("softmax", "index"),
)
USUAL = ("float32", "bfloat16")
Plan = tuple[tuple[tuple[int, ...], tuple[str, ...], tuple[tuple[str, str], ...]], ...]
# Sizes, dtypes and tasks; those that decide first, so that a run that is cut off has them.
PLANS: dict[str, Plan] = {
    "cuda": (
        ((2**26, 2**25, 2**28), USUAL, TASKS[:1]),
        ((2**26, 10**6, SMALL, 10**5), USUAL, TASKS),
        ((2**26,), ("float16",), TASKS),
        ((2**28, 2**25), USUAL, TASKS),
    ),
    "cpu": (((10**6,), USUAL[:1], TASKS),),
}


def plan(
    device: str, sizes: Sequence[int] | None = None, dtypes: Sequence[str] | None = None
) -> list[Case]:
    """List every problem once, the most important first.

    Args:
        device: `cuda` or `cpu`.
        sizes: Numbers of entries; None for those of the device.
        dtypes: Dtypes; None for those of the device.
    """
    order = PLANS[device]
    if sizes or dtypes:
        usual = {each for part in order for each in part[0]}
        order = ((tuple(sizes or sorted(usual)), tuple(dtypes or USUAL), TASKS),)
    cases = (
        Case(task, entries, dtype, target, device)
        for some, of, tasks in order
        for entries in some
        for dtype in of
        for task, target in tasks
    )
    return list(dict.fromkeys(cases))
