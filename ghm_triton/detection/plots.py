"""Figures of a trained detector: gradient norms and thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ghm_triton.detection.data import DetectionDataset
from ghm_triton.detection.data.loader import TrainingView, collate
from ghm_triton.detection.models.detector import DenseDetector, Detector
from ghm_triton.evidence import SCORE_BINS, ClassStatistics, ClassThresholds
from ghm_triton.losses import gradient_density

CROSS_ENTROPY, HARMONIZED, FULL = "#7f7f7f", "#1f77b4", "#d62728"


def gradient_norms(detector: Detector, dataset: DetectionDataset, images: int = 64) -> Tensor:
    """Gradient norms `g = |sigmoid(x) - p*|` of all valid entries, on images of a data set.

    Args:
        detector: A RetinaNet or an FCOS, on any device; put into evaluation mode.
        dataset: Labelled images.
        images: Number of images, from the first.

    Returns:
        float32 `[N]` on the CPU, in [0, 1]: positives first, then negatives.

    Raises:
        ValueError: The detector has other heads.
    """
    return torch.cat(gradient_norms_by_target(detector, dataset, images))


def gradient_norms_by_target(
    detector: Detector, dataset: DetectionDataset, images: int = 64
) -> tuple[Tensor, Tensor]:
    """Gradient norms of the positives, `p* = 1`, and of the negatives, `p* = 0`, separately.

    An entry is an anchor (or point) and a class; its target is 1 at the class that the anchor is
    assigned to, regardless of cleanliness. Arguments and errors are those of `gradient_norms`.
    """
    if not isinstance(detector, DenseDetector):
        raise ValueError(
            "gradient norms are of dense sigmoids, as retinanet and fcos have;"
            f" not of {detector.config.architecture}"
        )
    view = TrainingView(dataset, detector.config, (0.0, 0.0))
    device = detector.anchors.device
    positives, negatives = [], []
    detector.eval()
    for start in range(0, min(images, len(dataset)), 8):
        draws = [(i, 0) for i in range(start, min(start + 8, images, len(dataset)))]
        frame, targets = collate([view[draw] for draw in draws])
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.inference_mode():
            logits = detector.outputs(frame.to(device))["cls_logits"].float()
            labels = detector.labels(targets)
        counts = labels >= 0
        one_hot = torch.nn.functional.one_hot(labels[counts], logits.shape[2] + 1)[:, :-1]
        norm = (torch.sigmoid(logits[counts]) - one_hot).abs()
        positives.append(norm[one_hot == 1].cpu())
        negatives.append(norm[one_hot == 0].cpu())
    return torch.cat(positives), torch.cat(negatives)


def plot_gradient_norms(norms: Tensor, strength: float, path: Path, bins: int = 30) -> None:
    """Plot the distribution of gradient norms and their share of the gradient, as in the paper.

    Args:
        norms: `g`, `[N]` in [0, 1].
        strength: Strength that the detector was trained with, drawn beside the paper's 1.
        path: PNG file to write.
        bins: Number of unit regions.
    """
    beta = len(norms) / gradient_density(norms, bins)
    centres = (np.arange(bins) + 0.5) / bins
    region = (norms * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(region, minlength=bins).numpy()
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(centres, np.maximum(counts, 0.5), 0.9 / bins, color=CROSS_ENTROPY)
    left.set(yscale="log", ylim=(0.5, None), ylabel="entries", title="before: gradient norms")
    for name, colour, weight in (
        ("cross entropy", CROSS_ENTROPY, torch.ones_like(beta)),
        (f"harmonized, strength {strength:g}", HARMONIZED, beta**strength),
        ("harmonized, strength 1 (paper)", FULL, beta),
    ):
        share = torch.zeros(bins).index_add_(0, region, weight * norms)
        share = torch.where(share > 0, share / share.sum(), torch.nan)  # not of an empty region
        right.plot(centres, share.numpy(), color=colour, label=name, marker=".")
    right.set(yscale="log", ylabel="share of the total gradient", title="after: contributions")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set(xlim=(0, 1), xlabel="gradient norm  g = |p - p*|")
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_thresholds(statistics: ClassStatistics, thresholds: ClassThresholds, path: Path) -> None:
    """Plot the held-out scores of true and false detections per class, with the thresholds.

    Args:
        statistics: The histograms.
        thresholds: The thresholds.
        path: PNG file to write.
    """
    classes = len(statistics.class_names)
    columns = min(classes, 5)
    rows = -(-classes // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    coarse = SCORE_BINS // 8
    centres = (np.arange(coarse) + 0.5) / coarse
    for j, (entry, axes) in enumerate(zip(thresholds.entries, grid.flat, strict=False)):
        for histogram, colour, name in (
            (statistics.negative_scores[j], FULL, "false"),
            (statistics.positive_scores[j], HARMONIZED, "true"),
        ):
            height = histogram.reshape(coarse, -1).sum(1)
            axes.bar(centres, height, 1 / coarse, color=colour, alpha=0.55, label=name)
        axes.axvline(entry.threshold, color="black", linewidth=1.2)
        axes.set(yscale="symlog", xlim=(0, 1), ylim=(0, None))
        axes.set_title(f"{entry.name}: {entry.threshold:.3f}", fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[classes:]:
        axes.set_visible(False)
    grid[0, 0].legend(fontsize=7, frameon=False)
    figure.supxlabel("score", fontsize=9)
    figure.supylabel("held-out detections", fontsize=9)
    figure.suptitle(f"thresholds by policy {thresholds.policy}", fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
