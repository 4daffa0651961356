"""Every kernel as training launches it, and how to compile one for a GPU that need not be here.

To add a kernel, add a line to `variants`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ghm_triton.ops.asl1 import asl1_backward_kernel, asl1_forward_kernel
from ghm_triton.ops.bce import bce_backward_kernel, bce_forward_kernel
from ghm_triton.ops.binning import count_asl1_kernel, count_bce_kernel
from ghm_triton.ops.density import density_kernel
from ghm_triton.ops.tiles import MAX_BLOCK_C, MAX_PROGRAMS, OPTIONS, TILE, sum_partials_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

# Contiguous rows of 80 classes, or of 4 box deltas: what a detector passes.
CLASSES = {"BLOCK_R": TILE // MAX_BLOCK_C, "BLOCK_C": MAX_BLOCK_C}
DELTAS = {"BLOCK_R": TILE // 4, "BLOCK_C": 4}

Types = dict[str, str | None]


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its arguments (None: not passed) and its constants.

    Args:
        kernel: The `triton.jit` function.
        name: What sets this variant apart from the others of its kernel.
        types: Triton's types of the other arguments; where not named, pointers are `*fp32` and
            numbers `i32`.
        constants: The kernel's constexprs.
        dtype: Of the logits; empty for a kernel that no logit passes through.
        moved: Bytes an element that must pass between memory and the GPU.
        entries: Elements of a program's tile; 0 for a kernel that does not work on elements.
    """

    kernel: Any
    name: str
    types: Types
    constants: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    moved: float = 0.0
    entries: int = 0

    @property
    def key(self) -> str:
        """The kernel, the variant and the dtype, as one word."""
        return ".".join(filter(None, (self.kernel.__name__, self.name, self.dtype)))


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel at one dtype of logits, `fp32`, `fp16` or `bf16`."""
    size = BYTES[dtype]
    for kind, target, extra in (("index", "*i64", 8 / 80), ("dense", "*fp32", 4)):
        types: Types = {"logits_ptr": f"*{dtype}", "target_ptr": target, "weight_ptr": None}
        constants = {"INDEX": kind == "index", "BINS": 30, **CLASSES}
        count = {**constants, "BLOCK_BINS": 32}
        loss = {**constants, "WEIGHTED": False, "REDUCE": True}
        counts: Types = {"counts_ptr": "*i64", "positives_ptr": "*fp64"}
        gradient: Types = {"gradient_ptr": f"*{dtype}"}
        read, both = size + extra, 2 * size + extra
        yield Variant(count_bce_kernel, kind, types | counts, count, dtype, read, TILE)
        yield Variant(bce_forward_kernel, kind, types, loss, dtype, read, TILE)
        yield Variant(bce_backward_kernel, kind, types | gradient, loss, dtype, both, TILE)
    types = {"pred_ptr": f"*{dtype}", "target_ptr": f"*{dtype}", "weight_ptr": "*fp32"}
    constants = {"MU": 0.02, "BINS": 10, **DELTAS}
    count = {**constants, "BLOCK_BINS": 16}
    loss = {**constants, "WEIGHTED": False, "REDUCE": True}
    gradient = {"gradient_ptr": f"*{dtype}"}
    read, both = 2 * size + 4, 3 * size + 4
    counts = {"counts_ptr": "*i64"}
    yield Variant(count_asl1_kernel, "dense", types | counts, count, dtype, read, TILE)
    yield Variant(asl1_forward_kernel, "dense", types, loss, dtype, read, TILE)
    yield Variant(asl1_backward_kernel, "dense", types | gradient, loss, dtype, both, TILE)


def state_variants() -> Iterator[Variant]:
    """The kernels that no logit passes through."""
    types: Types = dict.fromkeys(("regions_ptr", "invalid_ptr", "updates_ptr"), "*i64")
    types |= {"positives_ptr": "*fp64", "factor": "fp32"}
    density = {"MOMENTUM": 0.75, "LOG_MOMENTUM": -0.2877, "MAX_WEIGHT": None, "PERSIST": True}
    density |= {"BINS": 30, "BLOCK_BINS": 32, "BLOCK_SUMS": MAX_PROGRAMS, "VALID_BINS": True}
    density |= {"DIVISOR": "positives"}
    for ema in ("debiased", "mmdet"):
        yield Variant(density_kernel, ema, types, {**density, "DEBIASED": ema == "debiased"})
    yield Variant(sum_partials_kernel, "", {}, {"BLOCK": MAX_PROGRAMS})


def build(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Compile as the launcher would for contiguous tensors."""
    signature, constants, attributes = {}, dict(variant.constants), {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.isupper():
            raise ValueError(f"{variant.key} lacks the constant {name}: name it in {__name__}")
        kind = variant.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        absent = kind is None
        if absent or name.endswith("_col"):  # contiguous: the stride of a column is 1
            signature[name], constants[name] = "constexpr", None if absent else 1
            continue
        signature[name] = str(kind)
        if name.endswith("_ptr") or (name.endswith("_row") and "BLOCK_C" in constants):
            attributes[(position,)] = [["tt.divisibility", 16 if name.endswith("_ptr") else 4]]
        if name == "cols" or (name.endswith("_row") and constants.get("BLOCK_C") == MAX_BLOCK_C):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=dict(OPTIONS))
