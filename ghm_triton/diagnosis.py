"""Diagnosis of a gradient density: its regions, a figure, and problems with remedies."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ghm_triton.reference.density import stream_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ghm_triton.losses.density import GradientDensity

FORGOTTEN = 0.01  # entries per batch; a region with fewer has not been hit for long
UNSURE = 0.5  # relative standard deviation of a weight from which its region is too thin
LOUD = 1000.0  # weight from which half precision overflows and gradients are clipped
COUNTS, WEIGHTS, PAPER = "#7f7f7f", "#1f77b4", "#d62728"


class DensityWarning(UserWarning):
    """The options of a gradient density do not suit the batches it counts."""


class Regions(NamedTuple):
    """The regions of a density by its moving average; all float64 `[regions]`.

    `N` is the sum of the average; with `ema="mmdet"` it is less than the entries of a batch in the
    first steps. `n` is the number of regions in use, with at least 0.01 entries per batch; with
    `ema="mmdet"`, where no region decays, these are all regions ever hit, and the weights may be
    too low.

    Attributes:
        centres: Gradient norm at the centre of the region, in (0, 1).
        entries: Average entries per batch.
        betas: `N / (S_j n)`, the paper's weight; 0 for regions not in use.
        weights: Weight of an entry at the current strength, at most `max_weight`.
        shares: Share of the sum of all weighted gradient norms, with sum 1.
    """

    centres: Tensor
    entries: Tensor
    betas: Tensor
    weights: Tensor
    shares: Tensor


@torch.no_grad()
def regions_of(density: GradientDensity) -> Regions:
    """Compute the regions of a density, on the CPU; synchronises with a GPU.

    Raises:
        ValueError: The density is exact, which keeps no average, or has counted nothing yet.
    """
    if density.method == "exact":
        raise ValueError("density='exact' keeps no average of regions to look at")
    updates = int(density.updates)
    entries = density.smoothed.double().cpu()
    if updates == 0 or not float(entries.sum()) > 0:
        raise ValueError("this density has counted nothing yet: train a step first")
    if density.ema == "debiased":
        entries = entries / (1.0 - density.momentum**updates)
    used, spread = _in_use(density, entries)
    betas = torch.where(used, entries.sum() / torch.where(used, spread, 1.0), 0.0)
    weights = torch.where(used, betas ** density.current_strength().double().cpu(), 0.0)
    if density.max_weight is not None:
        weights = weights.clamp(max=density.max_weight)
    centres = (torch.arange(len(entries), dtype=torch.float64) + 0.5) / len(entries)
    gradient = centres * weights * entries
    return Regions(centres, entries, betas, weights, gradient / gradient.sum())


def _in_use(density: GradientDensity, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Find the regions in use, and the divisor of `N` in the weight of each.

    A region not in use would seem to have as large a share of the gradient as the others: the fewer
    its entries, the larger its weight.
    """
    if density.method == "streaming":
        spread = stream_density(entries, density.bins)
        held = torch.where(entries > 0, spread / density.bins, 0.0)  # by the window
        return _not_forgotten(held), spread
    used = _not_forgotten(entries)
    counted = int(used.sum()) if density.normalizer == "valid_bins" else density.bins
    return used, entries * counted


def _not_forgotten(held: Tensor) -> Tensor:
    used = held >= FORGOTTEN
    # With very few entries in very many regions each has less, and all stay in use.
    return used if bool(used.any()) else held > 0


def problems_of(density: GradientDensity) -> list[str]:
    """List the problems of a density, with remedies.

    - Bins are too thin: the relative standard deviation of the count of a region with `S_j` entries
      per batch is `1 / sqrt(S_j)`, and that of its weight `strength / sqrt(S_j)`. Reported if it
      exceeds a half in more than half of the regions in use.
    - Weights explode: the weight of an entry exceeds 1,000.

    Synchronises with a GPU. A density that has counted nothing has no problems.
    """
    if density.method == "exact" or int(density.updates) == 0:
        return []
    regions = regions_of(density)
    used = regions.entries >= FORGOTTEN
    if not bool(used.any()):
        return []
    strength = float(density.current_strength())
    problems = []
    thin = used & (strength > UNSURE * regions.entries.sqrt())
    if 2 * int(thin.sum()) > int(used.sum()):
        problems.append(
            f"bins are too thin for the batch: {int(thin.sum())} of {int(used.sum())} regions of"
            f" the gradient norm hold too few entries to be weighed by at strength {strength:g}."
            f" Use fewer bins than {density.bins}, larger batches, more momentum than"
            f" {density.momentum:g}, or less strength"
        )
    weights = torch.where(used, regions.weights, 0.0)
    if float(weights.max()) > LOUD:
        largest = int(weights.argmax())
        problems.append(
            "weights explode: an entry of gradient norm"
            f" {float(regions.centres[largest]):.3f} weighs {float(weights[largest]):.3g}."
            f" Use less strength than {strength:g}, or max_weight"
            + (", or ema='debiased'" if density.ema == "mmdet" else "")
        )
    return problems


def warn_of(density: GradientDensity, already: set[str]) -> None:
    """Warn of the problems of a density, once per kind.

    Args:
        density: The density.
        already: The kinds already warned of; updated.
    """
    for problem in problems_of(density):
        kind = problem.partition(":")[0]
        if kind not in already:
            already.add(kind)
            warnings.warn(problem, DensityWarning, stacklevel=2)


def plot_density(density: GradientDensity) -> Figure:
    """Draw the entries, the weights and the shares of the gradient by region.

    Needs matplotlib (`ghm-triton[train]`).

    Returns:
        A new matplotlib figure.

    Raises:
        ValueError: The density is exact, or has counted nothing yet.
    """
    from matplotlib.figure import Figure

    regions = regions_of(density)
    centres, used = regions.centres.numpy(), regions.betas > 0
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    counts, weights, shares = figure.subplots(1, 3)
    counts.bar(centres, regions.entries.numpy(), 0.9 / len(centres), color=COUNTS)
    counts.set(title="entries per batch, on average")
    strength = float(density.current_strength())
    for name, colour, line in (
        (f"strength {strength:g}", WEIGHTS, regions.weights),
        ("strength 1 (paper)", PAPER, regions.betas),
    ):
        seen = torch.where(used, line, torch.nan).numpy()
        weights.plot(centres, seen, color=colour, marker=".", label=name)
    weights.set(title="weight of an entry")
    weights.legend(frameon=False)
    shares.bar(centres, regions.shares.numpy(), 0.9 / len(centres), color=WEIGHTS)
    shares.set(title="share of the gradient")
    for axes in (counts, weights):
        axes.set(yscale="log")
    for axes in (counts, weights, shares):
        axes.set(xlim=(0, 1), xlabel="gradient norm")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
