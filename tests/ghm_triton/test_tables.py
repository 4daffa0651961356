import pytest

from ghm_triton.tables import percent, printable, printable_lines, table


def test_columns_are_aligned_whatever_the_cells_hold():
    """Brackets are no markup, and a wide character takes two columns."""
    rows = [("[bold]x[/bold]", 1), ("\u732b", 22), ("", "-")]
    assert table(("class", "n", "from"), [(*row, "prior") for row in rows], left=(0, 2)) == (
        "class            n  from\n"
        "-------------------------\n"
        "[bold]x[/bold]   1  prior\n"
        "\u732b              22  prior\n"
        "                 -  prior"
    )


def test_a_long_cell_is_neither_wrapped_nor_cut():
    line = table(("x",), [("word " * 100,)]).splitlines()[-1]
    assert line == ("word " * 100).rstrip()


def test_without_rows_the_head_remains():
    assert table(("class", "AP"), []) == "class  AP\n---------"


def test_a_share_that_is_not_known_is_a_dash():
    assert [percent(share) for share in (0.0, 1 / 3, None)] == ["0.0 %", "33.3 %", "-"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\r\nPROBLEM\tb\x85\u2028", r"a\r\nPROBLEM\tb\x85\u2028"),
        ("\x9b31m", r"\x9b31m"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),
        ("\ud800\ufffe", r"\ud800\ufffe"),
    ],
    ids=["escape sequences", "forged lines", "C1", "reversed text", "no characters"],
)
def test_what_a_terminal_would_act_on_is_escaped(text, shown):
    assert printable(text) == shown
    assert table((text,), [(text,)]).splitlines() == [shown, "-" * len(shown), shown]


@pytest.mark.parametrize("name", ["na\u00efve", "\u732b", "\U0001f468\u200d\U0001f52c", "a\u3000b"])
def test_names_in_any_script_stay_as_they_are(name):
    assert printable(name) == name


def test_text_of_several_lines_may_keep_them():
    assert printable_lines("a\nb\x1b") == "a\nb\\x1b"
