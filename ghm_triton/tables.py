"""Text and tables for a terminal."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Collection, Iterable, Sequence

_RULE = "    \n    \n -- \n" + "    \n" * 5  # a rich box with a line below the head only


def printable(text: str) -> str:
    r"""Escape what a terminal would act on, in text that comes from a file or a service.

    Control characters (escape sequences begin with one, and a newline forges a line), marks that
    reverse the direction of text, and what is no character are written as in Python's literals.

    Example:
        >>> print(printable("cat\x1b[2J\nPROBLEM"))
        cat\x1b[2J\nPROBLEM
    """
    return "".join(
        character
        if character.isprintable() or _is_harmless(character)
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def printable_lines(text: str) -> str:
    """Escape each line of a text with `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def _is_harmless(character: str) -> bool:
    # Spaces of other widths, and the joiners of emoji and of Arabic and Indic scripts.
    return unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, left: Collection[int] = (0,)
) -> str:
    """Format rows as a table: columns two spaces apart, and a rule below the head.

    Args:
        head: Titles of the columns.
        rows: The cells, formatted with `str` and `printable`.
        left: Columns aligned to the left; the others are aligned to the right.

    Returns:
        Lines without trailing spaces, and without a newline at the end.

    Example:
        >>> print(table(("class", "AP"), [("cat", "0.512"), ("dog", "-")]))
        class     AP
        ------------
        cat    0.512
        dog        -
    """
    from rich.box import Box  # rich takes 0.1 s to import, and most commands print no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=Box(_RULE, ascii=True), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, title in enumerate(head):
        grid.add_column(
            Text(printable(title)), justify="left" if column in left else "right", no_wrap=True
        )
    for row in rows:
        grid.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def percent(value: float | None) -> str:
    """Format a share as a percentage, or None as a dash.

    Example:
        >>> percent(0.875), percent(None)
        ('87.5 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"
