"""What a loss keeps between batches: in float32, and alike on several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SharedState(nn.Module):
    """A module with buffers that stay float32 when it is cast, and a group that copies share.

    In float16 a count above 65,504 would be infinite. A group stands for processes, which stay the
    same; it refuses to be copied.

    Args:
        process_group: Ranks that keep the same state; None for this process alone.

    Attributes:
        FLOAT32: The buffers' names.
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
        # What `to`, `half` and `bfloat16` go through: move with the module, but keep float32.
        before = {name: getattr(self, name) for name in self.FLOAT32}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after: Tensor = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(after.device))
        return self
