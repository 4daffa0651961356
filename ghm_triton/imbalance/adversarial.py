"""A-Fast-RCNN: adversaries that make the features of objects harder to classify.

Wang, Shrivastava and Gupta, 'A-Fast-RCNN: Hard Positive Generation via Adversary for Object
Detection' (CVPR 2017; arXiv 1704.03414). One network (ASDN) learns which cells of an object's
pooled features to drop, another (ASTN) how to rotate them, so that the detector fails. Both are
used in training only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

KINDS = ("none", "asdn", "astn", "asdn+astn")
CELLS = 7  # along a side of the pooled features, d
WINDOW = CELLS // 3  # cells along a side of the dropped window, d/3
TOP, DROPPED = 20, 15  # cells: the likeliest, and how many of them are dropped
LEAST_FALL = 0.1  # of the true class's probability, for a mask to be a training target
JOINT_WEIGHT = 0.0025
MET = 0.5  # share of the objects that are made harder
MOST_DEGREES = 10.0
GROUPS = 4  # of channels, each rotated by an angle of its own

# Maps pooled features [R, channels, 7, 7] to the probability of the true classes, [R].
Probability = Callable[[Tensor], Tensor]


class ASDN(nn.Module):
    """Adversarial Spatial Dropout Network: predicts which cells to drop.

    Four 3x3 convolutions with ReLU, as wide as the features (256 for a ResNet's pyramid, as in
    the paper), and a 3x3 convolution to one map: `[R, channels, 7, 7]` to logits `[R, 7, 7]`.

    Args:
        channels: Of the pooled features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute the logits of dropping each cell."""
        logits: Tensor = self.layers(pooled).float().squeeze(1)
        return logits


class ASTN(nn.Module):
    """Adversarial Spatial Transformer Network: rotates groups of channels.

    A localisation network of three fully connected layers predicts an angle of at most 10 degrees
    in either direction for each of four groups, from `[R, channels, 7, 7]`. Its gradient is
    reversed, so that it maximises the loss that the detector minimises. Initial angles are 0.

    Args:
        channels: Of the pooled features, a multiple of 4.

    Raises:
        ValueError: `channels` is not a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {channels}")
        last = nn.Linear(4 * channels, GROUPS)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.localisation = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * CELLS**2, 4 * channels),
            nn.ReLU(),
            nn.Linear(4 * channels, 4 * channels),
            nn.ReLU(),
            last,
        )

    def angles(self, pooled: Tensor) -> Tensor:
        """Compute the angles in radians, `[R, 4]`; no gradient reaches the features."""
        logits: Tensor = self.localisation(pooled.detach()).float()
        return math.radians(MOST_DEGREES) * torch.tanh(logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """Rotate the features."""
        return rotate_groups(pooled, reverse_gradient(self.angles(pooled)))


class Adversary(nn.Module):
    """ASDN, ASTN or both in sequence, between a detector's pooling and its head.

    In the first `start` batches ASDN learns by binary cross entropy which window of `d/3 x d/3`
    cells most lowers the true class's probability when dropped, and the detector sees unchanged
    features. Then both are trained jointly: 15 cells drawn from ASDN's 20 likeliest are zeroed, and
    ASDN learns, with a weight of 0.0025, from the masks that lower the probability by more than
    0.1; ASTN rotates the result.

    Half of the objects, drawn anew for each batch, are left unchanged. Background is never changed:
    if every object were, the detector would learn that holes indicate an object, and miss objects
    without any. (The released code leaves every other image unchanged, for the same reason.)

    Args:
        channels: Of the pooled features.
        kind: `asdn`, `astn` or `asdn+astn`.
        start: Batches before joint training, at least 0.
        share: Share of the objects that are made harder, in (0, 1].

    Raises:
        ValueError: `kind` is unknown, `start` is negative, `share` is not in (0, 1], or for
            ASTN `channels` is not a multiple of 4.
    """

    batches: Tensor

    def __init__(
        self, channels: int, kind: str = "asdn+astn", start: int = 0, share: float = MET
    ) -> None:
        super().__init__()
        if kind not in KINDS[1:]:
            raise ValueError(f"kind must be one of {', '.join(KINDS[1:])}; got {kind!r}")
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        self.start, self.share = start, share
        self.asdn = ASDN(channels) if "asdn" in kind else None
        self.astn = ASTN(channels) if "astn" in kind else None
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, pooled: Tensor, probability: Probability) -> tuple[Tensor, Tensor]:
        """Make the features of a batch harder.

        Args:
            pooled: Features of the positive regions, `[R, channels, 7, 7]`.
            probability: The detector's probability of the true classes; called without gradient.

        Returns:
            The features for the detector to train on, of the shape of `pooled`; and ASDN's loss, a
            scalar whose gradient reaches neither the detector nor the features.
        """
        joint = int(self.batches) >= self.start
        self.batches += 1
        # Every rank of a distributed run needs a gradient of every parameter.
        loss = torch.stack([p.sum() for p in self.parameters()]).sum().float() * 0.0
        if not len(pooled):
            return pooled, loss
        if not joint:
            return pooled, loss + self._window_loss(pooled.detach(), probability)
        met = torch.rand(len(pooled), 1, 1, device=pooled.device) < self.share
        if self.asdn is not None:
            logits = self.asdn(pooled.detach())
            hidden = draw_cells(logits.detach()) & met
            harder = hide(pooled, hidden)
            loss = loss + JOINT_WEIGHT * _joint_loss(
                logits, hidden, pooled.detach(), harder.detach(), probability
            )
            pooled = harder
        if self.astn is not None:
            pooled = torch.where(met.unsqueeze(1), self.astn(pooled), pooled)
        return pooled, loss

    def _window_loss(self, pooled: Tensor, probability: Probability) -> Tensor | float:
        if self.asdn is None:
            return 0.0
        logits = self.asdn(pooled)
        window = hardest_windows(pooled, probability).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, window)


def _joint_loss(
    logits: Tensor, hidden: Tensor, pooled: Tensor, harder: Tensor, probability: Probability
) -> Tensor:
    """BCE of the masks that lower the probability enough, over all their cells; 0 without any.

    The empty mask of an unchanged object never does.
    """
    with torch.no_grad():
        hurt = probability(pooled) - probability(harder) > LEAST_FALL
    target = hidden.to(logits.dtype)
    entries = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    return torch.where(hurt, entries, 0.0).sum() / hurt.sum().clamp(min=1)


def hide(pooled: Tensor, hidden: Tensor) -> Tensor:
    """Zero the cells `hidden`, bool `[R, 7, 7]`, of features `[R, channels, 7, 7]`."""
    return pooled.masked_fill(hidden.unsqueeze(1), 0.0)


@torch.no_grad()
def hardest_windows(pooled: Tensor, probability: Probability) -> Tensor:
    """Find the window of each region whose removal most lowers its true class's probability.

    Args:
        pooled: `[R, channels, 7, 7]`.
        probability: Called once for each position of the window.

    Returns:
        bool `[R, 7, 7]`: true in that window (of equals, the first by rows, then columns).
    """
    starts = range(CELLS - WINDOW + 1)
    windows = torch.zeros(len(starts) ** 2, CELLS, CELLS, dtype=torch.bool, device=pooled.device)
    for mask, (y, x) in zip(windows, itertools.product(starts, starts), strict=True):
        mask[y : y + WINDOW, x : x + WINDOW] = True
    left = torch.stack(
        [probability(hide(pooled, mask.expand(len(pooled), -1, -1))) for mask in windows]
    )
    return windows[left.argmin(dim=0)]


@torch.no_grad()
def draw_cells(heat: Tensor) -> Tensor:
    """Draw 15 cells of each region from the 20 with the largest logits `heat`, `[R, 7, 7]`.

    Returns:
        bool `[R, 7, 7]`, drawn without replacement by torch's generator.
    """
    flat = heat.flatten(1)
    hottest = flat.topk(TOP, dim=1).indices
    order = torch.rand(hottest.shape, device=heat.device).argsort(dim=1)[:, :DROPPED]
    hidden = torch.zeros_like(flat, dtype=torch.bool)
    return hidden.scatter(1, hottest.gather(1, order), True).view_as(heat)


def rotate_groups(pooled: Tensor, angles: Tensor) -> Tensor:
    """Rotate each group of channels about the centre of its region.

    Bilinear, with zeros outside the region.

    Args:
        pooled: `[R, channels, d, d]`.
        angles: Radians, `[R, groups]`, with `groups` a divisor of `channels`; a positive angle
            rotates counter-clockwise, with the first row at the top.

    Returns:
        Of the shape of `pooled`.
    """
    groups = angles.shape[1]
    rows, channels, height, width = pooled.shape
    features = pooled.float().reshape(rows * groups, channels // groups, height, width)
    angle = angles.flatten()
    cos, sin, none = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    # The source of each output cell: the inverse rotation.
    theta = torch.stack([cos, -sin, none, sin, cos, none], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(features.shape), align_corners=False)
    turned = F.grid_sample(features, grid, padding_mode="zeros", align_corners=False)
    return turned.reshape(pooled.shape).to(pooled.dtype)


def reverse_gradient(x: Tensor) -> Tensor:
    """Return `x`, with the sign of its gradient reversed."""
    view = x.view_as(x)
    if view.requires_grad:
        view.register_hook(torch.neg)  # type: ignore[no-untyped-call]
    return view
