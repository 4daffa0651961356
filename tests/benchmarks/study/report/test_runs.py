import math
import subprocess
import sys

import pytest

from benchmarks.study.report.runs import (
    RunFileError,
    Setting,
    baseline_of,
    guided,
    number,
    paired,
    read_study,
    titles,
    trainings,
)


def ap(run):
    return run["ap"]


def test_runs_of_a_method_are_summed_up_over_seeds(groups, make):
    rows = [make("ghm", seed, value) for seed, value in ((2, 0.7), (0, 0.5), (1, 0.3))]
    (group,) = groups(*rows)
    summary = group.summary(ap)
    assert group.seeds == (0, 1, 2)
    assert summary.mean == pytest.approx(0.5)
    # The sample's: squares 0.04 + 0 + 0.04 over 2.
    assert summary.std == pytest.approx(0.2)
    assert (summary.low, summary.high, summary.seeds) == (0.3, 0.7, 3)


def test_one_seed_has_no_deviation_and_null_counts_for_nothing(groups, make):
    (group,) = groups(make(seed=0, ap=0.4), make(seed=1, ap=None))
    assert group.summary(ap) == (0.4, None, 0.4, 0.4, 1)
    assert group.seeds == (0, 1)
    (nothing,) = groups(make(ap=None))
    assert nothing.summary(ap) is None


@pytest.mark.parametrize("value", [None, True, "0.5", math.nan, math.inf])
def test_what_is_no_finite_number_is_none(value):
    assert number(value) is None
    assert number(1) == 1.0


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
def test_what_differs_in_setting_is_not_averaged(groups, make, change):
    assert len(groups(make(seed=0), make(seed=1, **change))) == 2
    assert len(groups(make(seed=0), make(seed=1))) == 1


def test_groups_stay_together_with_the_first_method_at_the_head(groups, make):
    rows = [make("ghm"), make("ghm", section="bins"), make("ce"), make("focal", steps=10)]
    found = groups(*rows, make("focal"), make("focal", section="bins"))
    named = [(group.setting.section, group.setting.steps, group.method) for group in found]
    assert named == [
        ("methods", 600, "focal"),
        ("methods", 600, "ghm"),
        ("methods", 600, "ce"),
        ("methods", 10, "focal"),
        ("bins", 600, "focal"),
        ("bins", 600, "ghm"),
    ]


def test_the_last_row_of_a_seed_counts_over_all_files(write, make):
    first = write(make(ap=0.1), make(ap=0.2), make(seed=1, ap=0.9), name="first.jsonl")
    second = write(make(ap=0.3), make(ap=0.4, section="convergence"), name="second.jsonl")
    study = read_study([first, second])
    assert [run["ap"] for run in study.runs] == [0.3, 0.9, 0.4]
    assert study.replaced == 2


def test_errors_are_kept_aside_until_the_run_succeeds(write, make):
    failed = {key: make()[key] for key in ("section", "data", "detector", "steps")}
    failed = {**failed, "seed": 0, "batch_size": 16, "image_size": [128, 128], "channels": 48}
    mended, never = {**failed, "method": "focal"}, {**failed, "method": "asdn"}
    rows = [{**each, "error": "ValueError: no"} for each in (mended, never)]
    study = read_study([write(*rows, make(ap=0.5))])
    assert [run["method"] for run in study.failures] == ["asdn"]
    assert [run["method"] for run in study.runs] == ["focal"]


def test_an_unfinished_last_line_is_dropped_and_told(write, make):
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
    ],
)
def test_a_damaged_line_names_file_and_line(write, make, line, message):
    path = write(make(), line, make())
    with pytest.raises(RunFileError) as raised:
        read_study([path])
    assert str(raised.value).startswith(f"{path}, {message}")


def test_a_row_says_what_it_lacks(write, make):
    with pytest.raises(RunFileError, match="'seed' is True, expected int"):
        read_study([write(make(seed=True))])
    row = make()
    del row["ap"]
    with pytest.raises(RunFileError, match="neither 'ap' nor 'error'"):
        read_study([write(row)])


def test_a_line_may_hold_any_character(write, make):
    path = write(make(data="voc:a\u2028b"))
    assert read_study([path]).runs[0]["data"] == "voc:a\u2028b"
    path.write_text('{"data": "voc:a\u2028b"}\n{\n')
    with pytest.raises(RunFileError, match="line 1 is no row"):
        read_study([path])


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunFileError, match=r"x\.jsonl is not a text file"):
        read_study([tmp_path / "x.jsonl"])


def test_sections_can_be_chosen(write, make):
    path = write(make(), make(section="bins"))
    study = read_study([path], ["bins"])
    assert [run["section"] for run in study.runs] == ["bins"]
    assert [group.setting.section for group in study.groups()] == ["bins"]
    # The others are there to be compared with.
    assert [group.setting.section for group in study.peers()] == ["methods", "bins"]
    with pytest.raises(RunFileError, match="section 'speed'; sections: methods, bins"):
        read_study([path], ["speed"])


def test_a_difference_is_paired_by_seed(groups, make):
    focal = [make("focal", seed, value) for seed, value in ((0, 0.5), (1, 0.6), (2, 0.9))]
    ghm = [make("ghm", seed, value) for seed, value in ((1, 0.5), (2, 1.0), (3, 0.0))]
    baseline, group = groups(*focal, *ghm)
    difference = paired(group, baseline, ap)
    # Seeds 1 and 2: -0.1 and +0.1; the means alone would differ by -0.17.
    assert difference.mean == pytest.approx(0.0)
    assert (difference.low, difference.high) == pytest.approx((-0.1, 0.1))
    assert difference.seeds == 2
    assert paired(*groups(make("ghm", 0), make("focal", 1)), ap) is None


def test_the_baseline_is_of_the_own_section_or_of_another_with_the_same_setting(groups, make):
    rows = [make("focal", ap=0.1), make("focal", ap=0.2, section="bins")]
    rows += [make("ghm", section="bins"), make("ghm", section="strength")]
    rows += [make("ghm", section="strength", batch_size=8)]
    found = groups(*rows)
    ours = {
        (group.setting.section, group.setting.batch_size): baseline_of(group, found, "focal")
        for group in found
        if group.method == "ghm"
    }
    assert ours["bins", 16].runs[0]["ap"] == 0.2
    assert ours["strength", 16].runs[0]["ap"] == 0.1
    assert ours["strength", 8] is None


def test_disagreements_name_the_seeds(groups, make):
    rows = [make(seed=0), make(seed=1, commit="bbb"), make(seed=2, commit="bbb")]
    (group,) = groups(*rows)
    assert group.disagreements() == {"commit": {"aaa": [0], "bbb": [1, 2]}}
    (group,) = groups(make(seed=0, options={"lr": 1, "bins": 2}), make(seed=1, options={"lr": 1}))
    assert list(group.disagreements()) == ["options"]
    # Where a default has changed, options that differ from it may be the same.
    (group,) = groups(make(seed=0, recipe="a"), make(seed=1, recipe="b"))
    assert group.disagreements() == {"recipe": {"a": [0], "b": [1]}}


def test_one_training_in_several_places_counts_once(make):
    row = make("ghm", ap=0.5, seconds=40.1)
    rows = [row, {**row, "section": "bins"}, {**row, "method": "bins-30"}, {**row, "seed": 1}]
    assert trainings(rows) == 2


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        ({"classification": [2.0, 1.0, 3.0], "bbox_regression": [1.0, 0.5, 1.5]}, True),
        ({"classification": [2.0, 1.0, 3.0], "bbox_regression": [1.0, 0.5, 1.4]}, False),
        ({"classification": [2.0, 1.0, None], "bbox_regression": [1.0, 0.5, 1.4]}, True),
        ({"classification": [2.0, 1.0, 0.0], "bbox_regression": [1.0, 0.5, 0.0]}, True),
        ({"classification": [2.0], "bbox_regression": [1.0]}, False),
        ({"classification": [2.0], "unguided_classification": [3.0]}, True),
        (None, False),
    ],
)
def test_who_is_guided_has_the_curve_of_the_boxes_again(make, curves, expected):
    assert guided(make(curves=curves)) == expected


def test_titles_tell_settings_apart():
    one = Setting("methods", "digits", "fcos", 1600, 16, (128, 128), 48)
    other, alone = one._replace(channels=64), one._replace(steps=600)
    found = titles([one, other, alone])
    assert found[one] == "digits, fcos, 1,600 steps, batch 16, 128x128 pixels, 48 channels"
    assert found[other].endswith("64 channels")
    assert found[alone] == "digits, fcos, 600 steps"


def test_reading_and_tables_load_neither_torch_nor_matplotlib(write, make):
    code = (
        "import sys; from pathlib import Path; from benchmarks.study.report import tables;"
        "from benchmarks.study.report.runs import read_study;"
        "groups = read_study([Path(sys.argv[1])]).groups();"
        "print(tables.methods(groups, 'focal'), tables.policies(groups));"
        "print(sorted({'torch', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(write(make()))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
