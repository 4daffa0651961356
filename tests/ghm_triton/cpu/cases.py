"""Every loss of `ghm_triton.cpu` under one interface, with inputs in the rows and columns given."""

import dataclasses

import torch

from ghm_triton import cpu
from ghm_triton.reference.interface import (
    ClassificationInputs,
    Focus,
    RegressionInputs,
    SoftmaxInputs,
)

TABLE = torch.tensor([3.0, 0.0, 4.0, 0.25, 0.5, 7.0, 1.0, 2.0])
SCALE = torch.tensor(0.125)
CASES = ["bce-index", "bce-soft", "asl1", "focal-index", "focal-soft", "focal-steep", "softmax"]
COUNTED = ["bce-index", "bce-soft", "asl1", "softmax"]


def draw(case, shape, generator, dtype=torch.float32, weight=None):
    """Inputs of a case; a weight is `[R, C]`, `[R, 1]` or `[1, C]`."""
    values = (torch.randn(shape, generator=generator) * 3).to(dtype)
    rows, classes = shape
    if case == "softmax":
        index = torch.randint(-1, classes, (rows,), generator=generator)
        return SoftmaxInputs(values, index, None if weight is None else weight[:, 0], index.shape)
    weight = None if weight is None else weight.expand(shape)
    if case == "asl1":
        target = values.float() + torch.randn(shape, generator=generator) * 0.03
        return RegressionInputs(values, target, weight, values.shape, 0.02)
    index, target = None, torch.rand(shape, generator=generator)
    if case.endswith("index"):
        index = torch.randint(-1, classes + 1, (rows,), generator=generator)
        target = None
    return ClassificationInputs(values, index, target, weight, values.shape)


def values_of(inputs):
    return inputs.pred if isinstance(inputs, RegressionInputs) else inputs.logits


def replace(inputs, values):
    """The same inputs with other predictions."""
    name = "pred" if isinstance(inputs, RegressionInputs) else "logits"
    return dataclasses.replace(inputs, **{name: values})


def count(case, inputs, bins=8, module=cpu):
    return getattr(module, "count_" + case.partition("-")[0])(inputs, bins)


def loss_of(case, inputs, table=TABLE, scale=SCALE, module=cpu, **options):
    options = {"weighted": False, "reduce": True, **options}
    if case.startswith("focal"):
        gamma = 0.5 if case == "focal-steep" else 2.0
        return module.weighted_focal(inputs, scale, Focus(0.25, gamma), **options)
    loss = getattr(module, "weighted_" + case.partition("-")[0])
    return loss(inputs, table, scale, **options)


def evaluate(case, inputs, outer=None, **options):
    """Loss and gradient; a random `outer` multiplies the loss unless it is given."""
    values = values_of(inputs).detach().requires_grad_()
    loss = loss_of(case, replace(inputs, values), **options)
    if outer is None:
        outer = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad(loss, values, outer.to(loss.dtype))
    return loss.detach(), slope
