"""What the kernels cost, read from their binaries; needs no GPU.

python -m benchmarks.sass --targets sm_90 --dtypes fp32 bf16 --kernels count_bce
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from benchmarks.disassembly import Counts, count, read_amdgcn, read_sass
from benchmarks.kernels import BYTES, TARGETS, Variant, build, state_variants, variants

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def measure(variant: Variant, target: GPUTarget) -> tuple[dict[str, Any], Counts]:
    """Build and disassemble one variant."""
    compiled = build(variant, target)
    if target.backend == "hip":
        usage, found = _read_amd(compiled)
    else:
        usage, found = _read_cuda(compiled)
    each = variant.entries / (compiled.metadata.num_warps * target.warp_size)
    if each:
        usage["instructions"] = found.instructions / each
        usage["special"] = found.special / each
        usage["conversions"] = found.conversions / each
        usage["loads"], usage["stores"] = found.loads, found.stores
        usage["each"] = each
    usage["outside"] = found.outside
    return usage, found


def _read_cuda(compiled: CompiledKernel) -> tuple[dict[str, Any], Counts]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "--print-code", "-ndf", "--print-line-info-inline", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    usage = {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
    }
    return usage, count(read_sass(code), "cuda")


def _read_amd(compiled: CompiledKernel) -> tuple[dict[str, Any], Counts]:
    text = compiled.asm["amdgcn"]
    names = {
        "registers": "vgpr_count",
        "spilled_bytes": "private_segment_fixed_size",
        "shared_bytes": "group_segment_fixed_size",
    }
    usage = {ours: int(_search(rf"\.{theirs}:\s+(\d+)", text)) for ours, theirs in names.items()}
    return usage, count(read_amdgcn(text), "hip")


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the listing has no {pattern!r}")
    return match[1]


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def chosen(dtypes: list[str], kernels: list[str] | None) -> Iterator[Variant]:
    """The variants whose kernel's name starts with one of `kernels`."""
    for variant in (*(v for d in dtypes for v in variants(d)), *state_variants()):
        if not kernels or variant.key.startswith(tuple(kernels)):
            yield variant


def _widths(found: dict[int, int]) -> str:
    return " ".join(f"{times}x{size}" for size, times in sorted(found.items(), reverse=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=list(BYTES), default=["fp32", "bf16"])
    parser.add_argument("--kernels", nargs="+", help="how their names start; default: all")
    parser.add_argument("--opcodes", action="store_true", help="also what the hot path is made of")
    parser.add_argument("--lines", action="store_true", help="also which lines of source")
    options = parser.parse_args()
    print(
        f"{'kernel':34} {'target':7} {'instr/el':>8} {'special':>7} {'convert':>7} {'regs':>4} "
        f"{'spill':>5} {'shared':>6} {'outside':>7} el/thread  loads; stores (times x bytes)"
    )
    for target in options.targets:
        for variant in chosen(options.dtypes, options.kernels):
            row, found = measure(variant, TARGETS[target])
            if variant.entries:
                per = f"{row['instructions']:8.1f} {row['special']:7.2f} {row['conversions']:7.2f}"
                moves = f"{row['each']:9.0f}  {_widths(row['loads'])}; {_widths(row['stores'])}"
            else:
                per, moves = f"{'':24}", ""
            print(
                f"{variant.key:34} {target:7} {per} {row['registers']:4} {row['spilled_bytes']:5} "
                f"{row['shared_bytes']:6} {row['outside']:7} {moves}",
                flush=True,
            )
            if options.opcodes:
                for opcode, times in found.opcodes.items():
                    print(f"    {times:4} {opcode}")
            if options.lines:
                for place, times in sorted(found.places.items()):
                    print(f"    {times / row['each']:6.2f} {place}")


if __name__ == "__main__":
    main()
