"""What a gradient density has come to: its regions in figures, a picture, and what ails it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ghm_triton.reference.density import stream_density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ghm_triton.losses.density import GradientDensity

FORGOTTEN = 0.01  # entries a batch; a region with fewer was not hit for long, and weighs on nobody
UNSURE = 0.5  # standard deviation of a weight, in shares of it, from which its region is too thin
LOUD = 1000.0  # weight from which half precision and the gradient's norm are in danger
COUNTS, WEIGHTS, PAPER = "#7f7f7f", "#1f77b4", "#d62728"


class DensityWarning(UserWarning):
    """A gradient density that does not suit the batches it counts."""


class Regions(NamedTuple):
    """The regions of a density, as its moving average stands; all float64 `[regions]`.

    `N` is the average's sum, as the batches themselves are gone; with `ema="mmdet"` that is less
    than their entries in the first steps. For `n`, the regions occupied in a batch, stand those in
    use, with at least 0.01 entries a batch; under `ema="mmdet"`, where none decays, these are all
    that were ever hit, and the weights may be too low.

    Attributes:
        centres: Of the gradient norm, in (0, 1).
        entries: In a batch, on average.
        betas: `N / (S_j n)`, the paper's weight; 0 for regions that are not in use.
        weights: What an entry weighs at the present strength, and at most `max_weight`.
        shares: Of the sum of all weighted gradient norms, with sum 1.
    """

    centres: Tensor
    entries: Tensor
    betas: Tensor
    weights: Tensor
    shares: Tensor


@torch.no_grad()
def regions_of(density: GradientDensity) -> Regions:
    """The regions of a density, on the CPU; waits for a GPU.

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
    """Which regions are in use, and what `N` is divided by for the weight of each.

    One that is not would seem to take as much of the gradient as the others: the fewer its entries,
    the larger its weight.
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
    # Very few entries in very many regions: each has less than that, and none is forgotten.
    return used if bool(used.any()) else held > 0


def problems_of(density: GradientDensity) -> list[str]:
    """What ails a density, in words with the remedy; nothing for one that is well.

    - Bins are too thin: a region of `S_j` entries a batch knows its count to `1 / sqrt(S_j)` and
      its weight to `strength / sqrt(S_j)`, relatively. More than half of the regions that are in
      use know theirs no better than to a half.
    - Weights explode: an entry weighs more than 1,000.

    Waits for a GPU. A density that has counted nothing is well.
    """
    if density.method == "exact" or int(density.updates) == 0:
        return []
    found = regions_of(density)
    used = found.entries >= FORGOTTEN
    if not bool(used.any()):
        return []
    strength = float(density.current_strength())
    problems = []
    thin = used & (strength > UNSURE * found.entries.sqrt())
    if 2 * int(thin.sum()) > int(used.sum()):
        problems.append(
            f"bins are too thin for the batch: {int(thin.sum())} of {int(used.sum())} regions of"
            f" the gradient norm hold too few entries to be weighed by at strength {strength:g}."
            f" Use fewer bins than {density.bins}, larger batches, more momentum than"
            f" {density.momentum:g}, or less strength"
        )
    weights = torch.where(used, found.weights, 0.0)
    if float(weights.max()) > LOUD:
        place = int(weights.argmax())
        problems.append(
            f"weights explode: an entry of gradient norm {float(found.centres[place]):.3f} weighs"
            f" {float(weights[place]):.3g}. Use less strength than {strength:g}, or max_weight"
            + (", or ema='debiased'" if density.ema == "mmdet" else "")
        )
    return problems


def warn_of(density: GradientDensity, already: set[str]) -> None:
    """Warn of what ails a density, of each kind once.

    Args:
        density: Which.
        already: The kinds that were warned of; added to.
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
        A figure of its own, which a notebook shows and `savefig` writes.

    Raises:
        ValueError: As `regions_of`.
    """
    from matplotlib.figure import Figure

    found = regions_of(density)
    centres, used = found.centres.numpy(), found.betas > 0
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    counts, weights, shares = figure.subplots(1, 3)
    counts.bar(centres, found.entries.numpy(), 0.9 / len(centres), color=COUNTS)
    counts.set(title="entries a batch, on average")
    strength = float(density.current_strength())
    for name, colour, line in (
        (f"strength {strength:g}", WEIGHTS, found.weights),
        ("strength 1 (paper)", PAPER, found.betas),
    ):
        seen = torch.where(used, line, torch.nan).numpy()
        weights.plot(centres, seen, color=colour, marker=".", label=name)
    weights.set(title="weight of an entry")
    weights.legend(frameon=False)
    shares.bar(centres, found.shares.numpy(), 0.9 / len(centres), color=WEIGHTS)
    shares.set(title="share of the gradient")
    for axes in (counts, weights):
        axes.set(yscale="log")
    for axes in (counts, weights, shares):
        axes.set(xlim=(0, 1), xlabel="gradient norm")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
