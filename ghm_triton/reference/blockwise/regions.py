"""Unit regions of a block: counting into them, and the weight of each entry's.

Both find the region as `binning.unit_region` does: multiply by `M` in float32 and cut off, with
`g = 1` in the last. Up to 126 regions, an index fits a byte, and two neighbours are counted or
looked up as one 16-bit code: half as many steps, and these are the ones that no vector instruction
speeds up.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ghm_triton.reference.blockwise.scratch import Scratch

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
        codes = (bins + 2) * (BYTE if bins <= MOST_PAIRED else 1)
        self._codes = torch.zeros(codes, dtype=torch.int64, device="cpu")
        self._more = torch.zeros(bins, dtype=torch.int64, device="cpu")

    def add(
        self, norm: Tensor, keep: Tensor | None, shape: tuple[int, int], scratch: Scratch
    ) -> None:
        """Count a block.

        Args:
            norm: float32 `[h * w]`, in [0, 1]; overwritten.
            keep: 1 where an entry counts and 0 where not, `[h, w]` or `[h, 1]`; None: all count.
            shape: `h` and `w`.
            scratch: What to work on.
        """
        outside = self._bins + 1
        region, codes = _find(norm, self._bins, norm, outside, scratch)
        if keep is not None:
            # Arithmetic: to fill by a mask costs a mispredicted branch wherever it changes.
            region.view(shape).sub_(outside).mul_(keep.to(region.dtype)).add_(outside)
        self._codes += torch.bincount(codes, minlength=len(self._codes))

    def add_counts(self, regions: Tensor) -> None:
        """Add what was counted elsewhere, int64 `[M]`."""
        self._more += regions

    def regions(self) -> Tensor:
        """int64 `[M]`, the entries in each unit region."""
        bins, counts = self._bins, self._codes
        if bins <= MOST_PAIRED:
            pairs = counts.view(bins + 2, BYTE)
            counts = pairs.sum(1) + pairs[:, : bins + 2].sum(0)
        last = counts[bins - 1 : bins + 1].sum(0, keepdim=True)
        return torch.cat([counts[: bins - 1], last]).add_(self._more)


class RegionTable:
    """The weight of each unit region, to be looked up a block at a time.

    Args:
        table: float32 `[M]`.
    """

    def __init__(self, table: Tensor) -> None:
        self._bins = len(table)
        table = torch.cat([table, table[-1:]])  # g = 1 belongs to the last region
        if self._bins <= MOST_PAIRED:
            pairs = torch.zeros(len(table), BYTE, 2, dtype=torch.float32, device="cpu")
            pairs[:, : len(table), 0] = table
            pairs[:, :, 1] = table.unsqueeze(1)
            # Two float32 side by side, moved as the 64 bits they are.
            table = pairs.view(torch.int64).flatten()
        self._table = table

    def look_up(self, norm: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
        """The weight of every entry.

        Args:
            norm: float32 `[n]`, in [0, 1].
            out: float32 `[n]`, a view of the scratch; may be `norm`.
            scratch: What to work on.

        Returns:
            `out`.
        """
        _, codes = _find(norm, self._bins, out, 0, scratch)
        weights = out
        if self._bins <= MOST_PAIRED:
            weights = out.as_strided((2 * len(codes),), (1,)).view(torch.int64)
        wide = scratch.codes(len(codes)).copy_(codes)
        torch.index_select(self._table, 0, wide, out=weights)
        return out


def _find(
    norm: Tensor, bins: int, out: Tensor, pad: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Find the region of every entry.

    Args:
        norm: float32 `[n]`.
        bins: `M`.
        out: float32 `[n]`: holds `norm * bins` then.
        pad: What stands beside an odd last index in its code.
        scratch: What to work on.

    Returns:
        The indices `[n]`, 0 to `M`, and the same memory as codes.
    """
    paired = bins <= MOST_PAIRED
    region, codes = scratch.small_integers(len(norm), paired=paired)
    if paired and len(norm) % 2:
        codes[-1] = pad * BYTE
    region.copy_(torch.mul(norm, bins, out=out))
    return region, codes
