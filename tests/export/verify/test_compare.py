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


def test_one_side_alone_at_its_threshold_is_borderline():
    at = found(CAT, (0.50005, 0, [30, 30, 40, 40]))
    result = check(at, found(CAT))
    assert (result.borderline, result.mismatches) == (1, [])


def test_the_threshold_is_that_of_the_class():
    result = check(found(CAT, (0.50005, 1, [30, 30, 40, 40])), found(CAT))
    assert (result.borderline, len(result.mismatches)) == (0, 1)


def test_the_last_place_of_a_full_list_is_borderline():
    setting = Setting(SETTING.class_names, SETTING.class_thresholds, 0.5, max_detections=2)
    last, rival = (0.7, 0, [30, 30, 40, 40]), (0.70005, 1, [60, 60, 80, 80])
    result = check(found(CAT, last), found(CAT, rival), setting)
    assert (result.borderline, result.mismatches) == (2, [])
    assert len(check(found(CAT, last), found(CAT, rival)).mismatches) == 2  # room for both


def test_a_full_list_excuses_only_its_last_place():
    setting = Setting(SETTING.class_names, SETTING.class_thresholds, 0.5, max_detections=2)
    result = check(found((0.95, 1, [60, 60, 80, 80]), CAT), found(CAT, FAR), setting)
    assert result.borderline == 1  # FAR, the last of a full list; the best of the other is missing
    assert len(result.mismatches) == 1


def test_nms_between_equals_is_borderline():
    # IoU 0.82: one suppresses the other, and the scores do not say which.
    a, b = (0.7, 0, [30, 30, 40, 40]), (0.70005, 0, [31, 30, 41, 40])
    result = check(found(CAT, a), found(CAT, b))
    assert (result.borderline, result.mismatches) == (2, [])


def test_a_box_that_was_never_proposed_is_no_equal():
    a, b = (0.7, 0, [30, 30, 40, 40]), (0.7, 0, [31, 30, 41, 40])
    result = compare(found(CAT, a), found(CAT, b), proposing(found(CAT, a)), SETTING, TOLERANCE)
    assert (result.borderline, len(result.mismatches)) == (0, 2)


def test_a_box_that_was_never_proposed_is_not_excused_by_its_threshold():
    made_up = found(CAT, (0.50005, 0, [30, 30, 40, 40]))
    result = compare(found(CAT), made_up, proposing(found(CAT)), SETTING, TOLERANCE)
    assert (result.borderline, len(result.mismatches)) == (0, 1)


def test_nms_at_its_threshold_is_borderline():
    # Two boxes of 10 x 10 shifted by 10/3 overlap by exactly one half.
    lesser = (0.6, 0, [10 / 3, 0, 10 + 10 / 3, 10])
    result = check(found(CAT, lesser), found(CAT))
    assert (result.borderline, result.mismatches) == (1, [])


def test_nms_away_from_its_threshold_is_a_mismatch():
    lesser = (0.6, 0, [3, 0, 13, 10])
    result = check(found(CAT, lesser), found(CAT))
    assert (result.borderline, len(result.mismatches)) == (0, 1)


def test_another_class_never_suppresses():
    lesser = (0.6, 1, [10 / 3, 0, 10 + 10 / 3, 10])
    result = check(found(CAT, lesser), found(CAT))
    assert (result.borderline, len(result.mismatches)) == (0, 1)


def test_equals_are_of_one_class():
    a, b = (0.7, 0, [30, 30, 40, 40]), (0.7, 1, [31, 30, 41, 40])
    result = check(found(CAT, a), found(CAT, b))
    assert (result.borderline, len(result.mismatches)) == (0, 2)


def test_comparisons_add_up():
    total = check(found(CAT), found(CAT))
    total.add(check(found(DOG), found((0.80005, 1, [50, 50, 70, 70.05]))))
    total.add(check(found(FAR), found()))
    assert total.matched.tolist() == [1, 1]
    assert total.box == pytest.approx(0.05, rel=1e-3)
    assert len(total.mismatches) == 1
