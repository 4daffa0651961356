import math

import pytest

from ghm_triton.detection.data.boxes import clean_box


def test_a_good_box_is_left_as_it_is():
    assert clean_box((1.5, 2.0, 30.25, 40.0), 64, 48) == ((1.5, 2.0, 30.25, 40.0), None)


def test_one_based_inclusive_corners_become_edges():
    # The first and last pixel of a 64x48 image, counted from 1, are the whole image.
    assert clean_box((1, 1, 64, 48), 64, 48, one_based=True) == ((0, 0, 64, 48), None)


@pytest.mark.parametrize("one_based", [False, True])
@pytest.mark.parametrize("corners", [(5, 5, 5, 9), (5, 5, 9, 5), (9, 5, 5, 9), (5, 9, 9, 5)])
def test_no_area(corners, one_based):
    box, problem = clean_box(corners, 64, 48, one_based=one_based)
    assert box is None
    assert "has no area" in problem
    assert f"({', '.join(map(str, corners))})" in problem  # as written in the file


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(4))
def test_not_finite(value, place):
    corners = [1.0, 2.0, 3.0, 4.0]
    corners[place] = value
    box, problem = clean_box(tuple(corners), 64, 48)
    assert box is None
    assert "not finite" in problem


@pytest.mark.parametrize(
    "corners", [(-9, 5, 0, 9), (64, 5, 70, 9), (5, -9, 9, 0), (5, 48, 9, 50), (900, 900, 999, 999)]
)
def test_wholly_outside(corners):
    box, problem = clean_box(corners, 64, 48)
    assert box is None
    assert "outside the 64x48 image" in problem


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ((-3, 5, 9, 9), (0, 5, 9, 9)),
        ((5, -3, 9, 9), (5, 0, 9, 9)),
        ((5, 5, 70, 9), (5, 5, 64, 9)),
        ((5, 5, 9, 50), (5, 5, 9, 48)),
    ],
)
def test_overhang_is_clipped_and_reported(corners, expected):
    box, problem = clean_box(corners, 64, 48)
    assert box == expected
    assert "hangs over" in problem


def test_overhang_of_a_pixel_is_rounding():
    assert clean_box((-1, 0, 65, 48.5), 64, 48) == ((0, 0, 64, 48), None)
    # A zero where the first pixel is number one.
    assert clean_box((0, 0, 64, 48), 64, 48, one_based=True) == ((0, 0, 64, 48), None)
