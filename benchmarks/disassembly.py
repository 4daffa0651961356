"""Reads what disassemblers print: basic blocks, the loop among them, and what is in it.

The rules, which make 'instructions an element' mean something:

- The hot path is the largest loop (blocks that can reach themselves); in a kernel without one,
  every block on a way from the entry to the exit.
- Each of its blocks counts once, those behind a branch too, as some lane takes it.
- Subroutines, and the blocks that do nothing but call one, are left out: compilers put there what
  rare operands need, such as the division of subnormal numbers. So are branches that only diverged
  warps take (`BRA.DIV`).
- What occupies no unit (`NOP`, waiting) is not an instruction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction: what it does, where it may go next, where it comes from.

    Args:
        opcode: With its suffixes.
        target: The label that it may jump to or call.
        falls_through: Whether the next instruction may follow.
        returns: Whether it ends a subroutine.
        calls: Whether it comes back from its target, if that ever returns.
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
    """Instructions that run one after the other; `next` are positions of blocks."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    @property
    def last(self) -> Instruction | None:
        """The one that decides what follows."""
        return self.instructions[-1] if self.instructions else None


@dataclass(frozen=True)
class Counts:
    """What one thread executes when it passes once over the hot path.

    Args:
        loops: Whether the hot path is a loop.
        instructions: All of them.
        special: Special functions: `MUFU`; on AMD `v_exp`, `v_log`, `v_rcp` and the like.
        conversions: Between number formats, where these share the unit of special functions.
        loads: From global memory, how many of each width in bytes.
        stores: To global memory, alike.
        outside: Instructions that the hot path leaves out: before, after, rare.
        opcodes: How often each, most frequent first.
        places: How many instructions from each line of source.
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
    """The lines of what `nvdisasm --print-code --print-line-info-inline` prints."""
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
        raise ValueError(f"{opcode} goes where only the GPU knows: the loop cannot be told")
    if base in ("EXIT", "RET"):
        return Instruction(opcode, None, guarded, base == "RET", place=place)
    jump = _SASS_TARGET.match(operands)
    if base not in ("BRA", "JMP", "CALL") or opcode.startswith("BRA.DIV") or jump is None:
        return Instruction(opcode, calls=base == "CALL", place=place)
    # A condition is a guard or an operand before the target.
    falls_through = guarded or bool(jump[1].strip()) or base == "CALL"
    return Instruction(opcode, jump[2], falls_through, calls=base == "CALL", place=place)


def read_amdgcn(text: str) -> Iterator[Line]:
    """The lines of an AMDGCN listing."""
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
    """Basic blocks, in the order of the listing; the first is the entry."""
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
    """The blocks of the largest loop and True; without a loop, those from entry to exit."""
    rare = {position for position in range(len(graph)) if _calls_subroutine(graph, position)}
    reached = _reach(graph, [0], rare)
    loops = [loop for start in reached if (loop := _loop(graph, start, rare))]
    if loops:
        chosen = max(loops, key=lambda loop: sum(len(graph[p].instructions) for p in loop))
    else:
        chosen = reached
    return [graph[position] for position in sorted(chosen)], bool(loops)


def _calls_subroutine(graph: list[Block], position: int) -> bool:
    """Whether a block calls what returns; ptxas also calls where it means to jump."""
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
    """The blocks that `start` reaches and that reach it."""
    forward = _reach(graph, graph[start].next, without)
    if start not in forward:
        return set()
    return {p for p in forward if start in _reach(graph, graph[p].next, without)}


@dataclass(frozen=True)
class Dialect:
    """Which opcodes are which."""

    idle: re.Pattern[str]
    special: re.Pattern[str]
    conversion: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]
    widths: tuple[tuple[str, int], ...]  # the first that is found in an opcode; else 4 bytes

    def width(self, opcode: str) -> int:
        """Bytes that each lane moves."""
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
