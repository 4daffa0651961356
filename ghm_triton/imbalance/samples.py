"""What mining has in common: the loss of every sample, and checks of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ghm_triton.reference.bce import EXACT_UNTIL


def cross_entropy_of_samples(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Binary cross entropy of every sample, summed over its classes.

    .. math:: L_i = \sum_c \log(1 + e^{u_{ic}}), \quad u_{ic} = (1 - 2 p^*_{ic}) x_{ic}

    Args:
        logits: `[..., C]`, floating; arithmetic in float32 (float64 for float64).
        labels: Integer `[...]`: `0..C-1` foreground, `C` background, negative ignored.

    Returns:
        `[...]`, 0 where ignored.

    Raises:
        ValueError: The shapes do not agree.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)}, logits {list(logits.shape)}")
    classes = logits.shape[-1]
    u = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    own = labels.clamp(0, classes - 1).unsqueeze(-1)
    foreground = ((labels >= 0) & (labels < classes)).unsqueeze(-1)
    mine = u.gather(-1, own)
    u = u.scatter(-1, own, torch.where(foreground, -mine, mine))
    return torch.where(labels >= 0, softplus(u, threshold=EXACT_UNTIL).sum(dim=-1), 0.0)


def require_keep(keep: int) -> int:
    """`keep` if it is a positive integer.

    Raises:
        ValueError: It is not.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be an integer of at least 1, got {keep!r}")
    return keep


def require_samples(name: str, values: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless `values` holds one number for each sample of `like`."""
    if values.shape != like.shape:
        raise ValueError(
            f"{name} must be {list(like.shape)}, one for each sample; got {list(values.shape)}"
        )
