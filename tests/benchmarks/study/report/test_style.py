from benchmarks.study.report.style import legend_below, log_scale, panels, styles_of


def test_styles_are_of_methods_alone_and_all_different(groups, make):
    names = [f"method {place}" for place in range(28)]
    rows = [make(name) for name in names] + [make("ghm", strength=1.0), make("focal"), make("ce")]
    styles = styles_of(groups(*rows, make("full", strength=1.0), make("too", strength=1.0)))
    assert styles["ce"].color == "#7f7f7f"
    assert styles["ghm"].color == "#0072B2"
    assert styles["full"].color == "#D55E00"
    assert styles["too"].color != "#D55E00"
    assert len({styles[name] for name in [*names, "ghm", "focal", "ce", "full"]}) == 32
    assert set(styles) == {*names, "ghm", "focal", "ce", "full", "too"}


def test_panels_beyond_the_count_are_hidden():
    figure, grid = panels(4, 2.0, 2.0)
    assert len(grid) == 4
    assert [axes.get_visible() for axes in figure.axes] == [True] * 4 + [False] * 2


def test_a_legend_has_every_label_once_and_fits():
    figure, grid = panels(2, 3.0, 2.0)
    for axes in grid:
        for place in range(8):
            axes.plot([0, 1], [0, 1], label=f"a rather long label {place}")
    legend_below(figure, grid)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 8
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert panels(1, 3.0, 2.0)[0].legends == []


def labels(low, high):
    figure, (axes,) = panels(1, 3.0, 3.0)
    axes.plot([0, 1], [low, high])
    log_scale(axes)
    figure.draw_without_rendering()
    lower, upper = axes.get_ylim()
    ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
    found = {tick.get_loc(): tick.label1.get_text() for tick in ticks}
    return [found[place] for place in sorted(found) if lower <= place <= upper]


def test_a_logarithmic_axis_speaks_plain_numbers():
    assert [text for text in labels(0.15, 2.5) if text] == ["0.2", "0.3", "0.5", "1", "2"]
    near = labels(0.55, 0.95)
    assert len(near) >= 3
    assert all(float(text) for text in near)
