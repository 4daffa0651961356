from ghm_triton.tables import percent, table


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
