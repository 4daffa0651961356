"""State of a loss between batches: float32, and equal on all processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SharedState(nn.Module):
    """A module whose state stays float32 under casts, and whose copies share its process group.

    In float16 a count above 65,504 would be infinite. Process groups cannot be copied.

    Args:
        process_group: Ranks that keep the same state; None for this process alone.

    Attributes:
        FLOAT32: Names of the buffers that stay float32.
    """

    FLOAT32: ClassVar[tuple[str, ...]] = ()

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.process_group)] = self.process_group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `to`, `half` and `bfloat16` end here: move the buffers with the module, but do not cast.
        before = {name: getattr(self, name) for name in self.FLOAT32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after: Tensor = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(after.device))
        return self
