"""Binary cross entropy a block at a time: counting, and the weighted loss with its gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ghm_triton._inputs import ClassificationInputs
from ghm_triton.reference import bce as specification
from ghm_triton.reference import binning
from ghm_triton.reference.binning import RegionCounts
from ghm_triton.reference.blockwise.autograd import by_definition, differentiable, write
from ghm_triton.reference.blockwise.blocks import Span, finite, spans
from ghm_triton.reference.blockwise.regions import RegionCounter, RegionTable
from ghm_triton.reference.blockwise.scratch import Scratch
from ghm_triton.reference.blockwise.targets import reader


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `binning.count_bce`."""
    blocks, counter, scratch = reader(inputs), RegionCounter(bins), Scratch()
    positives, invalid = [0.0], 0
    for span in spans(*inputs.logits.shape):
        values, *_ = scratch.views(span.entries)
        if blocks.read(span, values):
            positives.append(blocks.positives(span))
            norm = blocks.slope(values, out=values).abs_()
            counter.add(norm, blocks.keep, span.shape, scratch)
        else:
            counts = binning.count_bce(blocks.cut(span), bins)
            counter.add_counts(counts.regions)
            positives.append(float(counts.positives))
            invalid += int(counts.invalid)
    return RegionCounts(
        counter.regions(),
        torch.tensor(positives, dtype=torch.float64, device="cpu"),
        torch.tensor(invalid, device="cpu"),
    )


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `bce.weighted_bce`, for a table and scale that are NaN where a count was invalid.

    Differentiable once.
    """
    former = _Former(inputs, table * scale, weighted)
    return differentiable(former, inputs.logits, reduce)


class _Former:
    def __init__(self, inputs: ClassificationInputs, table: Tensor, weighted: bool) -> None:
        self._reader = reader(inputs)
        self.values = self._reader.inputs.logits
        given = (self.values, inputs.index, inputs.target, inputs.weight)
        self.given = tuple(tensor for tensor in given if tensor is not None)
        self._table = table
        self.nothing = 0.0 * float(table[0])
        self._regions = RegionTable(table)
        self._counted = finite(table)
        self._weighted = weighted

    def form(
        self, span: Span, scratch: Scratch, gradient: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        blocks = self._reader
        values, slope, weight, spare = scratch.views(span.entries)
        if not blocks.read(span, values, counted=self._counted):
            return self._by_definition(span, gradient, factor)
        blocks.slope(values, out=slope)
        self._regions.look_up(torch.abs(slope, out=weight), weight, scratch)
        blocks.selection.apply(weight, span, blocks.keep, weighted=self._weighted)
        if gradient is not None:
            write(gradient, slope, weight, factor, blocks.flips)
        return blocks.losses(values, slope, spare).mul_(weight)

    def _by_definition(self, span: Span, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        part = self._reader.cut(span)
        one = torch.ones((), dtype=torch.float32, device="cpu")

        def loss(logits: Tensor) -> Tensor:
            given = dataclasses.replace(part, logits=logits)
            return specification.weighted_bce(
                given, self._table, one, weighted=self._weighted, reduce=False
            )

        return by_definition(loss, part.logits, gradient, factor)
