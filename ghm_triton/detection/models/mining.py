"""Hard example mining: which places or regions a detector learns from, given what they lose."""

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
    """What every sample loses, two tensors of the shape of the labels."""

    classification: Tensor
    regression: Tensor


class _Hard(nn.Module):
    """What mining of places and of regions has in common.

    Args:
        choose: `OHEM` or `StratifiedOHEM`: called with both losses and with what may be kept.
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
            positive: Of that shape, bool: which samples are of a class.
            predicted: What the regression loss takes of the `P` positives, in their order.
            expected: Likewise.
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
            predicted: What the regression loss takes of the `P` positives, in the order of the
                labels.
            expected: Likewise.

        Returns:
            The labels, with those that are not to be learnt from ignored; and which of the
            positives are kept, bool `[P]`.
        """
        positive = (labels >= 0) & (labels < logits.shape[-1])
        lost = self.lost(logits, labels, positive, predicted, expected)
        kept = self.choose(*lost, labels >= 0)
        return labels.masked_fill(~kept, -1), kept[positive]


class HardRegions(_Hard):
    """The regions of each image with the largest losses, of both kinds together.

    A region that overlaps one of a larger loss sees the same and is left out (arXiv 1604.03540,
    section 4). How many of the rest are positive is for their losses to decide.
    """

    @torch.no_grad()
    def forward(self, lost: list[Lost], regions: list[Tensor]) -> list[Tensor]:
        """Choose.

        Args:
            lost: For each image what its regions lose, as `lost` tells.
            regions: For each image its regions `[R, 4]`, x1 y1 x2 y2.

        Returns:
            For each image which of its regions are kept, bool `[R]`.
        """
        counts = torch.tensor([len(boxes) for boxes in regions], device=regions[0].device)
        classification, regression = (
            pad_sequence(list(rows), batch_first=True) for rows in zip(*lost, strict=True)
        )
        places = torch.arange(classification.shape[1], device=counts.device)
        valid = places < counts.unsqueeze(1)
        boxes = pad_sequence(regions, batch_first=True)
        kept = self.choose(classification, regression, valid, boxes)
        return [row[: len(own)] for row, own in zip(kept, regions, strict=True)]
