"""Authentic smooth L1 a block at a time: counting, and the weighted loss with its gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.autograd import by_definition, differentiable, write
from ghm_triton.cpu.blocks import (
    Selection,
    Source,
    Span,
    blank,
    cut,
    finite,
    scalar,
)
from ghm_triton.cpu.regions import RegionCounter, RegionTable
from ghm_triton.cpu.scratch import Views, here, walk
from ghm_triton.reference import asl1 as specification
from ghm_triton.reference import binning
from ghm_triton.reference.interface import RegionCounts, RegressionInputs


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """As `binning.count_asl1`."""
    reader, counter = _Reader(inputs, mu), RegionCounter(bins)
    entries = invalid = 0
    for span, views in walk(*inputs.pred.shape):
        d, length = views.slope, here().length(span.entries)
        if reader.read(span, d, length):
            keep = reader.keep
            entries += span.entries if keep is None else int(keep.expand(span.shape).sum())
            counter.add(d.abs_().div_(length), keep, span.shape, views)
        else:
            counts = binning.count_asl1(reader.cut(span), bins, mu)
            counter.add_counts(counts.regions)
            entries += int(counts.positives)
            invalid += int(counts.invalid)
    return RegionCounts(
        counter.regions(),
        torch.from_numpy(np.array([float(entries)])),
        torch.from_numpy(np.array(invalid)),
    )


def weighted_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    *,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `asl1.weighted_asl1`; differentiable once."""
    former = _Former(inputs, table.numpy() * scale.numpy(), mu, weighted)
    return differentiable(former, inputs.pred, reduce)


class _Reader:
    """Reads one block after another in float32.

    Attributes:
        keep: Which entries of the last block take part, as `Selection.kept` gives it.
    """

    keep: Tensor | None = None

    def __init__(self, inputs: RegressionInputs, mu: float) -> None:
        self.inputs = dataclasses.replace(inputs, pred=inputs.pred.detach())
        self.selection = Selection(inputs.weight)
        self._pred = Source(self.inputs.pred)
        self._target = Source(inputs.target)
        self._squared_width = scalar(binning.squared_width(mu))

    def read(self, span: Span, d: Tensor, length: Tensor) -> bool:
        """Read a block.

        Args:
            span: Which one.
            d: `[n]`, where `pred - target` goes.
            length: `[n]`, where `sqrt(d^2 + mu^2)` goes.

        Returns:
            False if a square that takes part is not finite, or may not be.
        """
        torch.sub(self._pred.read(span), self._target.read(span), out=d)
        self.keep = self.selection.kept(span)
        if not finite(torch.square(d, out=length)):
            if self.keep is None:
                return False
            d.copy_(blank(d, self.keep, span.shape))
            if not finite(torch.square(d, out=length)):
                return False
        length.add_(self._squared_width).sqrt_()
        return True

    def cut(self, span: Span) -> RegressionInputs:
        """The block as inputs of its own."""
        given = self.inputs
        pred, target = cut(given.pred, span), cut(given.target, span)
        return RegressionInputs(pred, target, cut(given.weight, span), pred.shape)


class _Former:
    """Forms loss and gradient, a `Former`."""

    def __init__(
        self, inputs: RegressionInputs, table: NDArray[np.float32], mu: float, weighted: bool
    ) -> None:
        self._reader = _Reader(inputs, mu)
        self.values = self._reader.inputs.pred
        given = (self.values, inputs.target, inputs.weight)
        self.given = tuple(tensor for tensor in given if tensor is not None)
        self.nothing = 0.0 * float(table[0])
        self._table = table
        self._regions = RegionTable(table)
        self._mu = mu
        self._weighted = weighted

    def form(
        self, span: Span, views: Views, gradient: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        reader = self._reader
        d, length = views.slope, here().length(span.entries)
        if not reader.read(span, d, length):
            return self._by_definition(span, gradient, factor)
        slope = d.div_(length)
        weight = self._regions.look_up(torch.abs(slope, out=views.weight), views)
        reader.selection.apply(weight, span, reader.keep, weighted=self._weighted)
        d = torch.mul(slope, length, out=views.loss)
        if gradient is not None:
            write(gradient, slope, weight, factor)
        # d^2 / (sqrt(d^2 + mu^2) + mu), without the overflow of the square.
        return torch.div(d, length.add_(scalar(self._mu)), out=length).mul_(d).mul_(weight)

    def _by_definition(self, span: Span, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        part = self._reader.cut(span)

        def loss(pred: Tensor) -> Tensor:
            given = dataclasses.replace(part, pred=pred)
            return specification.weighted_asl1(
                given,
                torch.from_numpy(self._table),
                scalar(1.0),
                mu=self._mu,
                weighted=self._weighted,
                reduce=False,
            )

        return by_definition(loss, part.pred, gradient, factor)
