"""The kernels as operators of PyTorch, `torch.ops.ghm.*`, and the twins of `reference` on top.

As operators they are opaque to `torch.compile` and `torch.export`, which neither look inside nor
break: each says what it returns for tensors that hold no data, what it changes, and what its
gradient is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.runtime.jit import JITFunction

from ghm_triton.ops import asl1, bce, binning, density, focal, scaling, softmax
from ghm_triton.ops.interpreter import interpreting
from ghm_triton.ops.tiles import MAX_PROGRAMS
from ghm_triton.reference.interface import (
    ClassificationInputs,
    RegionCounts,
    RegressionInputs,
    SoftmaxInputs,
)
from ghm_triton.reference.softmax import MAX_CLASSES

# Triton decides when it defines a function whether to compile or to interpret it. Its functions and
# those of this package must have been defined alike: with the variable set in between, they cannot
# call each other.
_compiled = [
    isinstance(function, JITFunction)
    for function in (triton.language.cdiv, binning.count_bce_kernel)
]
COMPILED = all(_compiled)
INTERPRETED = not any(_compiled)

LIBRARY = torch.library.Library("ghm", "FRAGMENT")
# Kernels that are interpreted run on tensors of the host.
DEVICES = ("CUDA", "CPU") if interpreting() else ("CUDA",)


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator: what launches its kernel, and what that returns, without data."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, launch, device)
    torch.library.register_fake(f"ghm::{name}", fake, lib=LIBRARY)


def fake_counts(
    values: Tensor, _target: Tensor, _weight: Tensor | None, bins: int, *_: Any
) -> Tensor:
    """As `scratch` makes them."""
    return values.new_empty(bins + 1 + MAX_PROGRAMS, dtype=torch.int64)


def fake_density(
    _regions: Tensor, _positives: Tensor, _invalid: Tensor, smoothed: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """A weight a region, and the scale."""
    return torch.empty_like(smoothed), smoothed.new_empty(())


def fake_loss(values: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient or an empty tensor in its place."""
    *_, reduce, gradient = options
    loss = values.new_empty(() if reduce else values.shape, dtype=torch.float32)
    return loss, torch.empty_like(values) if gradient else values.new_empty(0)


def fake_row_loss(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """As `fake_loss`, with an entry a row."""
    *_, reduce, gradient = options
    loss = logits.new_empty(() if reduce else logits.shape[:1], dtype=torch.float32)
    return loss, torch.empty_like(logits) if gradient else logits.new_empty(0)


def fake_gradient(values: Tensor, *_: Any) -> Tensor:
    """A gradient, laid out as what it is of."""
    return torch.empty_like(values)


DATA = "Tensor target, Tensor? weight"
TABLE = "Tensor table, Tensor scale"
define(f"count_bce(Tensor logits, {DATA}, int bins) -> Tensor", binning.count_bce, fake_counts)
define(
    f"count_asl1(Tensor pred, {DATA}, int bins, float mu) -> Tensor",
    binning.count_asl1,
    fake_counts,
)
define(
    "update_density(Tensor regions, Tensor positives, Tensor invalid, Tensor(a!) smoothed,"
    " Tensor(b!) updates, Tensor strength, float momentum, str ema, str normalizer,"
    " float? max_weight, bool persist, str? divisor, float factor) -> (Tensor, Tensor)",
    density.update_density,
    fake_density,
)
define(
    f"weighted_bce(Tensor logits, {DATA}, {TABLE}, bool weighted, bool reduce, bool gradient)"
    " -> (Tensor, Tensor)",
    bce.weighted_bce,
    fake_loss,
)
define(
    f"weighted_bce_backward(Tensor logits, {DATA}, {TABLE}, Tensor grad_loss, bool weighted)"
    " -> Tensor",
    bce.weighted_bce_backward,
    fake_gradient,
)
define(
    f"weighted_asl1(Tensor pred, {DATA}, {TABLE}, float mu, bool weighted, bool reduce,"
    " bool gradient) -> (Tensor, Tensor)",
    asl1.weighted_asl1,
    fake_loss,
)
define(
    f"weighted_asl1_backward(Tensor pred, {DATA}, {TABLE}, Tensor grad_loss, float mu,"
    " bool weighted) -> Tensor",
    asl1.weighted_asl1_backward,
    fake_gradient,
)
define(
    f"count_softmax(Tensor logits, {DATA}, int bins) -> Tensor", softmax.count_softmax, fake_counts
)
define(
    f"weighted_softmax(Tensor logits, {DATA}, {TABLE}, bool weighted, bool reduce, bool gradient)"
    " -> (Tensor, Tensor)",
    softmax.weighted_softmax,
    fake_row_loss,
)
define(
    f"weighted_softmax_backward(Tensor logits, {DATA}, {TABLE}, Tensor grad_loss, bool weighted)"
    " -> Tensor",
    softmax.weighted_softmax_backward,
    fake_gradient,
)
define(
    f"focal(Tensor logits, {DATA}, Tensor scale, float alpha, float gamma, bool weighted,"
    " bool reduce, bool gradient) -> (Tensor, Tensor)",
    focal.focal,
    fake_loss,
)
define(
    f"focal_backward(Tensor logits, {DATA}, Tensor scale, Tensor grad_loss, float alpha,"
    " float gamma, bool weighted) -> Tensor",
    focal.focal_backward,
    fake_gradient,
)
define(
    "scale_gradient(Tensor(a!) gradient, Tensor factor) -> ()",
    scaling.scale_gradient,
    lambda *_: None,
)


def differentiate(name: str, again: Callable[..., Tensor], tensors: int, constants: int) -> None:
    """Register the gradient of a loss: formed with it, or else by `again` from the same inputs.

    Args:
        name: The operator; its last two arguments are `reduce` and `gradient`.
        again: Takes the tensors, what comes in, and the constants.
        tensors: How many of its arguments lead, the differentiable one first.
        constants: How many follow.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.formed = inputs[-1]
        ctx.options = inputs[tensors : tensors + constants]
        ctx.arguments = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((output[1],) if ctx.formed else inputs[:tensors]))

    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            (formed,) = ctx.saved_tensors
            gradient = _scaled(formed, grad_loss)
        else:
            gradient = again(*ctx.saved_tensors, grad_loss, *ctx.options)
        return gradient, *(None,) * (ctx.arguments - 1)

    torch.library.register_autograd(f"ghm::{name}", backward, setup_context=keep, lib=LIBRARY)


def _scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient times what came in: where it lies, unless somebody may come for it again."""
    if type(gradient) is not Tensor:  # a compiler's, which returns it to the caller
        return gradient * grad_loss
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.ghm.scale_gradient(gradient, grad_loss)
    return gradient


differentiate("weighted_bce", torch.ops.ghm.weighted_bce_backward, tensors=5, constants=1)
differentiate("weighted_asl1", torch.ops.ghm.weighted_asl1_backward, tensors=5, constants=2)
differentiate("weighted_softmax", torch.ops.ghm.weighted_softmax_backward, tensors=5, constants=1)
differentiate("focal", torch.ops.ghm.focal_backward, tensors=4, constants=3)


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `ghm_triton.reference.count_bce`, in one pass over the inputs."""
    target = inputs.target if inputs.index is None else inputs.index
    return _counts(torch.ops.ghm.count_bce(inputs.logits, target, inputs.weight, bins), bins)


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """As `ghm_triton.reference.count_asl1`, in one pass over the inputs."""
    counts = torch.ops.ghm.count_asl1(inputs.pred, inputs.target, inputs.weight, bins, mu)
    return _counts(counts, bins)


def update_density(
    counts: RegionCounts,
    smoothed: Tensor,
    updates: Tensor,
    strength: Tensor,
    *,
    momentum: float,
    ema: str,
    normalizer: str,
    max_weight: float | None,
    persist: bool,
    divisor: str | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """As `ghm_triton.reference.update_density`, in one kernel."""
    weighed: tuple[Tensor, Tensor] = torch.ops.ghm.update_density(
        *(counts.regions, counts.positives, counts.invalid, smoothed, updates, strength),
        *(momentum, ema, normalizer, max_weight, persist, divisor, factor),
    )
    return weighed


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `ghm_triton.reference.weighted_bce`; the gradient has the logits' dtype and layout."""
    target = inputs.target if inputs.index is None else inputs.index
    loss: Tensor
    loss, _ = torch.ops.ghm.weighted_bce(
        *(inputs.logits, target, inputs.weight, table, scale),
        *(weighted, reduce, _form_gradient(inputs.logits, reduce)),
    )
    return loss


def weighted_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    *,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `ghm_triton.reference.weighted_asl1`; the gradient has the predictions' dtype."""
    loss: Tensor
    loss, _ = torch.ops.ghm.weighted_asl1(
        *(inputs.pred, inputs.target, inputs.weight, table, scale),
        *(mu, weighted, reduce, _form_gradient(inputs.pred, reduce)),
    )
    return loss


def count_softmax(inputs: SoftmaxInputs, bins: int) -> RegionCounts:
    """As `ghm_triton.reference.count_softmax`, in one pass over the inputs.

    Raises:
        ValueError: A row does not fit into a tile.
    """
    classes = inputs.logits.shape[1]
    if classes > MAX_CLASSES:
        raise ValueError(
            f"backend='triton' takes up to {MAX_CLASSES} classes, got {classes};"
            " use backend='torch'"
        )
    counts = torch.ops.ghm.count_softmax(inputs.logits, inputs.index, inputs.weight, bins)
    return _counts(counts, bins)


def weighted_softmax(
    inputs: SoftmaxInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `ghm_triton.reference.weighted_softmax`."""
    loss: Tensor
    loss, _ = torch.ops.ghm.weighted_softmax(
        *(inputs.logits, inputs.index, inputs.weight, table, scale),
        *(weighted, reduce, _form_gradient(inputs.logits, reduce)),
    )
    return loss


def weighted_focal(
    inputs: ClassificationInputs,
    scale: Tensor,
    *,
    alpha: float,
    gamma: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `ghm_triton.reference.weighted_focal`."""
    target = inputs.target if inputs.index is None else inputs.index
    loss: Tensor
    loss, _ = torch.ops.ghm.focal(
        *(inputs.logits, target, inputs.weight, scale, alpha, gamma),
        *(weighted, reduce, _form_gradient(inputs.logits, reduce)),
    )
    return loss


def _counts(counts: Tensor, bins: int) -> RegionCounts:
    return RegionCounts(counts[:bins], counts[bins + 1 :].view(torch.float64), counts[bins])


def _form_gradient(values: Tensor, reduce: bool) -> bool:
    """Whether the gradient is formed with the loss.

    Not in float16: a gradient that the loss scale has not reached yet would vanish. Nor where a
    compiler looks on, which may not change it in place: then computing it anew moves less.
    """
    wanted = values.requires_grad and torch.is_grad_enabled()
    lasting = values.dtype != torch.float16 and not torch.compiler.is_compiling()
    return wanted and reduce and lasting
