"""What each kernel takes on GPUs that need not be there: registers, spills, shared memory, code.

    python -m benchmarks.resources --targets sm_90 gfx942

Prints one JSON line a kernel, variant and target. Triton compiles without a driver, and brings the
tools that read its binaries.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
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
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Contiguous rows of 80 classes, or of 4 box deltas: what a detector passes.
CLASSES = {"BLOCK_R": TILE // MAX_BLOCK_C, "BLOCK_C": MAX_BLOCK_C}
DELTAS = {"BLOCK_R": TILE // 4, "BLOCK_C": 4}
REGIONS = {"BINS": 30, "BLOCK_BINS": 32}
DENSITY = {"MOMENTUM": 0.75, "LOG_MOMENTUM": -0.2877, "MAX_WEIGHT": None, "PERSIST": True}


Types = dict[str, str | None]


@dataclass(frozen=True)
class Variant:
    """A kernel, the types of its pointers (None: not passed) and its constants."""

    kernel: Any
    name: str
    types: Types
    constants: dict[str, Any] = field(default_factory=dict)


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel at one dtype of logits, `fp32`, `fp16` or `bf16`, as training launches it."""
    for kind, target in (("index", "*i64"), ("dense", "*fp32")):
        types: Types = {"logits_ptr": f"*{dtype}", "target_ptr": target, "weight_ptr": None}
        constants: dict[str, Any] = {"INDEX": kind == "index", "BINS": 30, **CLASSES}
        loss = {**constants, "WEIGHTED": False, "REDUCE": True}
        counts: Types = {"counts_ptr": "*i64", "positives_ptr": "*fp64"}
        yield Variant(count_bce_kernel, kind, types | counts, constants | REGIONS)
        yield Variant(bce_forward_kernel, kind, types, loss)
        yield Variant(bce_backward_kernel, kind, types | {"gradient_ptr": f"*{dtype}"}, loss)
    types = {"pred_ptr": f"*{dtype}", "target_ptr": f"*{dtype}", "weight_ptr": "*fp32"}
    constants = {"MU": 0.02, "BINS": 10, **DELTAS}
    loss = {**constants, "WEIGHTED": False, "REDUCE": True}
    counts = {"counts_ptr": "*i64"}
    yield Variant(count_asl1_kernel, "dense", types | counts, constants | {"BLOCK_BINS": 16})
    yield Variant(asl1_forward_kernel, "dense", types, loss)
    yield Variant(asl1_backward_kernel, "dense", types | {"gradient_ptr": f"*{dtype}"}, loss)


def state_variants() -> Iterator[Variant]:
    """The kernels that no logit passes through."""
    types: Types = {
        "regions_ptr": "*i64",
        "invalid_ptr": "*i64",
        "updates_ptr": "*i64",
    }
    for ema in ("debiased", "mmdet"):
        constants = {**DENSITY, **REGIONS, "DEBIASED": ema == "debiased", "VALID_BINS": True}
        yield Variant(density_kernel, ema, types, constants)
    yield Variant(sum_partials_kernel, "fp32", {}, {"BLOCK": MAX_PROGRAMS})


def build(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Compile as the launcher would for contiguous tensors."""
    signature, constants, attributes = {}, dict(variant.constants), {}
    for position, name in enumerate(variant.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind: str | None = "i32"
        if name.endswith("_ptr"):
            kind = variant.types.get(name, "*fp32")
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


def resources(compiled: CompiledKernel, target: GPUTarget, count: bool) -> dict[str, int]:
    """Bytes of code, registers, spilled bytes and shared memory, read from the binary.

    With `count`, on NVIDIA, also the instructions; disassembling takes longer than compiling.
    """
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {key: re.search(rf"\.{key}:\s+(\d+)", text) for key in _AMD}
        amd = {_AMD[key]: int(match[1]) for key, match in found.items() if match}
        return {"binary_bytes": len(compiled.asm["hsaco"]), **amd}
    binary = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "--print-code", file.name) if count else ""
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    usage_found = {
        "binary_bytes": len(binary),
        "registers": counts["REG"],
        "spilled_bytes": counts["STACK"] + counts["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
    }
    if count:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code, re.MULTILINE)
        usage_found["instructions"] = len(lines)
    return usage_found


_AMD = {
    "vgpr_count": "registers",
    "vgpr_spill_count": "spilled_registers",
    "private_segment_fixed_size": "spilled_bytes",
    "group_segment_fixed_size": "shared_bytes",
}


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def report(targets: list[str], dtypes: list[str], count: bool) -> Iterator[dict[str, Any]]:
    """One row a kernel, variant and target."""
    for name in targets:
        chosen = [(dtype, v) for dtype in dtypes for v in variants(dtype)]
        chosen += [("", v) for v in state_variants()]
        for dtype, variant in chosen:
            row = {"kernel": variant.kernel.__name__, "variant": variant.name, "dtype": dtype}
            compiled = build(variant, TARGETS[name])
            yield row | {"target": name} | resources(compiled, TARGETS[name], count)


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--instructions", action="store_true", help="disassemble and count them")
    options = parser.parse_args()
    for row in report(options.targets, options.dtypes, options.instructions):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
