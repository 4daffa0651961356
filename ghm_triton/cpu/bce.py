"""Binary cross entropy a block at a time: counting, and the weighted loss with its gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.autograd import by_definition, differentiable, write
from ghm_triton.cpu.blocks import Span, scalar
from ghm_triton.cpu.regions import RegionCounter, RegionTable
from ghm_triton.cpu.scratch import Views, walk
from ghm_triton.cpu.targets import reader
from ghm_triton.reference import bce as specification
from ghm_triton.reference import binning
from ghm_triton.reference.interface import ClassificationInputs, RegionCounts


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `binning.count_bce`."""
    blocks, counter = reader(inputs), RegionCounter(bins)
    positives, invalid = [0.0], 0
    for span, views in walk(*inputs.logits.shape):
        if blocks.read(span):
            positives.append(blocks.positives(span))
            norm = blocks.norm(blocks.slope(out=views.slope), out=views.slope)
            counter.add(norm, blocks.keep, span.shape, views)
        else:
            counts = binning.count_bce(blocks.cut(span), bins)
            counter.add_counts(counts.regions)
            positives.append(float(counts.positives))
            invalid += int(counts.invalid)
    return RegionCounts(
        counter.regions(),
        torch.from_numpy(np.array(positives)),
        torch.from_numpy(np.array(invalid)),
    )


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `bce.weighted_bce`, for a table and scale that are NaN where a count was invalid.

    Differentiable once.
    """
    former = _Former(inputs, table.numpy() * scale.numpy(), weighted)
    return differentiable(former, inputs.logits, reduce)


class _Former:
    """Forms loss and gradient, a `Former`."""

    def __init__(
        self, inputs: ClassificationInputs, table: NDArray[np.float32], weighted: bool
    ) -> None:
        self._reader = reader(inputs)
        self.values = self._reader.inputs.logits
        given = (self.values, inputs.index, inputs.target, inputs.weight)
        self.given = tuple(tensor for tensor in given if tensor is not None)
        self._table = table
        self.nothing = 0.0 * float(table[0])
        self._regions = RegionTable(table)
        self._counted = bool(np.isfinite(table).all())
        self._weighted = weighted

    def form(
        self, span: Span, views: Views, gradient: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        blocks = self._reader
        if not blocks.read(span, counted=self._counted):
            return self._by_definition(span, gradient, factor)
        slope = blocks.slope(out=views.slope)
        norm = blocks.norm(slope, out=views.weight)
        weight = self._regions.look_up(norm, views)
        blocks.selection.apply(weight, span, blocks.keep, weighted=self._weighted)
        if gradient is not None:
            write(gradient, slope, weight, factor, blocks.flip)
        return blocks.losses(slope, out=views.loss).mul_(weight)

    def _by_definition(self, span: Span, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        part = self._reader.cut(span)

        def loss(logits: Tensor) -> Tensor:
            given = dataclasses.replace(part, logits=logits)
            return specification.weighted_bce(
                given,
                torch.from_numpy(self._table),
                scalar(1.0),
                weighted=self._weighted,
                reduce=False,
            )

        return by_definition(loss, part.logits, gradient, factor)
