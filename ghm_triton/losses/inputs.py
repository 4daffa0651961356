"""Validation of the inputs of the losses, and their views as rows."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs, SoftmaxInputs

EVEN = 16  # entries of a row for wide memory accesses, whatever the dtype
LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def classification_inputs(
    logits: Tensor, target: Tensor, label_weight: Tensor | None, validate: bool | None
) -> ClassificationInputs:
    """Validate the inputs of `ghm_c_loss` and view them as rows.

    Args:
        logits: `[..., C]`, floating.
        target: The shape of `logits`, floating or bool; or integer `logits.shape[:-1]`.
        label_weight: Broadcasts to `logits`; or None.
        validate: Whether to check the values; see `checks_values`.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device or (when validating) value is invalid.
    """
    _require_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have at least one dimension, got a scalar")
    _require_same_device(logits, target=target, label_weight=label_weight)
    look = checks_values(logits, validate)
    weight = _broadcast_weight(label_weight, logits, look)
    if target.shape == logits.shape and (target.is_floating_point() or target.dtype == torch.bool):
        if look:
            _require_range("target", _where_kept(target.detach(), weight), 0.0, 1.0)
        classes = _columns(logits, target, weight)
        dense = _rows(target.detach(), classes)
        return ClassificationInputs(
            _rows(logits, classes), None, dense, _rows(weight, classes), logits.shape
        )
    if target.shape == logits.shape[:-1] and not _is_real_valued(target):
        index = target.reshape(-1).long()
        if look:
            _require_classes(index, logits.shape[-1])
        # Without classes there are no entries, whatever the rows: view them as no rows.
        classes = max(1, logits.shape[-1])
        index = index[: logits.numel() // classes]
        return ClassificationInputs(
            _rows(logits, classes), index, None, _rows(weight, classes), logits.shape
        )
    raise ValueError(
        f"target must be floating or bool {list(logits.shape)} (dense) or integer"
        f" {list(logits.shape[:-1])} (class indices); got {target.dtype} {list(target.shape)}"
    )


def regression_inputs(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None,
    validate: bool | None,
    mu: float = 0.02,
) -> RegressionInputs:
    """Validate the inputs of `ghm_r_loss` and view them as rows.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape or device is invalid, or (when validating) a weight is negative or NaN.
    """
    _require_floating("pred", pred)
    _require_floating("target", target)
    if pred.dim() == 0:
        raise ValueError("pred must have at least one dimension, got a scalar")
    if pred.shape != target.shape:
        raise ValueError(
            f"pred is {list(pred.shape)}, target {list(target.shape)}: they must agree"
        )
    _require_same_device(pred, target=target, label_weight=label_weight)
    look = checks_values(pred, validate)
    weight = _broadcast_weight(label_weight, pred, look)
    columns = _columns(pred, target, weight)
    rows, target_rows = _rows(pred, columns), _rows(target.detach(), columns)
    return RegressionInputs(rows, target_rows, _rows(weight, columns), pred.shape, mu)


def softmax_inputs(
    logits: Tensor, target: Tensor, label_weight: Tensor | None, validate: bool | None
) -> SoftmaxInputs:
    """Validate the inputs of `ghm_softmax_loss` and view them as rows.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device or (when validating) value is invalid.
    """
    _require_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., C] with C of at least 1, got {list(logits.shape)}")
    _require_same_device(logits, target=target, label_weight=label_weight)
    if target.shape != logits.shape[:-1] or _is_real_valued(target):
        raise ValueError(
            f"target must be integer {list(logits.shape[:-1])} (class indices);"
            f" got {target.dtype} {list(target.shape)}"
        )
    look = checks_values(logits, validate)
    weight = _broadcast_weight(label_weight, target, look)
    classes = logits.shape[-1]
    index = target.reshape(-1).long()
    if look:
        _require_classes(index, classes, background=False)
    return SoftmaxInputs(
        _rows(logits, classes), index, None if weight is None else weight.reshape(-1), target.shape
    )


def checks_values(tensor: Tensor, validate: bool | None) -> bool:
    """Whether to check values: by default, where that neither synchronises nor breaks a graph."""
    if validate is not None:
        return validate
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_bins(bins: int) -> int:
    """Return `bins` if it is an integer from 1 to 1024, or raise ValueError."""
    if isinstance(bins, bool) or not isinstance(bins, int) or not 1 <= bins <= 1024:
        raise ValueError(f"bins must be an integer from 1 to 1024, got {bins!r}")
    return bins


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of `allowed`, or raise a ValueError that lists them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def _columns(tensor: Tensor, *beside: Tensor | None) -> int:
    """Choose the number of columns of the view of an element-wise problem.

    `EVEN` where everything is contiguous, so that rows are aligned; else the size of the last
    dimension, with a vector as a column: one class, many samples.
    """
    present = (other for other in (tensor, *beside) if other is not None)
    if tensor.numel() % EVEN == 0 and all(other.is_contiguous() for other in present):
        return EVEN
    return max(1, tensor.shape[-1]) if tensor.dim() > 1 else 1


@overload
def _rows(tensor: Tensor, columns: int) -> Tensor: ...
@overload
def _rows(tensor: Tensor | None, columns: int) -> Tensor | None: ...
def _rows(tensor: Tensor | None, columns: int) -> Tensor | None:
    return None if tensor is None else tensor.reshape(tensor.numel() // columns, columns)


def _broadcast_weight(label_weight: Tensor | None, like: Tensor, look: bool) -> Tensor | None:
    if label_weight is None:
        return None
    if label_weight.is_complex():
        raise TypeError(f"label_weight must be real, got {label_weight.dtype}")
    try:
        weight = label_weight.detach().expand(like.shape)
    except RuntimeError as error:
        raise ValueError(
            f"label_weight {list(label_weight.shape)} does not broadcast to {list(like.shape)}"
        ) from error
    if look:
        _require_range("label_weight", label_weight.detach(), 0.0, math.inf)
    return weight


def _where_kept(target: Tensor, weight: Tensor | None) -> Tensor:
    # Targets of ignored entries are not validated.
    return target if weight is None else torch.where(weight > 0, target, torch.zeros_like(target))


def _require_classes(index: Tensor, classes: int, background: bool = True) -> None:
    largest = int(index.max()) if index.numel() else 0
    if largest > (classes if background else classes - 1):
        beside = f"background {classes}, " if background else ""
        raise ValueError(
            f"target holds class index {largest}, but logits have {classes} classes"
            f" (0..{classes - 1}, {beside}negative ignored)"
        )


def _is_real_valued(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool


def _require_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}")


def _require_same_device(anchor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        if not isinstance(other, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(other).__name__}")
        if other.device != anchor.device:
            raise ValueError(f"{name} is on {other.device}, the predictions on {anchor.device}")


def _require_range(name: str, tensor: Tensor, low: float, high: float) -> None:
    if tensor.numel() == 0:
        return
    smallest, largest = (float(bound) for bound in torch.aminmax(tensor.float()))
    if not (low <= smallest and largest <= high):  # written so that NaN fails
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {smallest:g} to {largest:g}")
