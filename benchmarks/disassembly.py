"""Reads the text that disassemblers print: blocks, the loop, and what is in it.

The rules, which make 'instructions an element' mean something:

- The hot path is the loop (blocks that can reach themselves) with the most instructions; in a
  kernel without one, everything that can be reached.
- Every block of the hot path counts once, those behind a branch too, as some lane takes it.
- Calls are not followed, nor are branches that only diverged warps take (`BRA.DIV`), and a block
  that ends in a call is left out: compilers put there what rare operands need, as the division of
  subnormal numbers.
- What occupies no unit (`NOP`, waiting) is not an instruction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction: what it does, where it may go next."""

    opcode: str
    target: str | None = None  # the label it may jump to
    falls_through: bool = True
    calls: bool = False
    place: str = ""  # the file and line that it was compiled from


@dataclass
class Block:
    """Instructions that run one after the other; `next` are positions of blocks."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """What one thread executes on the hot path, and the instructions outside it."""

    loops: bool
    instructions: int
    special: int
    conversions: int
    loads: dict[int, int]  # bytes of an access: how many
    stores: dict[int, int]
    outside: int
    opcodes: dict[str, int]
    places: dict[str, int]


Line = str | Instruction  # a label, or an instruction

_LABEL = re.compile(r"^([.$\w]+):")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_SASS_PLACE = re.compile(r'^\s+//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
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
            base = opcode.split(".")[0]
            before, _, after = operands.partition("`(")
            jumps = base in ("BRA", "JMP") and not opcode.startswith("BRA.DIV")
            always = not guard and not before.strip()
            ends = base in ("EXIT", "RET") and not guard
            yield Instruction(
                opcode,
                after.partition(")")[0] if jumps else None,
                not ends and not (jumps and always),
                base == "CALL",
                place,
            )


def read_amdgcn(text: str) -> Iterator[Line]:
    """The lines of an AMDGCN listing, up to the end of its function."""
    place = ""
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            return
        if found := _AMD_PLACE.match(line):
            place = f"{found[1]}:{found[2]}"
        elif label := _LABEL.match(line):
            yield label[1]
        elif (match := _AMD.match(line)) and not line.lstrip().startswith("."):
            opcode, operands = match.groups()
            jumps = opcode.startswith(("s_branch", "s_cbranch"))
            ends = opcode in ("s_endpgm", "s_branch", "s_setpc_b64")
            to = operands.strip() if jumps else None
            yield Instruction(opcode, to, not ends, opcode == "s_swappc_b64", place)


def blocks(lines: Iterable[Line]) -> list[Block]:
    """Basic blocks, in the order of the listing; the first is the entry."""
    found, starts = [Block()], {}
    for line in lines:
        last = found[-1].instructions
        if isinstance(line, str):
            if last:
                found.append(Block())
            starts[line] = len(found) - 1
            continue
        last.append(line)
        if line.target is not None or not line.falls_through:
            found.append(Block())
    for position, block in enumerate(found):
        last = block.instructions
        if (not last or last[-1].falls_through) and position + 1 < len(found):
            block.next.append(position + 1)
        if last and last[-1].target is not None:
            block.next.append(starts[last[-1].target])
    return found


def hot_path(graph: list[Block]) -> tuple[list[Block], bool]:
    """The blocks of the largest loop, and whether there is one; else all that can be reached."""
    rare = {
        position
        for position, block in enumerate(graph)
        if any(instruction.calls for instruction in block.instructions)
    }
    reached = _reach(graph, [0], rare)
    loops = [loop for start in reached if (loop := _loop(graph, start, rare))]
    if not loops:
        return [graph[position] for position in sorted(reached)], False
    largest = max(loops, key=lambda loop: sum(len(graph[p].instructions) for p in loop))
    return [graph[position] for position in sorted(largest)], True


def _reach(graph: list[Block], starts: Iterable[int], rare: set[int]) -> set[int]:
    reached: set[int] = set()
    waiting = [start for start in starts if start not in rare]
    while waiting:
        position = waiting.pop()
        if position not in reached:
            reached.add(position)
            waiting += [after for after in graph[position].next if after not in rare]
    return reached


def _loop(graph: list[Block], start: int, rare: set[int]) -> set[int]:
    """The blocks that `start` reaches and that reach it."""
    forward = _reach(graph, graph[start].next, rare)
    if start not in forward:
        return set()
    return {p for p in forward if start in _reach(graph, graph[p].next, rare)}


def count(lines: Iterable[Line], backend: str) -> Counts:
    """Count the hot path of a listing; `backend` is `cuda` or `hip`."""
    graph = blocks(lines)
    path, loops = hot_path(graph)
    units = _SASS_UNITS if backend == "cuda" else _AMD_UNITS
    hot = [i for block in path for i in block.instructions if not units.idle(i.opcode)]
    opcodes = Counter(instruction.opcode for instruction in hot)
    everything = sum(
        not units.idle(instruction.opcode)
        for position in _reach(graph, [0], set())
        for instruction in graph[position].instructions
    )
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode, times in opcodes.items():
        if units.load.match(opcode):
            loads[units.width(opcode)] += times
        if units.store.match(opcode):
            stores[units.width(opcode)] += times
    total = opcodes.total()
    return Counts(
        loops,
        total,
        _total(opcodes, units.special),
        _total(opcodes, units.conversion),
        dict(loads),
        dict(stores),
        everything - total,
        dict(opcodes.most_common()),
        dict(Counter(instruction.place for instruction in hot)),
    )


def _total(opcodes: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(times for opcode, times in opcodes.items() if pattern.match(opcode))


@dataclass(frozen=True)
class _Units:
    """Which opcodes are which."""

    nothing: re.Pattern[str]
    special: re.Pattern[str]
    conversion: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]
    widths: tuple[tuple[str, int], ...]  # the first that is found in an opcode

    def idle(self, opcode: str) -> bool:
        return self.nothing.match(opcode) is not None

    def width(self, opcode: str) -> int:
        return next((size for part, size in self.widths if part in opcode), 4)


_SASS_UNITS = _Units(
    nothing=re.compile(r"NOP\b"),
    special=re.compile(r"MUFU\b"),
    conversion=re.compile(r"(F2I|I2F|F2F|FRND|F2IP)\b"),
    load=re.compile(r"(LDG|LD)\b"),
    store=re.compile(r"(STG|ST)\b"),
    widths=((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1)),
)
_AMD_UNITS = _Units(
    nothing=re.compile(r"s_(nop|waitcnt|delay_alu)"),
    special=re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    conversion=re.compile(r"v_cvt_"),
    load=re.compile(r"(global|buffer|flat)_load_"),
    store=re.compile(r"(global|buffer|flat)_store_"),
    widths=(
        ("dwordx4", 16),
        ("dwordx3", 12),
        ("dwordx2", 8),
        ("dword", 4),
        ("short", 2),
        ("byte", 1),
    ),
)
