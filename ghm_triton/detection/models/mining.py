"""Hard example mining: selects the anchors, points or regions with the largest losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    pass

Rows = Callable[[Tensor, Tensor], Tensor]


class Lost(NamedTuple):
    """The losses of every sample, two tensors of the shape of the labels."""

    classification: Tensor
    regression: Tensor


class _Hard(nn.Module):
    """Base of the mining of places and of regions.

    Args:
        choose: `OHEM` or `StratifiedOHEM`: called with both losses and a mask of candidates.
        classification: Logits `[..., C]` and labels `[...]` to the loss of every sample, `[...]`.
        regression: Predictions and targets `[P, 4]` of the positives to theirs, `[P]`.
    """

    def __init__(self, choose: nn.Module, classification: Rows, regression: Rows) -> None:
        super().__init__()
        self.choose = choose
        self.classification, self.regression = classification, regression

    @torch.no_grad()
    def lost(
        self, logits: Tensor, labels: Tensor, positive: Tensor, predicted: Tensor, expected: Tensor
    ) -> Lost:
        """The losses of every sample.

        Args:
            logits: `[..., C]`.
            labels: int64 `[...]`.
            positive: bool `[...]`: which samples are of a class.
            predicted: Predictions of the `P` positives for the regression loss, in their order.
            expected: Their targets.
        """
        lost = self.classification(logits, labels)
        misplaced = torch.zeros_like(lost)
        misplaced[positive] = self.regression(predicted, expected).to(lost.dtype)
        return Lost(lost, misplaced)


class HardPlaces(_Hard):
    """The places of each image with the largest losses, of both kinds together."""

    @torch.no_grad()
    def forward(
        self, logits: Tensor, labels: Tensor, predicted: Tensor, expected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose.

        Args:
            logits: `[B, A, C]`.
            labels: int64 `[B, A]`: `C` is background, negative is ignored and never chosen.
            predicted: Predictions of the `P` positives for the regression loss, in the order of
                the labels.
            expected: Their targets.

        Returns:
            The labels, -1 for examples that are not kept; and which of the positives are kept,
            bool `[P]`.
        """
        positive = (labels >= 0) & (labels < logits.shape[-1])
        lost = self.lost(logits, labels, positive, predicted, expected)
        kept = self.choose(*lost, labels >= 0)
        return labels.masked_fill(~kept, -1), kept[positive]


class HardRegions(_Hard):
    """The regions of each image with the largest losses, of both kinds together.

    A region that overlaps one of a larger loss is a duplicate of it and is left out (arXiv
    1604.03540, section 4). The share of positives is not fixed.
    """

    @torch.no_grad()
    def forward(self, lost: list[Lost], regions: list[Tensor]) -> list[Tensor]:
        """Choose.

        Args:
            lost: Losses of the regions per image, from the method `lost`.
            regions: Regions per image `[R, 4]`, x1 y1 x2 y2.

        Returns:
            Which regions are kept per image, bool `[R]`.
        """
        counts = torch.tensor([len(boxes) for boxes in regions], device=regions[0].device)
        classification, regression = (
            pad_sequence(list(rows), batch_first=True) for rows in zip(*lost, strict=True)
        )
        valid = torch.arange(classification.shape[1], device=counts.device) < counts.unsqueeze(1)
        padded = pad_sequence(regions, batch_first=True)
        kept = self.choose(classification, regression, valid, padded)
        return [row[: len(boxes)] for row, boxes in zip(kept, regions, strict=True)]
