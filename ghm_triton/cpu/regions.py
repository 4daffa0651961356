"""Unit regions of a block: counting the entries in each, and looking up each entry's weight.

Both find the region as `reference.unit_region` does: multiply by `M` in float32 and truncate, with
`g = 1` in the last region. An index of up to 126 regions fits a byte, and two neighbours are
counted or looked up as one 16-bit code: half as many of the steps that do not vectorise.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.blocks import LOSS, WEIGHT, block_entries, buffer

# An index runs to M (g = 1, before it joins the last region) and M + 1 (not counted), in a signed
# byte. The first byte of a pair has to be the lower one.
MAX_PAIRED = 126 if sys.byteorder == "little" else 0
BYTE = 256


class RegionCounter:
    """Counts the gradient norms of one block after another into `bins` unit regions."""

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._scale = torch.tensor(float(bins), dtype=torch.float32, device="cpu")
        self._paired = bins <= MAX_PAIRED
        self._codes = np.zeros((bins + 2) * (BYTE if self._paired else 1), dtype=np.int64)

    def add(self, norm: Tensor, keep: Tensor | None) -> None:
        """Count a block; overwrites the buffer `LOSS`.

        Args:
            norm: float32 `[n]`, in [0, 1]; overwritten.
            keep: 1 for entries to count and 0 for others, `[h, w]` or `[h, 1]` with `h w = n`; None
                counts all.
        """
        outside = self._bins + 1
        regions, codes = _find(norm, self._bins, self._scale, norm, outside)
        if keep is not None:
            # Arithmetic, as filling by a mask costs a mispredicted branch at every change.
            rows = regions.view(keep.shape[0], -1)
            rows.sub_(outside).mul_(keep.to(regions.dtype)).add_(outside)
        if self._paired:
            firsts = codes.numpy().view(np.uint8)
            np.add(firsts, _lanes(self._bins + 2, block_entries())[: firsts.size], out=firsts)
        self._codes += torch.bincount(codes, minlength=self._codes.size).numpy()

    def regions(self) -> Tensor:
        """Return the entries in each unit region, int64 `[M]`."""
        counts, indices = self._codes, self._bins + 2
        if self._paired:
            pairs = counts.reshape(indices, BYTE)
            lanes = pairs.sum(0)[: BYTE // indices * indices].reshape(-1, indices)
            counts = pairs.sum(1) + lanes.sum(0)
        regions = counts[: self._bins].copy()
        regions[-1] += counts[self._bins]
        return torch.from_numpy(regions)


@functools.lru_cache(maxsize=8)
def _lanes(indices: int, entries: int) -> NDArray[np.uint8]:
    """Return offsets for paired indices, `[entries]` or more, that spread the counts.

    Most norms fall into the same regions, and a counter that was just incremented is slow to
    increment again. The first byte of a code has room for several copies of every index, which the
    pairs use in turn.
    """
    lanes = np.zeros((entries // 2 + 1, 2), dtype=np.uint8)
    lanes[:, 0] = np.arange(len(lanes)) % (BYTE // indices) * indices
    return lanes.reshape(-1)


class RegionTable:
    """The weights of the unit regions, float32 `[M]`, looked up per block."""

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self._bins = weights.size
        self._scale = torch.tensor(float(weights.size), dtype=torch.float32, device="cpu")
        self._paired = self._bins <= MAX_PAIRED
        stored: NDArray[Any] = np.append(weights, weights[-1])  # g = 1 is in the last region
        if self._paired:
            pairs = np.empty((stored.size, BYTE, 2), dtype=np.float32)
            pairs[:, : stored.size, 0] = stored
            pairs[:, : stored.size, 1] = stored[:, None]
            stored = pairs.reshape(-1).view(np.int64)  # two float32 in one move of 64 bits
        self._table = torch.from_numpy(stored)

    def look_up(self, norm: Tensor) -> Tensor:
        """Return the weight of every entry in the buffer `WEIGHT`; overwrites `LOSS` as well.

        Args:
            norm: float32 `[n]`, in [0, 1]; may be the same buffer.
        """
        entries = norm.shape[0]
        weight = buffer(WEIGHT, entries)
        _, codes = _find(norm, self._bins, self._scale, weight, 0)
        if self._paired:
            # Behind the bytes, which take a quarter of the buffer.
            half = codes.shape[0]
            wide = buffer(LOSS, 2 * half, torch.int32)[half:].copy_(codes)
            pairs = buffer(WEIGHT, half, torch.int64)
            torch.index_select(self._table, 0, wide, out=pairs)
        else:
            torch.index_select(self._table, 0, codes, out=weight)
        return weight


def _find(norm: Tensor, bins: int, scale: Tensor, out: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Return the index of each entry's region, 0 to `M`, and the same memory as codes.

    Args:
        norm: float32 `[n]`.
        bins: `M`.
        scale: The same as a tensor, which a call handles faster.
        out: float32 `[n]`; receives `norm * M`.
        pad: The index that pairs with an odd last one.
    """
    torch.mul(norm, scale, out=out)
    entries = norm.shape[0]
    if bins > MAX_PAIRED:
        indices = buffer(LOSS, entries, torch.int32)
        return indices.copy_(out), indices
    codes = buffer(LOSS, (entries + 1) // 2, torch.int16)
    if entries % 2:
        codes[-1] = pad * BYTE
    return buffer(LOSS, entries, torch.int8).copy_(out), codes
