"""Memory to work on, kept from call to call."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ghm_triton.reference.blockwise import blocks

_here = threading.local()


class _Buffers(NamedTuple):
    floats: Tensor  # float32 [4, n]
    small: Tensor  # int16 [n]
    codes: Tensor  # int32 [n]


class Scratch:
    """This thread's buffers, with room for one block: 22 bytes an entry, 2.8 MiB.

    They are kept, as memory that is new to a process costs more to touch for the first time than
    to work on. What they hold is old. To be asked for anew by whoever walks over blocks, since
    another thread may run the backward pass.
    """

    def __init__(self) -> None:
        self._buffers = _kept_buffers()
        self._entries = -1

    def views(self, entries: int) -> list[Tensor]:
        """The first entries of every float32 buffer, flat `[n]`."""
        self._view(entries)
        return self._floats

    def small_integers(self, entries: int, *, paired: bool) -> tuple[Tensor, Tensor]:
        """Memory for one small integer an entry.

        Returns:
            int8 `[n]` and the same memory as int16 `[n / 2]`, with room for one more if `n` is odd;
            or, not paired, int16 `[n]` twice.
        """
        self._view(entries)
        return self._paired if paired else (self._small, self._small)

    def codes(self, entries: int) -> Tensor:
        """int32 `[n]`."""
        return self._buffers.codes[:entries]

    def _view(self, entries: int) -> None:
        if entries != self._entries:  # all blocks but the last one are alike
            self._entries = entries
            self._floats = [buffer[:entries] for buffer in self._buffers.floats]
            self._small = self._buffers.small[:entries]
            pairs = self._buffers.small[: (entries + 1) // 2]
            self._paired = (self._buffers.small.view(torch.int8)[:entries], pairs)


def _kept_buffers() -> _Buffers:
    entries = blocks.BLOCK + blocks.BLOCK % 2  # neighbours are handled in pairs
    kept: _Buffers | None = getattr(_here, "buffers", None)
    if kept is None or len(kept.codes) != entries:
        # Usable ever after, also where they are first asked for within inference mode.
        with torch.inference_mode(False):
            kept = _here.buffers = _Buffers(
                torch.empty(4, entries, dtype=torch.float32, device="cpu"),
                torch.empty(entries, dtype=torch.int16, device="cpu"),
                torch.empty(entries, dtype=torch.int32, device="cpu"),
            )
    return kept
