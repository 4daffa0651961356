"""Hard example mining over a dense head: which places it learns from, given what they lose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Rows = Callable[[Tensor, Tensor], Tensor]


class HardPlaces(nn.Module):
    """The places of each image with the largest losses, of both kinds together.

    Args:
        choose: `OHEM` or `StratifiedOHEM`: called with both losses and with what may be kept.
        classification: Logits `[B, A, C]` and labels `[B, A]` to the loss of every place, `[B, A]`.
        regression: Predictions and targets `[P, 4]` of the positives to theirs, `[P]`.
    """

    def __init__(self, choose: nn.Module, classification: Rows, regression: Rows) -> None:
        super().__init__()
        self.choose = choose
        self.classification, self.regression = classification, regression

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
        lost = self.classification(logits, labels)
        misplaced = torch.zeros_like(lost)
        misplaced[positive] = self.regression(predicted, expected).to(lost.dtype)
        kept = self.choose(lost, misplaced, labels >= 0)
        return labels.masked_fill(~kept, -1), kept[positive]
