"""Parse disassembly into basic blocks, find the hot path and count its instructions.

Rules of counting:

- The hot path is the largest loop (blocks that can reach themselves); in a kernel without one,
  every block on a path from the entry to the exit.
- Each of its blocks counts once, including those behind a branch, as some lane takes it.
- Subroutines, and blocks that only call one, are excluded: compilers place rare cases there, such
  as the division of subnormal numbers. So are branches that only diverged warps take (`BRA.DIV`).
- `NOP` and waits, which occupy no unit, are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        opcode: Opcode with its suffixes.
        target: Label that it may jump to or call.
        falls_through: Whether the next instruction may follow.
        returns: Whether it ends a subroutine.
        calls: Whether it is a call.
        place: File and line of the source.
    """

    opcode: str
    target: str | None = None
    falls_through: bool = True
    returns: bool = False
    calls: bool = False
    place: str = ""


@dataclass
class Block:
    """A basic block; `next` are positions of successor blocks."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def last(self) -> Instruction | None:
        """The last instruction, which determines the successors."""
        return self.instructions[-1] if self.instructions else None


@dataclass(frozen=True)
class Counts:
    """Counts per thread and pass over the hot path.

    Args:
        loops: Whether the hot path is a loop.
        instructions: All instructions.
        special: Special functions: `MUFU`; on AMD `v_exp`, `v_log`, `v_rcp` and the like.
        conversions: Conversions of number formats that use the unit of special functions.
        loads: Loads from global memory by width in bytes.
        stores: Stores to global memory by width in bytes.
        outside: Instructions outside the hot path.
        opcodes: Number of each opcode, most frequent first.
        places: Number of instructions by line of source.
    """

    loops: bool
    instructions: int
    special: int
    conversions: int
    loads: dict[int, int]
    stores: dict[int, int]
    outside: int
    opcodes: dict[str, int]
    places: dict[str, int]


Line = str | Instruction  # a label, or an instruction

_LABEL = re.compile(r"^([.$\w]+):")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_PLACE = re.compile(r'^\s+//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
_SASS_TARGET = re.compile(r"(.*)`\(([^)]+)\)")
_AMD = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
_AMD_PLACE = re.compile(r"^\s+\.loc\s.*;\s(\S+?):(\d+):")


def read_sass(text: str) -> Iterator[Line]:
    """Parse the output of `nvdisasm --print-code --print-line-info-inline`."""
    place, placed = "", False  # of several places in a row the first is the innermost
    for line in text.splitlines():
        if label := _LABEL.match(line):
            yield label[1]
        elif found := _SASS_PLACE.match(line):
            place, placed = place if placed else f"{found[1]}:{found[2]}", True
        elif match := _SASS.match(line):
            placed = False
            guard, opcode, operands = match.groups()
            yield _sass(guard is not None, opcode, operands, place)


def _sass(guarded: bool, opcode: str, operands: str, place: str) -> Instruction:
    base = opcode.split(".")[0]
    if base in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"{opcode} has no static target, so the loop cannot be found")
    if base in ("EXIT", "RET"):
        return Instruction(opcode, None, guarded, base == "RET", place=place)
    jump = _SASS_TARGET.match(operands)
    if base not in ("BRA", "JMP", "CALL") or opcode.startswith("BRA.DIV") or jump is None:
        return Instruction(opcode, calls=base == "CALL", place=place)
    # A condition is a guard or an operand before the target.
    falls_through = guarded or bool(jump[1].strip()) or base == "CALL"
    return Instruction(opcode, jump[2], falls_through, calls=base == "CALL", place=place)


def read_amdgcn(text: str) -> Iterator[Line]:
    """Parse an AMDGCN listing."""
    place = ""
    for line in text.splitlines():
        if found := _AMD_PLACE.match(line):
            place = f"{found[1]}:{found[2]}"
        elif label := _LABEL.match(line):
            yield label[1]
        elif match := _AMD.match(line):
            opcode, operands = match.groups()
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            yield Instruction(
                opcode,
                operands.strip() if jumps else None,
                opcode not in ("s_endpgm", "s_branch", "s_setpc_b64"),
                opcode == "s_setpc_b64",
                opcode == "s_swappc_b64",
                place,
            )


def blocks(lines: Iterable[Line]) -> list[Block]:
    """Split a listing into basic blocks, in its order; the first is the entry."""
    found: list[Block] = [Block()]
    starts: dict[str, int] = {}
    for line in lines:
        last = found[-1].last
        if last and (isinstance(line, str) or last.target or last.calls or not last.falls_through):
            found.append(Block())
        if isinstance(line, str):
            starts[line] = len(found) - 1
        else:
            found[-1].instructions.append(line)
    for position, block in enumerate(found):
        last = block.last
        if (last is None or last.falls_through) and position + 1 < len(found):
            block.next.append(position + 1)
        if last and last.target is not None:
            block.next.append(starts[last.target])
    return found


def hot_path(graph: list[Block]) -> tuple[list[Block], bool]:
    """Return the blocks of the largest loop and True; without one, those from entry to exit."""
    rare = {position for position in range(len(graph)) if _calls_subroutine(graph, position)}
    reached = _reach(graph, [0], rare)
    loops = [loop for start in reached if (loop := _loop(graph, start, rare))]
    if loops:
        chosen = max(loops, key=lambda loop: sum(len(graph[p].instructions) for p in loop))
    else:
        chosen = reached
    return [graph[position] for position in sorted(chosen)], bool(loops)


def _calls_subroutine(graph: list[Block], position: int) -> bool:
    """Whether a block calls a subroutine that returns; ptxas also uses calls as jumps."""
    last = graph[position].last
    if last is None or not last.calls:
        return False
    callee = graph[position].next[-1:] if last.target else []
    ends = [graph[p].last for p in _reach(graph, callee, set())]
    return not callee or any(end.returns for end in ends if end)


def _reach(graph: list[Block], starts: Iterable[int], without: set[int]) -> set[int]:
    reached: set[int] = set()
    waiting = list(starts)
    while waiting:
        position = waiting.pop()
        if position not in reached and position not in without:
            reached.add(position)
            waiting += graph[position].next
    return reached


def _loop(graph: list[Block], start: int, without: set[int]) -> set[int]:
    """Blocks that are reachable from `start` and reach it."""
    forward = _reach(graph, graph[start].next, without)
    if start not in forward:
        return set()
    return {p for p in forward if start in _reach(graph, graph[p].next, without)}


@dataclass(frozen=True)
class Dialect:
    """Patterns of opcodes by kind."""

    idle: re.Pattern[str]
    special: re.Pattern[str]
    conversion: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]
    widths: tuple[tuple[str, int], ...]  # the first that is found in an opcode; else 4 bytes

    def width(self, opcode: str) -> int:
        """Return the bytes per lane of an access."""
        return next((size for part, size in self.widths if part in opcode), 4)


SASS = Dialect(
    idle=re.compile(r"NOP\b"),
    special=re.compile(r"MUFU\b"),
    conversion=re.compile(r"(F2I|I2F|F2F|I2I|FRND)\b"),
    load=re.compile(r"LDG?\b"),
    store=re.compile(r"STG?\b"),
    widths=((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1)),
)
AMDGCN = Dialect(
    idle=re.compile(r"s_(nop|waitcnt|delay_alu)"),
    special=re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    conversion=re.compile(r"(?!)"),
    load=re.compile(r"(global|buffer|flat)_load_"),
    store=re.compile(r"(global|buffer|flat)_store_"),
    widths=(("x4", 16), ("x3", 12), ("x2", 8), ("dword", 4), ("short", 2), ("byte", 1)),
)


def count(lines: Iterable[Line], dialect: Dialect) -> Counts:
    """Count the hot path of a listing."""
    graph = blocks(lines)
    path, loops = hot_path(graph)
    everything = (graph[position] for position in sorted(_reach(graph, [0], set())))
    hot, all_of_it = _busy(path, dialect), _busy(everything, dialect)
    opcodes = Counter(instruction.opcode for instruction in hot)
    return Counts(
        loops=loops,
        instructions=len(hot),
        special=sum(n for opcode, n in opcodes.items() if dialect.special.match(opcode)),
        conversions=sum(n for opcode, n in opcodes.items() if dialect.conversion.match(opcode)),
        loads=_accesses(opcodes, dialect.load, dialect),
        stores=_accesses(opcodes, dialect.store, dialect),
        outside=len(all_of_it) - len(hot),
        opcodes=dict(opcodes.most_common()),
        places=dict(Counter(instruction.place for instruction in hot)),
    )


def _busy(path: Iterable[Block], dialect: Dialect) -> list[Instruction]:
    each = (instruction for block in path for instruction in block.instructions)
    return [instruction for instruction in each if not dialect.idle.match(instruction.opcode)]


def _accesses(opcodes: Counter[str], pattern: re.Pattern[str], dialect: Dialect) -> dict[int, int]:
    found: Counter[int] = Counter()
    for opcode, times in opcodes.items():
        if pattern.match(opcode):
            found[dialect.width(opcode)] += times
    return dict(sorted(found.items(), reverse=True))
