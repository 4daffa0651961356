"""Unit regions of a block: counting into them, and the weight of each entry's.

Both find the region as `binning.unit_region` does: multiply by `M` in float32 and cut off, with
`g = 1` in the last. Up to 126 regions, an index fits a byte, and two neighbours are counted or
looked up as one 16-bit code: half as many steps, and these are the ones that no vector instruction
speeds up.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.blocks import block_entries, scalar
from ghm_triton.cpu.scratch import Views

# An index runs to M (g = 1, before it joins the last region) and M + 1 (what is not counted), in a
# signed byte. The first of two bytes is the lower one.
MOST_PAIRED = 126 if sys.byteorder == "little" else 0
BYTE = 256


class RegionCounter:
    """Counts the norms of one block after another.

    Args:
        bins: Unit regions `M`.
    """

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._paired = bins <= MOST_PAIRED
        codes = (bins + 2) * (BYTE if self._paired else 1)
        self._codes = np.zeros(codes, dtype=np.int64)
        self._more = np.zeros(bins, dtype=np.int64)

    def add(self, norm: Tensor, keep: Tensor | None, shape: tuple[int, int], views: Views) -> None:
        """Count a block.

        Args:
            norm: float32 `[h * w]`, in [0, 1]; overwritten.
            keep: 1 where an entry counts and 0 where not, `[h, w]` or `[h, 1]`; None: all count.
            shape: `h` and `w`.
            views: What to work on; `views.loss` is overwritten.
        """
        outside = self._bins + 1
        region, codes = _find(norm, self._bins, norm, outside, views)
        if keep is not None:
            # Arithmetic: to fill by a mask costs a mispredicted branch wherever it changes.
            region.view(shape).sub_(outside).mul_(keep.to(region.dtype)).add_(outside)
        if self._paired:
            firsts = codes.numpy().view(np.uint8)
            np.add(firsts, _lanes(self._bins + 2, block_entries())[: firsts.size], out=firsts)
        self._codes += torch.bincount(codes, minlength=self._codes.size).numpy()

    def add_counts(self, regions: Tensor) -> None:
        """Add what was counted elsewhere, int64 `[M]`."""
        self._more += regions.numpy()

    def regions(self) -> Tensor:
        """int64 `[M]`, the entries in each unit region."""
        bins, counts = self._bins, self._codes
        if self._paired:
            indices = bins + 2
            pairs = counts.reshape(indices, BYTE)
            lanes = pairs.sum(0)[: BYTE // indices * indices].reshape(-1, indices)
            counts = pairs.sum(1) + lanes.sum(0)
        regions = counts[:bins] + self._more
        regions[-1] += counts[bins]
        return torch.from_numpy(regions)


@functools.lru_cache(maxsize=8)
def _lanes(indices: int, entries: int) -> NDArray[np.uint8]:
    """What to add to paired indices, `[entries]` or more: neighbours never count together then.

    Most norms fall into the same regions, and a counter that was incremented just now is slow to
    increment again. The first byte of a code has room for several copies of every index, of which
    pairs take turns.
    """
    lanes = np.zeros((entries // 2 + 1, 2), dtype=np.uint8)
    lanes[:, 0] = np.arange(len(lanes)) % (BYTE // indices) * indices
    return lanes.reshape(-1)


class RegionTable:
    """The weight of each unit region, to be looked up a block at a time.

    Args:
        table: float32 `[M]`.
    """

    def __init__(self, table: NDArray[np.float32]) -> None:
        self._bins = table.size
        self._paired = self._bins <= MOST_PAIRED
        stored: NDArray[Any] = np.append(table, table[-1])  # g = 1 belongs to the last region
        if self._paired:
            pairs = np.empty((stored.size, BYTE, 2), dtype=np.float32)
            pairs[:, : stored.size, 0] = stored
            pairs[:, : stored.size, 1] = stored[:, None]
            # Two float32 side by side, moved as the 64 bits they are.
            stored = pairs.reshape(-1).view(np.int64)
        self._table = torch.from_numpy(stored)

    def look_up(self, norm: Tensor, views: Views) -> Tensor:
        """The weight of every entry.

        Args:
            norm: float32 `[n]`, in [0, 1]; may be `views.weight`.
            views: What to work on; `views.loss` is overwritten as well.

        Returns:
            `views.weight`.
        """
        _, codes = _find(norm, self._bins, views.weight, 0, views)
        if self._paired:
            wide = views.codes.copy_(codes)
            torch.index_select(self._table, 0, wide, out=views.weight_pairs)
        else:
            torch.index_select(self._table, 0, codes, out=views.weight)
        return views.weight


def _find(norm: Tensor, bins: int, out: Tensor, pad: int, views: Views) -> tuple[Tensor, Tensor]:
    """Find the region of every entry.

    Args:
        norm: float32 `[n]`.
        bins: `M`.
        out: float32 `[n]`: holds `norm * M` then.
        pad: What stands beside an odd last index in its code.
        views: What to work on.

    Returns:
        The indices `[n]`, 0 to `M`, and the same memory as codes.
    """
    torch.mul(norm, scalar(float(bins)), out=out)
    if bins > MOST_PAIRED:
        return views.indices.copy_(out), views.indices
    if norm.shape[0] % 2:
        views.byte_pairs[-1] = pad * BYTE
    return views.bytes.copy_(out), views.byte_pairs
