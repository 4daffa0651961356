"""Thresholds as a table for a terminal: the same whether a checkpoint or a file is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

HEAD = ("class", "threshold", "from", "positives", "held-out", "precision", "recall")
LEFT_ALIGNED = (0, 2)


class Evidence(Protocol):
    """A class's threshold with what speaks for it, in a checkpoint or in a card."""

    @property
    def name(self) -> str:
        """The class."""

    @property
    def threshold(self) -> float:
        """The score, in [0, 1]."""

    @property
    def source(self) -> str:
        """`policy`, `prior`, `fallback` or `manual`."""

    @property
    def support(self) -> int:
        """Positive anchors in training."""

    @property
    def ground_truths(self) -> int:
        """Held-out boxes."""

    @property
    def precision(self) -> float | None:
        """At the threshold, held-out."""

    @property
    def recall(self) -> float | None:
        """At the threshold, held-out."""


def threshold_table(policy: str, entries: Iterable[Evidence]) -> str:
    """One line a class: its threshold, where that comes from, and the evidence.

    Args:
        policy: What chose the thresholds that were not set by hand.
        entries: The classes in order.
    """
    entries = list(entries)
    rows = [
        (
            entry.name,
            f"{entry.threshold:.4f}",
            entry.source,
            str(entry.support),
            str(entry.ground_truths),
            _percent(entry.precision),
            _percent(entry.recall),
        )
        for entry in entries
    ]
    by_hand = any(entry.source == "manual" for entry in entries)
    title = f"thresholds by policy {policy!r}{', or by hand (manual)' if by_hand else ''}"
    return f"{title}\n{_aligned([HEAD, *rows])}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
