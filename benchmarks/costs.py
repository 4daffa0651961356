"""Costs of a kernel read from its binary, the roofline they imply, and regressions."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import CompiledKernel

from benchmarks.disassembly import AMDGCN, SASS, Counts, count, read_amdgcn, read_sass
from benchmarks.kernels import TARGETS, Variant, build

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# An H100 SXM: streaming multiprocessors, clock, lanes per multiprocessor, and copy bandwidth.
MULTIPROCESSORS, HERTZ, LANES, SPECIAL_LANES = 132, 1.7e9, 128, 16
BYTES_A_SECOND = 3.0e12

# A larger relative increase is a regression.
TOLERANCE = 0.10


@dataclass(frozen=True)
class Costs:
    """Costs of one kernel, variant and dtype on one target; a line of the baseline.

    Args:
        kernel: `Variant.key`.
        target: A name of `TARGETS`.
        compiler: Versions of Triton and, for NVIDIA, of ptxas.
        registers: Registers per thread.
        spilled_bytes: Spilled bytes per thread; must be 0.
        shared_bytes: Shared memory per program.
        outside: Instructions before, after and beside the hot path.
        moved: Minimum traffic in bytes per element; 0, and nothing below, for a kernel that does
            not work on elements.
        elements: Elements per thread and pass over the hot path.
        instructions: Instructions per element on the hot path.
        special: Special functions per element.
        conversions: Conversions per element that use the unit of special functions.
        loads: Loads from global memory per pass, by width in bytes.
        stores: Stores to global memory per pass, by width in bytes.
    """

    kernel: str
    target: str
    compiler: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    outside: int
    moved: float = 0.0
    elements: float = 0.0
    instructions: float = 0.0
    special: float = 0.0
    conversions: float = 0.0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures that must not grow."""
        found = {"registers": float(self.registers)}
        if self.elements:
            found["instructions per element"] = self.instructions
            found["special functions per element"] = self.special
            found["conversions per element"] = self.conversions
            found["loads per element"] = sum(self.loads.values()) / self.elements
            found["stores per element"] = sum(self.stores.values()) / self.elements
        return found

    @property
    def widths(self) -> dict[str, int]:
        """Bytes of the widest load and store, which must not shrink."""
        both = {"bytes per load": self.loads, "bytes per store": self.stores}
        return {name: max(map(int, found), default=0) for name, found in both.items()}

    @property
    def roofs(self) -> dict[str, float]:
        """Elements per second that an H100 allows, by limiting resource."""
        if not self.elements:
            return {}
        cycles = MULTIPROCESSORS * HERTZ
        special = self.special + self.conversions
        return {
            "memory": BYTES_A_SECOND / self.moved,
            "issue": cycles * LANES / self.instructions,
            "special": cycles * SPECIAL_LANES / special if special else float("inf"),
        }

    def line(self) -> dict[str, Any]:
        """Return the row for JSON, with numbers rounded to three digits."""
        rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return rounded if self.elements else {key: rounded[key] for key in ALWAYS}


ALWAYS = (
    "kernel",
    "target",
    "compiler",
    "registers",
    "spilled_bytes",
    "shared_bytes",
    "outside",
)


def measure(variant: Variant, target: str) -> tuple[Costs, Counts]:
    """Build a variant for a target and count its disassembly.

    Raises:
        ValueError: The hot path moves fewer bytes than the kernel must, so it is not the hot path.
    """
    backend = TARGETS[target]
    compiled = build(variant.launch, backend)
    usage, counts = (
        _read_amd(compiled) if backend.backend == "hip" else _read_cuda(compiled, backend)
    )
    costs = {"kernel": variant.key, "target": target, "outside": counts.outside, **usage}
    if not variant.entries:
        return Costs(**costs), counts
    elements = variant.entries / (compiled.metadata.num_warps * backend.warp_size)
    moves = sum(
        size * times for kind in (counts.loads, counts.stores) for size, times in kind.items()
    )
    if moves < variant.moved * elements:
        raise ValueError(
            f"{variant.key} on {target}: the presumed hot path moves {moves} bytes per thread "
            f"for {elements:g} elements of {variant.moved:g} bytes"
        )
    return (
        Costs(
            **costs,
            moved=variant.moved,
            elements=elements,
            instructions=counts.instructions / elements,
            special=counts.special / elements,
            conversions=counts.conversions / elements,
            loads={str(size): times for size, times in counts.loads.items()},
            stores={str(size): times for size, times in counts.stores.items()},
        ),
        counts,
    )


def _read_cuda(compiled: CompiledKernel, backend: GPUTarget) -> tuple[dict[str, Any], Counts]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-ndf", "--print-code", "--print-line-info-inline", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    usage = {
        "compiler": f"triton {triton.__version__}, ptxas {_ptxas(backend.arch)}",
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": int(compiled.metadata.shared),
    }
    return usage, count(read_sass(code), SASS)


@cache
def _ptxas(arch: int) -> str:
    """Return the version of the assembler; older Triton has only one."""
    ask = get_ptxas_version
    printed = ask(arch) if inspect.signature(ask).parameters else ask()
    found = re.search(r"\bV(\d[\d.]*\d)", printed)
    return found[1] if found else "unknown"


def _read_amd(compiled: CompiledKernel) -> tuple[dict[str, Any], Counts]:
    text = compiled.asm["amdgcn"]
    found = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE))
    usage = {
        "compiler": f"triton {triton.__version__}",
        "registers": int(found["vgpr_count"]),
        "spilled_bytes": int(found["private_segment_fixed_size"]),
        "shared_bytes": int(found["group_segment_fixed_size"]),
    }
    return usage, count(read_amdgcn(text), AMDGCN)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def complaints(old: Costs | None, new: Costs) -> list[str]:
    """List regressions.

    Numbers of different compilers are not comparable: then only widths and spills count.
    """
    name = f"{new.kernel} on {new.target}"
    found = []
    if new.spilled_bytes:
        found.append(f"{name} spills {new.spilled_bytes} bytes")
    if old is None:
        return [*found, f"{name} is not in the baseline"]
    for metric, width in new.widths.items():
        if width < old.widths[metric]:
            found.append(f"{name}: {metric} fell from {old.widths[metric]} to {width}")
    if old.compiler == new.compiler:
        for metric, value in new.metrics.items():
            before = old.metrics.get(metric, 0.0)
            if value > before * (1 + TOLERANCE):
                found.append(f"{name}: {metric} rose from {before:g} to {value:g}")
    return found
