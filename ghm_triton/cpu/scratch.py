"""Memory to work on, kept from call to call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ghm_triton.cpu.blocks import Span, block_entries, spans

MOST_VIEWS = 16  # block sizes whose views are kept

_here = threading.local()


class Views(NamedTuple):
    """Memory of one block's size `n`; what it holds is old. All flat and contiguous.

    Attributes:
        slope: float32 `[n]`.
        weight: float32 `[n]`.
        weight_pairs: The same memory as int64 `[(n + 1) // 2]`, with room for one more entry if `n`
            is odd; so all pairs.
        loss: float32 `[n]`.
        indices: The same memory as int32 `[n]`.
        bytes: A part of the same memory as int8 `[n]`.
        byte_pairs: The same part as int16 `[(n + 1) // 2]`.
        codes: Another part of the same memory as int32 `[(n + 1) // 2]`.
    """

    slope: Tensor
    weight: Tensor
    weight_pairs: Tensor
    loss: Tensor
    indices: Tensor
    bytes: Tensor
    byte_pairs: Tensor
    codes: Tensor


class Scratch:
    """The memory of one thread, with room for one block: 12 bytes an entry, 16 once it had boxes.

    It is kept, as memory that is new to a process costs more to touch for the first time than to
    work on; and usable ever after, also where it is first asked for within inference mode.
    """

    def __init__(self, entries: int) -> None:
        self.entries = entries
        with torch.inference_mode(False):
            self._buffers = [self._new() for _ in range(3)]
        self._length: Tensor | None = None
        self._views: dict[int, Views] = {}

    def views(self, entries: int) -> Views:
        """What every loss works on."""
        if entries not in self._views:
            if len(self._views) >= MOST_VIEWS:
                self._views.clear()
            with torch.inference_mode(False):
                self._views[entries] = self._cut(entries)
        return self._views[entries]

    def length(self, entries: int) -> Tensor:
        """float32 `[n]` more, for boxes."""
        if self._length is None:
            with torch.inference_mode(False):
                self._length = self._new()
        return self._length[:entries]

    def _new(self) -> Tensor:
        # Neighbours are handled in pairs, and numbers of several sizes lie side by side.
        entries = (self.entries + 15) // 8 * 8
        return torch.empty(entries, dtype=torch.float32, device="cpu")

    def _cut(self, entries: int) -> Views:
        slope, weight, loss = self._buffers
        pairs = (entries + 1) // 2
        behind = -(-entries // 4)  # where the bytes end, as int32
        return Views(
            slope[:entries],
            weight[:entries],
            weight.view(torch.int64)[:pairs],
            loss[:entries],
            loss.view(torch.int32)[:entries],
            loss.view(torch.int8)[:entries],
            loss.view(torch.int16)[:pairs],
            loss.view(torch.int32)[behind : behind + pairs],
        )


def here() -> Scratch:
    """This thread's.

    To be asked for anew by whoever walks over blocks: another thread may run the backward pass.
    """
    kept: Scratch | None = getattr(_here, "scratch", None)
    if kept is None or kept.entries < block_entries():
        kept = _here.scratch = Scratch(block_entries())
    return kept


def walk(rows: int, columns: int) -> Iterator[tuple[Span, Views]]:
    """The blocks of `[rows, columns]`, each with memory to work on."""
    scratch = here()
    for span in spans(rows, columns):
        yield span, scratch.views(span.entries)
