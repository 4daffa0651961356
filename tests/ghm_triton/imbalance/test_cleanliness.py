"""Against the definitions, by hand and in float64."""

import pytest
import torch
from torchvision.ops import box_iou

from ghm_triton.imbalance.cleanliness import (
    assign_top_anchors,
    cleanliness,
    paired_iou,
    soft_targets,
)

# Strips of one square: their IoU with it is their height over 10.
SQUARE = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)


def strips(*heights: float, left: float = 0.0) -> torch.Tensor:
    return torch.tensor([[left, 0.0, left + 10.0, h] for h in heights], dtype=torch.float64)


def by_definition(boxes: torch.Tensor, anchors: torch.Tensor, top: int) -> list[int]:
    """Every claim of every ground truth, then the best claim on every anchor."""
    claims: dict[int, list[tuple[float, int]]] = {}
    for g, row in enumerate(box_iou(boxes, anchors).tolist()):
        ranked = sorted(range(len(row)), key=lambda a: -row[a])[:top]
        for a in ranked:
            if row[a] > 0:
                claims.setdefault(a, []).append((row[a], -g))
    return [-max(claims[a])[1] if a in claims else -1 for a in range(len(anchors))]


def test_a_hundred_are_positive_where_nothing_is_said():
    anchors = strips(*(5 + i / 100 for i in range(130)))
    matches = assign_top_anchors(SQUARE, anchors)
    assert matches.tolist() == [-1] * 30 + [0] * 100


def test_an_anchor_claimed_twice_goes_to_its_best_overlap():
    boxes = torch.cat([SQUARE, strips(6)])  # the second is the upper part of the first
    # IoU with the first 0.9, 0.5; with the second 6/9, 5/6.
    assert assign_top_anchors(boxes, strips(9, 5), 2).tolist() == [0, 1]
    assert assign_top_anchors(boxes.flip(0), strips(9, 5), 2).tolist() == [1, 0]


def test_an_anchor_goes_to_the_box_that_claimed_it_and_not_to_one_it_overlaps_more():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 30, 10]])
    anchors = torch.tensor([[0.0, 0, 18, 10], [0, 0, 28, 10]])
    # IoU 0.56 and 0.36 with the first, 0.6 and 0.93 with the second, which has a better one.
    assert assign_top_anchors(boxes, anchors, 1).tolist() == [0, 1]
    assert assign_top_anchors(boxes, anchors, 2).tolist() == [1, 1]


def test_anchors_that_do_not_touch_a_box_are_never_claimed():
    anchors = torch.cat([strips(5), strips(5, left=50)])
    assert assign_top_anchors(SQUARE, anchors, 2).tolist() == [0, -1]


@pytest.mark.parametrize("top", [1, 3, 10, 200])
def test_random_scenes_are_assigned_by_definition(top):
    generator = torch.Generator().manual_seed(top)

    def draw(count: int) -> torch.Tensor:
        corner = 60 * torch.rand(count, 2, dtype=torch.float64, generator=generator)
        side = 5 + 35 * torch.rand(count, 2, dtype=torch.float64, generator=generator)
        return torch.cat([corner, corner + side], 1)

    boxes, anchors = draw(6), draw(120)
    ours = assign_top_anchors(boxes, anchors, top).tolist()
    assert ours == by_definition(boxes, anchors, top)
    assert max(ours.count(g) for g in range(6)) <= top
    assert ours.count(-1) > 0


def test_no_boxes_and_no_anchors():
    assert assign_top_anchors(torch.zeros(0, 4), strips(3, 4)).tolist() == [-1, -1]
    assert assign_top_anchors(SQUARE, torch.zeros(0, 4)).tolist() == []


def test_pairs_overlap_as_torchvision_says():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 50, 2, dtype=torch.float64, generator=generator)
    side = torch.rand(2, 50, 2, dtype=torch.float64, generator=generator)
    a, b = torch.cat([corner, corner + side], 2)
    # float64 rounding.
    torch.testing.assert_close(paired_iou(a, b), box_iou(a, b).diag(), rtol=0, atol=1e-12)
    nothing = torch.zeros(1, 4)
    assert paired_iou(nothing, nothing).tolist() == [0.0]
    inside_out = torch.tensor([[5.0, 5.0, 1.0, 1.0]])
    assert paired_iou(inside_out, torch.tensor([[0.0, 0.0, 9.0, 9.0]])).tolist() == [0.0]


def test_cleanliness_is_the_papers():
    loc, cls = torch.tensor([0.8, 0.0, 1.0]).double(), torch.tensor([0.4, 1.0, 1.0]).double()
    expected = torch.tensor([0.25 * 0.8 + 0.75 * 0.4, 0.75, 1.0]).double()
    # float64 rounding of numbers that are exact in decimals only, as below.
    torch.testing.assert_close(cleanliness(loc, cls, 0.25), expected, rtol=0, atol=1e-7)
    assert cleanliness(loc, cls).tolist() == pytest.approx([0.6, 0.5, 1.0], abs=1e-7)
    assert not cleanliness(loc.requires_grad_(), cls).requires_grad


def test_soft_labels_are_the_cleanliness_of_positives_and_zero_elsewhere():
    positive = torch.tensor([[False, True], [True, False]])
    assert soft_targets(positive, torch.tensor([0.25, 0.75])).tolist() == [[0, 0.25], [0.75, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assign_top_anchors(SQUARE, SQUARE, 0), "top must be at least 1, got 0"),
        (lambda: cleanliness(torch.ones(1), torch.ones(1), 1.5), r"alpha must lie in .*1\.5"),
        (lambda: cleanliness(torch.ones(1), torch.ones(1), float("nan")), "alpha .* nan"),
    ],
)
def test_an_option_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
