import pytest

from benchmarks.study.report.runs import (
    RunFileError,
    baseline_of,
    by_setting,
    is_guided,
    read_study,
)


@pytest.mark.parametrize(
    "change",
    [
        {"section": "convergence"},
        {"data": "voc:bccd"},
        {"detector": "fcos"},
        {"steps": 1600},
        {"batch_size": 8},
        {"image_size": [128, 160]},
        {"channels": 64},
    ],
)
def test_rows_of_different_settings_are_not_averaged(frame, make, change):
    assert len(list(by_setting(frame(make(seed=0), make(seed=1, **change))))) == 2
    assert len(list(by_setting(frame(make(seed=0), make(seed=1))))) == 1


def test_settings_are_adjacent_with_the_baseline_first(frame, make):
    rows = [make("ghm", 1), make("ghm"), make("ghm", section="bins"), make("ce")]
    rows += [make("focal", steps=10), make("focal"), make("focal", section="bins")]
    found = frame(*rows)
    assert list(zip(found.section, found.steps, found.method, found.seed, strict=True)) == [
        ("methods", 600, "focal", 0),
        ("methods", 600, "ghm", 0),
        ("methods", 600, "ghm", 1),
        ("methods", 600, "ce", 0),
        ("methods", 10, "focal", 0),
        ("bins", 600, "focal", 0),
        ("bins", 600, "ghm", 0),
    ]


def test_the_last_row_of_a_seed_counts_over_all_files(write, make):
    first = write(make(ap=0.1), make(ap=0.2), make(seed=1, ap=0.9), name="first.jsonl")
    second = write(make(ap=0.3), make(ap=0.4, section="convergence"), name="second.jsonl")
    study = read_study([first, second])
    assert list(study.runs.ap) == [0.3, 0.9, 0.4]
    assert study.replaced == 2


def test_errors_are_kept_apart_until_the_run_succeeds(write, make):
    rows = [{**make(method), "error": "ValueError: no"} for method in ("focal", "asdn")]
    study = read_study([write(*rows, make(ap=0.5))])
    assert [run["method"] for run in study.failures] == ["asdn"]
    assert list(study.runs.method) == ["focal"]


def test_an_unfinished_last_line_is_dropped_and_reported(write, make):
    path = write(make(), '{"section": "meth', end="")
    study = read_study([path])
    assert len(study.runs) == 1
    assert study.unfinished == [str(path)]
    assert read_study([write(make(), "", make("ce"))]).unfinished == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"section": ', "line 2 is damaged"),
        ("[1, 2]", "line 2 is no row of a study: '[1, 2]' is not an object"),
        ('{"section": "a"}', "line 2 is no row of a study: 'data' is None, expected str"),
        (
            '{"section": "a", "data": "b\u2028", "detector": "c", "method": "d", "seed": true}',
            "line 2 is no row of a study: 'seed' is True, expected int",
        ),
        (
            '{"section":"a","data":"b","detector":"c","method":"d","seed":1,"steps":1}',
            "line 2 is no row of a study: it has neither 'ap' nor 'error'",
        ),
    ],
)
def test_a_damaged_line_is_refused_with_file_and_line(write, make, line, message):
    path = write(make(data="voc:a\u2028b"), line, make())
    with pytest.raises(RunFileError) as raised:
        read_study([path])
    assert str(raised.value).startswith(f"{path}, {message}")


def test_sections_can_be_selected(write, make):
    path = write(make(), make(section="bins"))
    study = read_study([path], ["bins"])
    assert list(study.runs.section) == ["bins"]
    assert list(study.everything.section) == ["methods", "bins"]
    with pytest.raises(RunFileError, match="section 'speed'; sections: methods, bins"):
        read_study([path], ["speed"])


def test_the_baseline_is_of_the_own_section_or_of_another_with_the_same_setting(frame, make):
    rows = [make("focal", ap=0.1), make("focal", ap=0.2, section="bins", batch_size=None)]
    rows += [make("focal", ap=0.3, section="bins")]
    rows += [make("ghm", section=name, batch_size=size) for name, size in (
        ("bins", 16), ("strength", 16), ("strength", 8), ("strength", None),
    )]  # fmt: skip
    found = frame(*rows)
    aps = [
        list(baseline_of(part, found, "focal").ap)
        for section, _, part in by_setting(found)
        if "ghm" in set(part.method)
    ]
    assert aps == [[0.3], [0.1], [], [0.2]]


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"classification": [2.0, 1.0, 3.0], "bbox_regression": [1.0, 0.5, 1.5]}, True),
        ({"classification": [2.0, 1.0, 3.0], "bbox_regression": [1.0, 0.5, 1.4]}, False),
        ({"classification": [2.0, 1.0, None], "bbox_regression": [1.0, 0.5, 1.4]}, True),
        ({"classification": [2.0, 1.0, 0.0], "bbox_regression": [1.0, 0.5, 0.0]}, True),
        ({"classification": [2.0], "bbox_regression": [1.0]}, False),
        ({"classification": [2.0], "unguided_classification": [3.0]}, True),
        ({}, False),
    ],
)
def test_guided_runs_are_recognised_by_their_curves(curves, expected):
    assert is_guided(curves) == expected


def test_titles_tell_settings_of_a_section_apart(frame, make):
    found = frame(make(steps=1600), make(steps=1600, channels=64), make())
    assert list(found.title) == [
        "digits, retinanet, 1,600 steps, batch 16, 128x128 pixels, 48 channels",
        "digits, retinanet, 1,600 steps, batch 16, 128x128 pixels, 64 channels",
        "digits, retinanet, 600 steps",
    ]
