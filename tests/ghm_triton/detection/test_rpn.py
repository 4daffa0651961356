import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, clip_boxes_to_image

from ghm_triton.detection.config import DetectorConfig
from ghm_triton.detection.rpn import ProposalNetwork

STRIDES = (8, 16, 32)
SIZE = (64, 96)


@pytest.fixture
def config(config: DetectorConfig) -> DetectorConfig:
    return dataclasses.replace(config, architecture="faster-rcnn", image_size=SIZE)


def network(config: DetectorConfig) -> ProposalNetwork:
    torch.manual_seed(0)
    rpn = ProposalNetwork(16, STRIDES, config)
    for layer in (rpn.head.cls_logits, rpn.head.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return rpn


def pyramid(batch: int) -> list[Tensor]:
    return [torch.randn(batch, 16, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]


# Of 288 + 72 + 18 anchors some levels lose candidates or none, and the answer is full or not.
@pytest.mark.parametrize(
    ("candidates", "proposals", "full"),
    [(1000, 378, False), (50, 40, True), (20, 1000, False), (300, 7, True)],
)
def test_proposals_are_torchvisions(candidates, proposals, full, config):
    rpn = network(dataclasses.replace(config, candidates=candidates, proposals=proposals)).eval()
    features = pyramid(3)
    with torch.inference_mode():
        boxes, exist = rpn.propose(features)
        images = ImageList(torch.zeros(3, 3, *SIZE), [SIZE] * 3)
        levels = {str(i): x for i, x in enumerate(features)}
        expected, _ = RegionProposalNetwork.forward(rpn, images, levels)
    for ours, real, theirs in zip(boxes, exist, expected, strict=True):
        count = len(theirs)
        assert count == proposals if full else 0 < count < len(real)
        assert real.tolist() == [True] * count + [False] * (len(real) - count)
        # float32 operations in another order.
        torch.testing.assert_close(ours[:count], theirs, rtol=0, atol=1e-4)
        assert not ours[count:].any()


def test_proposals_without_a_side_are_none(config):
    rpn = network(config).eval()
    torch.nn.init.constant_(rpn.head.bbox_pred.bias[0], 0.0)
    with torch.no_grad():
        rpn.head.bbox_pred.weight.zero_()
        rpn.head.bbox_pred.bias.copy_(torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(3))  # far right
        _, exist = rpn.propose(pyramid(2))
    assert not bool(exist.any())


def test_scores_that_are_equal_in_float32_do_not_tie(config):
    """Objectness saturates early; the surer proposal comes first all the same."""
    rpn = network(config).eval()
    with torch.no_grad():
        rpn.head.cls_logits.weight.mul_(0.1)
        rpn.head.cls_logits.bias.fill_(30.0)
        rpn.head.bbox_pred.weight.zero_()
        objectness, _ = rpn.head(features := pyramid(1))
        boxes, _ = rpn.propose(features)
    assert all(bool((torch.sigmoid(x) == 1).all()) for x in objectness)
    first = torch.cat([x.permute(0, 2, 3, 1).flatten() for x in objectness]).argmax()
    # Unmoved anchors; sums of centres and halves round.
    expected = clip_boxes_to_image(rpn.anchors[first], SIZE)
    torch.testing.assert_close(boxes[0, 0], expected, rtol=0, atol=1e-5)


def test_ignored_boxes_are_neither_object_nor_background(config):
    rpn = network(config)
    boxes = rpn.anchors[[100, 250]] + torch.tensor([1.0, 0.0, 1.0, 0.0])
    kept = {"boxes": boxes, "labels": torch.tensor([7, 3])}
    hidden = {**kept, "ignore": torch.tensor([True, False])}
    seen, matched = rpn.assign_targets_to_anchors([rpn.anchors], [kept])
    labels, _ = rpn.assign_targets_to_anchors([rpn.anchors], [hidden])
    first = (seen[0] == 1) & (matched[0] == boxes[0]).all(1)
    assert bool(first[100])
    assert bool((labels[0][first] == -1).all())
    assert int(labels[0][250]) == 1
    assert torch.equal(labels[0][~first], seen[0][~first])


def test_an_image_of_no_boxes_is_background(config):
    rpn = network(config)
    empty = {"boxes": torch.zeros(0, 4), "ignore": torch.zeros(0, dtype=torch.bool)}
    labels, _ = rpn.assign_targets_to_anchors([rpn.anchors], [empty])
    assert not labels[0].any()


def test_boxes_are_float32_under_autocast(config):
    rpn = network(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objectness, deltas = rpn.head(pyramid(1))
    assert {x.dtype for x in (*objectness, *deltas)} == {torch.float32}


def test_anchors_grow_with_the_stride_and_the_scale(config):
    rpn = network(dataclasses.replace(config, anchor_scale=2.5))
    areas = (rpn.anchors[:, 2:] - rpn.anchors[:, :2]).prod(1).sqrt()
    for stride, own in zip(STRIDES, areas.split(rpn.level_anchors), strict=True):
        # torchvision rounds the corners of anchors to whole pixels.
        assert float(own.median()) == pytest.approx(2.5 * stride, abs=1)


def test_anchors_are_objects_from_an_iou_of_0_7_and_background_below_0_3(config):
    rpn = network(config)
    # Nearly half-way between two anchors of 24 pixels: IoU 0.72 and 0.71, and 0.66 and 0.63.
    shift = torch.tensor([[3.9, 0.0, 3.9, 0.0], [3.7, 1.5, 3.7, 1.5]])
    boxes = rpn.anchors[[103, 187]] + shift
    (labels,), _ = rpn.assign_targets_to_anchors([rpn.anchors], [{"boxes": boxes}])
    overlap = box_iou(boxes, rpn.anchors)
    best = overlap.amax(0)
    nearest = (overlap == overlap.amax(1, keepdim=True)).any(0)  # of a box, whatever the IoU
    assert torch.equal(labels == 1, (best >= 0.7) | nearest)
    assert torch.equal(labels == -1, (best >= 0.3) & (best < 0.7) & ~nearest)
    assert int((labels == 1).sum()) > 2
    between = (best >= 0.6) & (best < 0.7) & ~nearest
    assert bool(between.any())
