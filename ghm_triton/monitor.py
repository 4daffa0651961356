"""TensorBoard logging of gradient densities and positives, for any training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ghm_triton.diagnosis import FORGOTTEN, Regions, problems_of, regions_of
from ghm_triton.losses.density import GradientDensity

# Of the gradient norm: entries already learnt, being learnt, and contradicting their labels.
BANDS = {"easy": (0.0, 0.1), "middle": (0.1, 0.9), "hard": (0.9, 1.0)}
WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile


class Writer(Protocol):
    """The methods of a TensorBoard `SummaryWriter` that are used, PyTorch's or tensorboardX's."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any, /) -> Any:
        """Write a scalar."""

    def add_text(self, tag: str, text_string: str, global_step: Any, /) -> Any:
        """Write Markdown."""

    def add_histogram_raw(self, *args: Any, **kwargs: Any) -> Any:
        """Write a histogram from its counts."""


class DensityMonitor:
    """Logs the moving average of every gradient density of a model.

    For each, under `TAG.NAME/`, where `NAME` is the path of its loss in the model:

    - scalars `share_of_gradient/easy` (gradient norm below 0.1), `/middle` and `/hard` (above 0.9),
      each in [0, 1], with sum 1; likewise `share_of_entries/...`;
    - scalars `strength` and `largest_weight` (of regions with at least 0.01 entries per batch);
    - histograms over the gradient norm, one bar per region: `share_of_gradient`, `weights` and
      `entries_log10`, with bars of height `log10(1 + entries per batch)`;
    - text `problems`: those of `GradientDensity.problems()`, each kind once.

    Logging synchronises with a GPU: log every 20 steps or more rarely, and in one process only. For
    an exact density, which keeps no average, and for one that has counted nothing yet, only the
    strength is logged.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
        >>> monitor = DensityMonitor(SummaryWriter("runs/a"), model)  # doctest: +SKIP
        >>> monitor.log(step)  # in the loop, every so many steps  # doctest: +SKIP

    Args:
        writer: A `SummaryWriter`, or an object with its `add_scalar`, `add_text` and
            `add_histogram_raw`.
        watched: The model, if it contains its losses; else the loss, or several by name.
        tag: Prefix of every tag.

    Raises:
        TypeError: `watched` is neither a module nor modules by name.
        ValueError: It contains no gradient density.
    """

    def __init__(
        self, writer: Writer, watched: nn.Module | Mapping[str, nn.Module], *, tag: str = "ghm"
    ) -> None:
        self.writer, self.tag = writer, tag
        self.densities = find_densities(watched)
        if not self.densities:
            raise ValueError(
                f"there is no GradientDensity in {_kind(watched)}: pass the losses, as in"
                " DensityMonitor(writer, {'classify': classify})"
            )
        self._reported: set[tuple[str, str]] = set()

    def log(self, step: int, *, problems: bool = True) -> None:
        """Write the state of every density.

        Args:
            step: Training step.
            problems: Whether to diagnose problems too; in the first steps some are transient.
        """
        for name, density in self.densities.items():
            group = f"{self.tag}.{name}" if name else self.tag
            strength = float(density.current_strength())
            self.writer.add_scalar(f"{group}/strength", strength, step)
            if not _has_counted(density):
                continue
            self._log_regions(group, regions_of(density), step)
            if problems:
                self._log_problems(group, density, step)

    def _log_regions(self, group: str, regions: Regions, step: int) -> None:
        # A region that has not been hit for long has a weight, but no entries.
        weights = torch.where(regions.entries >= FORGOTTEN, regions.weights, 0.0)
        self.writer.add_scalar(f"{group}/largest_weight", float(weights.max()), step)
        for what, amounts in (("gradient", regions.shares), ("entries", regions.entries)):
            for band, share in shares_by_band(amounts).items():
                self.writer.add_scalar(f"{group}/share_of_{what}/{band}", share, step)
        bars = {
            "share_of_gradient": regions.shares,
            "weights": weights,
            "entries_log10": torch.log10(1 + regions.entries),
        }
        for name, heights in bars.items():
            self._log_bars(f"{group}/{name}", heights, step)

    def _log_bars(self, tag: str, heights: Tensor, step: int) -> None:
        occupied = heights.nonzero().flatten()
        if not len(occupied):
            return
        edges = torch.linspace(0, 1, len(heights) + 1, dtype=torch.float64)
        centres = (edges[:-1] + edges[1:]) / 2
        self.writer.add_histogram_raw(
            tag=tag,
            # To TensorBoard these are the outer edges of the outermost bars that are not empty.
            min=float(edges[occupied[0]]),
            max=float(edges[occupied[-1] + 1]),
            num=float(heights.sum()),
            sum=float((heights * centres).sum()),
            sum_squares=float((heights * centres.square()).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )

    def _log_problems(self, group: str, density: GradientDensity, step: int) -> None:
        for problem in problems_of(density):
            kind = group, problem.partition(":")[0]
            if kind not in self._reported:
                self._reported.add(kind)
                self.writer.add_text(f"{group}/problems", problem, step)


class PositivesMonitor:
    """Logs the distribution of the positives over the classes.

    Scalars of the counts since the last `log`: `TAG/foreground`, the share of positives among all
    valid labels, `N_f / N`; and `TAG/CLASS`, the share of each class among the positives,
    `N_j / N_f`. Their product is the threshold of policy `prior` (arXiv 1909.04868).

    Args:
        writer: A `SummaryWriter`, or an object with its `add_scalar`.
        class_names: In label order, `0..C-1`.
        tag: Prefix of every tag.

    Raises:
        ValueError: There are no classes.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
        >>> monitor = PositivesMonitor(SummaryWriter("runs/a"), ["cat", "dog"])  # doctest: +SKIP
        >>> monitor.count(labels)  # in every step  # doctest: +SKIP
        >>> monitor.log(step)  # every so many steps  # doctest: +SKIP
    """

    def __init__(
        self, writer: Writer, class_names: Sequence[str], *, tag: str = "positives"
    ) -> None:
        self.writer, self.class_names, self.tag = writer, tuple(class_names), tag
        if not self.class_names:
            raise ValueError("class_names is empty")
        self._slots: Tensor | None = None

    def count(self, labels: Tensor) -> None:
        """Count the labels of a batch on their device, without synchronising.

        Args:
            labels: Class indices of any integer dtype and shape: `0..C-1` foreground, `C`
                background, negative ignored.

        Raises:
            TypeError: The dtype is not an integer.
        """
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be class indices, got {labels.dtype}")
        # Ignored, the classes, background, and labels above, which `log` refuses.
        classes = len(self.class_names)
        slots = labels.detach().long().clamp(-1, classes + 1).flatten() + 1
        if self._slots is None:
            self._slots = torch.zeros(classes + 3, dtype=torch.int64, device=slots.device)
        self._slots.scatter_add_(0, slots, torch.ones_like(slots))

    def log(self, step: int) -> None:
        """Write the counts since the last call and reset them; synchronises with a GPU.

        Raises:
            ValueError: A label was above `C`.
        """
        if self._slots is None:
            return
        counted = self._slots.cpu()
        self._slots = None
        if int(counted[-1]):
            classes = len(self.class_names)
            raise ValueError(
                f"{int(counted[-1])} labels were above {classes}, which is background with"
                f" {classes} classes"
            )
        self.log_counts(counted[1:-1], step)

    def log_counts(self, counts: Tensor, step: int) -> None:
        """Write counts made elsewhere, as on several processes.

        Args:
            counts: int64 `[C + 1]`: of each class, then of background. Nothing is written if all
                are 0.
            step: Training step.

        Raises:
            ValueError: The shape is different.
        """
        if tuple(counts.shape) != (len(self.class_names) + 1,):
            expected = len(self.class_names) + 1
            raise ValueError(f"counts must be [{expected}], got {list(counts.shape)}")
        *positives, background = counts.tolist()
        foreground = sum(positives)
        if foreground + background:
            share = foreground / (foreground + background)
            self.writer.add_scalar(f"{self.tag}/foreground", share, step)
        if foreground:
            for name, positive in zip(self.class_names, positives, strict=True):
                self.writer.add_scalar(f"{self.tag}/{name}", positive / foreground, step)


def find_densities(watched: nn.Module | Mapping[str, nn.Module]) -> dict[str, GradientDensity]:
    """Find every gradient density in a module, or in several by name, by the path of its loss.

    Raises:
        TypeError: `watched` is neither a module nor modules by name.
    """
    roots: Mapping[str, nn.Module]
    roots = {"": watched} if isinstance(watched, nn.Module) else watched
    if not isinstance(roots, Mapping) or not all(
        isinstance(root, nn.Module) for root in roots.values()
    ):
        raise TypeError(f"expected a module, or modules by name, got {_kind(watched)}")
    densities: dict[str, GradientDensity] = {}
    for name, root in roots.items():
        for path, module in root.named_modules(prefix=name):
            # A density shared by several losses is listed once.
            if isinstance(module, GradientDensity) and module not in densities.values():
                short = _shorten(path)
                densities[path if short in densities else short] = module
    return densities


def shares_by_band(amounts: Tensor) -> dict[str, float]:
    """Compute the share of each band of `BANDS` in amounts by region.

    A region across the border of two bands is split in proportion.

    Args:
        amounts: `[regions]`, not negative, with a positive sum; the regions divide [0, 1] equally.
    """
    edges = torch.linspace(0, 1, len(amounts) + 1, dtype=torch.float64)
    shares = {}
    for band, (low, high) in BANDS.items():
        overlap = (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(min=0)
        shares[band] = float((amounts * overlap).sum() * len(amounts) / amounts.sum())
    return shares


def _has_counted(density: GradientDensity) -> bool:
    return density.method != "exact" and int(density.updates) > 0 and bool(density.smoothed.any())


def _shorten(path: str) -> str:
    parts = [part for part in path.split(".") if part not in WRAPPERS]
    # `head.classification_loss.loss.density` is named by the part before the generic words.
    for word in ("density", "loss"):
        if parts[-1:] == [word] and (word == "density" or len(parts) > 1):
            parts.pop()
    return ".".join(parts)


def _kind(watched: object) -> str:
    return f"{type(watched).__module__}.{type(watched).__qualname__}"
