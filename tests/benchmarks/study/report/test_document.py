import re

import pytest
from PIL import Image

from benchmarks.study.report.document import pictures, write_report
from benchmarks.study.report.runs import read_study


@pytest.fixture
def study(write, make):
    """Two methods, one with every field of a row, and a failed run."""
    rich = make(
        "ghm",
        bins=30,
        strength=0.25,
        ap_per_class={"a": [0.5, 0.8]},
        gradient_norms={"positives": [3, 1], "negatives": [90, 2]},
        curves={"step": [1, 2], "classification": [2.0, 1.5], "bbox_regression": [1.0, 0.5]},
        policies={"f1": {"macro_f1": 0.7}, "single": {"macro_f1": 0.6}},
    )
    failed = {**make("asdn"), "error": "ValueError: it looks once"}
    return read_study([write(make("focal", ap=0.4), rich, failed, "", '{"data', end="")])


def test_a_report_has_its_pictures_and_tells_what_is_missing(study, tmp_path):
    out = tmp_path / "deep" / "report"
    written = write_report(study, out)
    text = written[0].read_text()
    assert written[0] == out / "report.md"
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert [out / name for name in shown] == written[1:]
    assert shown == [
        "ap_methods.png",
        "losses_methods.png",
        "policies_methods.png",
        "gradient_norms_methods.png",
        "reformulated_methods.png",
        "contribution_methods.png",
        "initial_loss.png",
    ]
    assert {path.name for path in out.iterdir()} == {"report.md", *shown}
    for path in written[1:]:
        with Image.open(path) as picture:
            assert picture.width > 400
    missing = text.partition("### Not drawn")[2].partition("## ")[0].split("\n- ")[1:]
    assert [line.strip() for line in missing] == [
        "AP against unit regions (bins) of GHM-C: there is no AP by bins in section 'bins'.",
        "AP against strength of GHM-C: there is no AP by strength in section 'strength'.",
    ]
    # Losses, policies and gradient norms.
    assert text.count("Without such rows: focal (digits, retinanet, 600 steps).") == 3
    assert "+0.100" in text
    assert "The unfinished last line of" in text
    assert "ValueError: it looks once" in text
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "Methods",
        "AP by class",
        "Threshold policies",
        "Initial loss by prior",
        "Figures",
        "Provenance",
        "Failed runs",
    ]


def test_a_sweep_is_drawn_once_and_not_as_a_comparison_of_methods(write, make, tmp_path):
    rows = [make("focal"), make("s0.5", section="strength", strength=0.5)]
    written = write_report(read_study([write(*rows)]), tmp_path / "out")
    names = [path.name for path in written[1:]]
    assert names == ["ap_methods.png", "ap_against_strength.png", "initial_loss.png"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("strength", "reg_strength"), "strength of GHM-C and GHM-R"),
        (("strength",), "strength of GHM-C"),
    ],
)
def test_the_axis_names_the_strengths_that_vary(write, make, names, label):
    options = dict.fromkeys(names, 0.5)
    rows = [make("ghm", section="strength", strength=0.25)]
    rows += [make("ghm-s0.5", section="strength", strength=0.5, options=options)]
    study = read_study([write(*rows, make("focal"))])
    (picture,) = (each for each in pictures(study, "focal") if each.name == "ap_against_strength")
    assert picture.title == f"AP against {label}"
    assert picture.draw().axes[0].get_xlabel() == label


def test_guided_methods_whose_classification_is_not_known_are_named(write, make, tmp_path):
    boxes = [1.0, 0.5]
    earlier = {"step": [1, 2], "classification": boxes, "bbox_regression": boxes}
    now = {**earlier, "unguided_classification": [4.0, 3.0]}
    rows = [make("focal"), make("ghm", curves=now), make("ghm-s0", curves=earlier)]
    text = write_report(read_study([write(*rows)]), tmp_path / "out")[0].read_text()
    caption = text.partition("![Loss curves (methods)]")[2].partition("### ")[0]
    assert "as it was before" in caption
    assert "not recorded of: ghm-s0 (digits, retinanet, 600 steps)." in caption
    assert "Without such rows: focal (digits, retinanet, 600 steps)." in caption


@pytest.mark.parametrize(
    "names", [("a b", "a_b"), ("é", "ü"), ("A", "a"), ("bins", "against_bins")]
)
def test_no_picture_replaces_another(write, make, tmp_path, names):
    rows = [make(section=name, bins=5) for name in names]
    written = write_report(read_study([write(*rows)]), tmp_path / "out")
    pictures = [path.name for path in written[1:]]
    assert len({name.lower() for name in pictures}) == len(pictures) == 3
    assert re.findall(r"!\[.*\]\((.*)\)", written[0].read_text()) == pictures
