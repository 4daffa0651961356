import dataclasses

import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.heads import HarmonizedRetinaNetHead, HeadLosses
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.imbalance.cleanliness import assign_top_anchors
from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss


@pytest.mark.parametrize(("backbone", "levels"), [("tiny", 3), ("resnet18", 5)])
def test_anchors_and_outputs_agree(backbone, levels, config):
    config = dataclasses.replace(config, backbone=backbone, image_size=(64, 96))
    detector = build_detector(config).eval()
    with torch.inference_mode():
        logits, deltas = detector.raw(torch.randn(2, 3, 64, 96))
    cells = sum(-(-64 // s) * -(-96 // s) for s in (8, 16, 32, 64, 128)[:levels])
    assert detector.anchors.shape == (9 * cells, 4)
    assert logits.shape == (2, 9 * cells, 10)
    assert deltas.shape == (2, 9 * cells, 4)


def test_the_prior_is_the_probability_at_the_start(config):
    detector = build_detector(dataclasses.replace(config, prior=0.02)).eval()
    with torch.inference_mode():
        logits, _ = detector.raw(torch.zeros(1, 3, 96, 96))
    # The weights add a little to the bias; the median anchor stays near the prior.
    assert float(torch.sigmoid(logits).median()) == pytest.approx(0.02, rel=0.2)


def test_labels_follow_the_iou_with_the_ground_truth(config):
    detector = build_detector(config)
    anchor = detector.anchors[100]
    labels = detector.labels([{"boxes": anchor[None], "labels": torch.tensor([7])}])
    overlap = iou_with(detector.anchors, anchor)
    assert int(labels[0, 100]) == 7
    assert torch.equal(labels[0] == 7, overlap >= 0.5)
    assert torch.equal(labels[0] == -1, (overlap >= 0.4) & (overlap < 0.5))
    assert torch.equal(labels[0] == 10, overlap < 0.4)


def test_anchors_on_an_ignored_box_take_no_part(config):
    detector = build_detector(config)
    boxes = detector.anchors[[100, 700]]
    target = {
        "boxes": boxes,
        "labels": torch.tensor([7, 3]),
        "ignore": torch.tensor([True, False]),
    }
    labels = detector.labels([target])[0]
    assert int(labels[100]) == -1
    assert int(labels[700]) == 3
    assert not bool((labels == 7).any())


def test_an_image_without_boxes_is_all_background(config):
    detector = build_detector(config)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert bool((detector.labels([empty]) == 10).all())


def test_a_batch_without_positives_trains_on_its_background(config):
    losses = HeadLosses(GHMCLoss(), GHMRLoss())
    detector = build_detector(config, losses).train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    result = detector(torch.randn(2, 3, 96, 96), [empty, empty])
    sum(result.values()).backward()
    assert float(result["bbox_regression"].detach()) == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
    assert bool(detector.head.classification_head.cls_logits.weight.grad.any())


def test_the_density_is_that_of_the_whole_batch(config):
    """One loss over two images, not the mean of two losses: that is the point of the head."""
    losses = HeadLosses(GHMCLoss(momentum=0.0), GHMRLoss())
    detector = build_detector(config, losses).eval()
    images = torch.randn(2, 3, 96, 96)
    box = torch.tensor([[10.0, 10, 40, 45]])
    full = {"boxes": box, "labels": torch.tensor([1])}
    empty = {"boxes": box[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    joint = detector(images, [full, empty])["classification"]
    logits, _ = detector.raw(images)
    whole = GHMCLoss(momentum=0.0)(logits, detector.labels([full, empty]))
    apart = sum(
        GHMCLoss(momentum=0.0)(logits[i], detector.labels([t])[0]) / 2
        for i, t in enumerate((full, empty))
    )
    assert float(joint) == pytest.approx(float(whole), rel=1e-6)
    assert abs(float(joint) - float(apart)) > 1e-3 * float(joint)


def test_the_head_drops_into_torchvisions_own_retinanet(config):
    backbone, _ = build_backbone(config)
    anchors = AnchorGenerator(((24,), (48,), (96,)), ((1.0,),) * 3)
    model = RetinaNet(backbone, 10, anchor_generator=anchors, min_size=96, max_size=96)
    model.head = HarmonizedRetinaNetHead(16, 1, 10, losses=HeadLosses(GHMCLoss(), GHMRLoss()))
    target = {"boxes": torch.tensor([[10.0, 10, 40, 45]]), "labels": torch.tensor([1])}
    losses = model.train()([torch.rand(3, 96, 96)], [target])
    sum(losses.values()).backward()
    assert set(losses) == {"classification", "bbox_regression"}
    assert bool(model.head.classification_head.cls_logits.weight.grad.any())


def test_focal_in_the_head_equals_torchvisions_focal(config):
    """With one image our head and torchvision's agree: same labels, same normalisation."""
    detector = build_detector(config, HeadLosses(FocalLoss(), GHMRLoss())).eval()
    images = torch.randn(1, 3, 96, 96)
    target = {"boxes": torch.tensor([[10.0, 10, 40, 45]]), "labels": torch.tensor([1])}
    ours = detector(images, [target])["classification"]
    logits, _ = detector.raw(images)
    matches = [detector.match(detector.anchors, target)]
    theirs = detector.head.classification_head.compute_loss(
        [target], {"cls_logits": logits}, matches
    )
    # Sums of 13 thousand float32 terms in different orders.
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_a_head_without_losses_and_a_frame_of_another_size_are_refused(config):
    detector = build_detector(config)
    with pytest.raises(RuntimeError, match="without losses"):
        detector(
            torch.zeros(1, 3, 96, 96), [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}]
        )
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(96, 96\)"):
        detector.raw(torch.zeros(1, 3, 64, 64))


def iou_with(boxes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    low = torch.maximum(boxes[:, :2], other[:2])
    high = torch.minimum(boxes[:, 2:], other[2:])
    common = (high - low).clamp(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return common / (area + (other[2:] - other[:2]).prod() - common)


class Noted(torch.nn.Module):
    """Notes what a loss is asked."""

    def forward(self, *asked):
        self.asked = [x.detach() for x in asked]
        return asked[0].sum()


@pytest.mark.parametrize("of_boxes", [False, True])
def test_clean_anchors_learn_their_cleanliness_at_their_class(of_boxes, config):
    config = dataclasses.replace(config, assigner="cleanliness")
    torch.manual_seed(0)
    losses = HeadLosses(Noted(), Noted(), of_boxes=of_boxes)
    detector = build_detector(config, losses)
    torch.nn.init.normal_(detector.head.regression_head.bbox_reg.weight, std=0.02)
    target = {
        "boxes": torch.tensor([[10.0, 12.0, 40.0, 50.0], [50.0, 8.0, 80.0, 60.0]]),
        "labels": torch.tensor([7, 3]),
        "ignore": torch.tensor([False, True]),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images = torch.randn(2, 3, 96, 96)
    seen = []
    detector.observe_labels(seen.append)
    detector(images, [target, empty])
    logits, soft, weight = losses.classification.asked
    with torch.no_grad():
        expected, deltas = detector.raw(images)
    assert torch.equal(logits, expected)
    owner = assign_top_anchors(target["boxes"], detector.anchors)
    own = torch.nonzero(owner == 0).flatten()
    assert len(own) in range(60, 101)
    coder = detector.head.regression_head.box_coder
    boxes = coder.decode_single(deltas[0, own], detector.anchors[own])
    clean = 0.5 * box_iou(boxes, target["boxes"][:1])[:, 0] + 0.5 * logits[0, own, 7].sigmoid()
    by_hand = torch.zeros_like(soft)
    by_hand[0, own, 7] = clean
    # The ground truth goes through an encoding and back, in float32.
    torch.testing.assert_close(soft, by_hand, rtol=0, atol=1e-5)
    assert torch.equal(weight[0, :, 0], (owner != 1).float())
    assert bool((weight[1] == 1).all())
    labels = torch.full((2, len(owner)), 10)
    labels[0, own], labels[0, owner == 1] = 7, -1
    assert torch.equal(seen[0], labels)
    assert torch.equal(detector.labels([target, empty]), labels)


def test_a_detector_of_clean_anchors_learns_by_any_loss_of_sigmoids(config):
    config = dataclasses.replace(config, assigner="cleanliness")
    target = {"boxes": torch.tensor([[10.0, 12.0, 40.0, 50.0]]), "labels": torch.tensor([7])}
    for loss in (GHMCLoss(average="positives"), FocalLoss()):
        detector = build_detector(config, HeadLosses(loss, GHMRLoss()))
        sum(detector(torch.randn(1, 3, 96, 96), [target]).values()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
