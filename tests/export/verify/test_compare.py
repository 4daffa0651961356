from __future__ import annotations

import numpy as np
import pytest

from export.verify.compare import Comparison, Detections, Proposals, Setting, Tolerance, compare

TOLERANCE = Tolerance()
SETTING = Setting(("cat", "dog"), np.array([0.5, 0.3], dtype=np.float32), 0.5, 100)

Row = tuple[float, int, list[float]]
CAT: Row = (0.9, 0, [0, 0, 10, 10])
DOG: Row = (0.8, 1, [50, 50, 70, 70])
FAR: Row = (0.7, 0, [30, 30, 44, 40])
SQUARE: Row = (0.7, 0, [30, 30, 40, 40])


def found(*rows: Row) -> Detections:
    return Detections(
        np.array([row[2] for row in rows], dtype=np.float32).reshape(-1, 4),
        np.array([row[0] for row in rows], dtype=np.float32),
        np.array([row[1] for row in rows], dtype=np.int64),
    )


def proposing(*parts: Detections) -> Proposals:
    rows = [one for part in parts for one in zip(part.boxes, part.scores, part.labels, strict=True)]
    scores = np.zeros((len(rows), 2), dtype=np.float32)
    for i, (_, score, label) in enumerate(rows):
        scores[i, label] = score
    boxes = np.array([box for box, _, _ in rows], dtype=np.float32).reshape(-1, 4)
    return Proposals(boxes, scores)


def check(a: Detections, b: Detections, setting: Setting = SETTING) -> Comparison:
    """Compare two choices from the same proposals, both ways: sides must not matter."""
    proposals = proposing(a, b)
    one = compare(a, b, proposals, setting, TOLERANCE)
    other = compare(b, a, proposals, setting, TOLERANCE)
    assert one.matched.tolist() == other.matched.tolist()
    assert one.borderline == other.borderline
    assert len(one.mismatches) == len(other.mismatches)
    return one


def test_order_does_not_matter():
    result = check(found(CAT, DOG, FAR), found(FAR, CAT, DOG))
    assert result.matched.tolist() == [2, 1]
    assert (result.box, result.score, result.borderline, result.mismatches) == (0, 0, 0, [])


def test_nothing_equals_nothing():
    result = check(found(), found())
    assert result.matched.tolist() == [0, 0]
    assert result.mismatches == []


def test_the_largest_differences_within_the_tolerance_are_told():
    near = found((0.90005, 0, [0, 0.06, 10, 10]), (0.8, 1, [50, 50, 70, 70.02]))
    result = check(found(CAT, DOG), near)
    assert result.mismatches == []
    assert result.box == pytest.approx(0.06)
    assert result.score == pytest.approx(5e-5, rel=1e-2)  # a float32 difference near 1


@pytest.mark.parametrize(
    "other",
    [
        (0.9002, 0, [0, 0, 10, 10]),
        (0.9, 0, [0, 0, 10, 10.2]),
        (0.9, 1, [0, 0, 10, 10]),
    ],
    ids=["score", "box", "class"],
)
def test_a_difference_beyond_the_tolerance_is_a_mismatch_on_each_side(other):
    expected = found(CAT, DOG)
    result = compare(expected, found(other, DOG), proposing(expected), SETTING, TOLERANCE)
    assert result.matched.tolist() == [0, 1]
    assert len(result.mismatches) == 2
    assert result.borderline == 0


def test_a_mismatch_is_told_with_the_nearest_on_the_other_side():
    result = check(found(CAT), found((0.7, 0, [0, 0, 12, 10]), DOG))
    assert result.mismatches == [
        "cat 0.90000 at [0.00, 0.00, 10.00, 10.00] is in the checkpoint, not in the file;"
        " its nearest scores 0.70000, 2.00 px away",
        "cat 0.70000 at [0.00, 0.00, 12.00, 10.00] is in the file, not in the checkpoint;"
        " its nearest scores 0.90000, 2.00 px away",
        "dog 0.80000 at [50.00, 50.00, 70.00, 70.00] is in the file, not in the checkpoint,"
        " which has none of its class",
    ]


def test_each_detection_is_matched_once():
    result = check(found(CAT, CAT), found(CAT))
    assert result.matched.tolist() == [1, 0]
    assert len(result.mismatches) == 1


def test_pairs_are_the_nearest_ones():
    ladder = [(0.9, 0, [0.0, 0, 10, 10]), (0.9, 0, [0.08, 0, 10, 10]), (0.9, 0, [0.16, 0, 10, 10])]
    result = check(found(*ladder), found(*reversed(ladder)))
    assert result.matched.tolist() == [3, 0]
    assert result.box == 0


FULL = Setting(SETTING.class_names, SETTING.class_thresholds, 0.5, max_detections=2)
THIRD = 10 / 3  # two boxes of 10 x 10 shifted by so much overlap by exactly one half


@pytest.mark.parametrize(
    ("ours", "theirs", "setting", "borderline", "mismatches"),
    [
        ([CAT, (0.50005, 0, [30, 30, 40, 40])], [CAT], SETTING, 1, 0),
        ([CAT, (0.50005, 1, [30, 30, 40, 40])], [CAT], SETTING, 0, 1),
        ([CAT, FAR], [CAT, (0.70005, 1, [60, 60, 80, 80])], FULL, 2, 0),
        ([CAT, FAR], [CAT, (0.70005, 1, [60, 60, 80, 80])], SETTING, 0, 2),
        ([(0.95, 1, [60, 60, 80, 80]), CAT], [CAT, FAR], FULL, 1, 1),
        ([CAT, SQUARE], [CAT, (0.70005, 0, [31, 30, 41, 40])], SETTING, 2, 0),
        ([CAT, SQUARE], [CAT, (0.7, 1, [31, 30, 41, 40])], SETTING, 0, 2),
        ([CAT, (0.6, 0, [THIRD, 0, 10 + THIRD, 10])], [CAT], SETTING, 1, 0),
        ([CAT, (0.6, 0, [3, 0, 13, 10])], [CAT], SETTING, 0, 1),
        ([CAT, (0.6, 1, [THIRD, 0, 10 + THIRD, 10])], [CAT], SETTING, 0, 1),
    ],
    ids=[
        "a score at its threshold",
        "the threshold is that of the class",
        "the last place of a full list",
        "a list with room for both",
        "a full list excuses only its last place",
        "NMS chose between equals",
        "equals are of one class",
        "an overlap at the threshold of NMS",
        "an overlap away from it",
        "another class never suppresses",
    ],
)
def test_rounding_explains_what_is_on_one_side_only(ours, theirs, setting, borderline, mismatches):
    result = check(found(*ours), found(*theirs), setting)
    assert (result.borderline, len(result.mismatches)) == (borderline, mismatches)


@pytest.mark.parametrize(
    ("ours", "theirs", "mismatches"),
    [
        ([CAT, SQUARE], [CAT, (0.7, 0, [31, 30, 41, 40])], 2),
        ([CAT], [CAT, (0.50005, 0, [30, 30, 40, 40])], 1),
    ],
    ids=["by an equal", "by its threshold"],
)
def test_a_box_that_was_never_proposed_is_not_excused(ours, theirs, mismatches):
    proposals = proposing(found(*ours))
    result = compare(found(*ours), found(*theirs), proposals, SETTING, TOLERANCE)
    assert (result.borderline, len(result.mismatches)) == (0, mismatches)


def test_comparisons_add_up():
    total = check(found(CAT), found(CAT))
    total.add(check(found(DOG), found((0.80005, 1, [50, 50, 70, 70.05]))))
    total.add(check(found(FAR), found()))
    assert total.matched.tolist() == [1, 1]
    assert total.box == pytest.approx(0.05, rel=1e-3)
    assert len(total.mismatches) == 1
