import dataclasses

import pytest
import torch

from ghm_triton.detection.models.heads import HeadLosses, LearningHead
from ghm_triton.detection.models.losses import SmoothL1
from ghm_triton.detection.models.mining import HardPlaces, HardRegions, Lost
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.imbalance.ohem import OHEM
from ghm_triton.losses import FocalLoss, focal_loss

CLASSES = 3


def batch(seed=0, images=2, places=40):
    """Logits, labels with every kind among them, and deltas of the positives."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, places, CLASSES, generator=generator)
    labels = torch.randint(-1, CLASSES + 3, (images, places), generator=generator)
    labels = labels.clamp(max=CLASSES)
    positives = int(((labels >= 0) & (labels < CLASSES)).sum())
    predicted, expected = torch.randn(2, positives, 4, generator=generator)
    return logits, labels, predicted, expected


def head_of(losses):
    head = LearningHead()
    head.hold(losses)
    return head


def entries_of(logits, labels):
    """Cross entropy and smooth L1 place by place, written out."""
    target = torch.nn.functional.one_hot(labels.clamp(min=0), CLASSES + 1)[..., :CLASSES]
    plain = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, target.float(), reduction="none"
    )
    return plain.sum(-1).masked_fill(labels < 0, 0.0)


def test_ohem_backpropagates_the_hardest_of_each_image_alone():
    logits, labels, predicted, expected = batch()
    logits.requires_grad_()
    predicted.requires_grad_()
    options = TrainOptions(cls_loss="ce", reg_loss="sl1", mining="ohem", mining_keep=7)
    losses = head_of(build_losses(options)).dense_losses(logits, labels, predicted, expected)
    positive = (labels >= 0) & (labels < CLASSES)
    both = entries_of(logits.detach(), labels)
    both[positive] += SmoothL1().rows(predicted.detach(), expected)
    best = both.masked_fill(labels < 0, -1).topk(7, dim=1).indices
    kept = torch.zeros_like(positive).scatter(1, best, True)
    entries = entries_of(logits.detach(), labels)
    # Float32 sums in another order.
    wanted = float(entries[kept].sum()) / 14
    assert float(losses["classification"].detach()) == pytest.approx(wanted, rel=1e-5)
    rows = SmoothL1().rows(predicted.detach(), expected)[kept[positive]]
    assert 0 < len(rows) < len(predicted)
    wanted = float(rows.sum()) / 14
    assert float(losses["bbox_regression"].detach()) == pytest.approx(wanted, rel=1e-5)
    (2 * losses["classification"] + 3 * losses["bbox_regression"]).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, kept)
    assert torch.equal(predicted.grad.abs().sum(-1) > 0, kept[positive])


def test_the_weights_take_part_in_the_choice():
    logits, labels, predicted, expected = batch()
    options = TrainOptions(cls_loss="ce", reg_loss="sl1", mining="ohem", mining_keep=7)
    kept = []
    for weights in ({}, {"reg_weight": 100.0}, {"cls_weight": 100.0}):
        losses = build_losses(dataclasses.replace(options, **weights))
        kept.append(losses.mining(logits, labels, predicted, expected)[1])
    assert int(kept[1].sum()) == 14  # positives, by their boxes
    assert int(kept[2].sum()) < int(kept[0].sum()) < 14


@pytest.mark.parametrize("reg_loss", ["sl1", "asl1", "ghm"])
@pytest.mark.parametrize("cls_loss", ["ce", "focal", "ghm"])
def test_what_is_chosen_by_is_what_is_learnt(cls_loss, reg_loss):
    """With everything kept, the choice's losses and the trained ones have one sum."""
    logits, labels, predicted, expected = batch()
    everything = int((labels >= 0).sum())
    options = TrainOptions(
        cls_loss=cls_loss,
        reg_loss=reg_loss,
        mining="ohem",
        mining_keep=1000,
        cls_weight=2.0,
        strength=0.0,
        reg_strength=0.0,
    )
    built = build_losses(options)
    losses = head_of(built).dense_losses(logits, labels, predicted, expected)
    lost = built.mining.classification(logits, labels).sum()
    misplaced = built.mining.regression(predicted, expected).sum()
    # Float32 sums in another order.
    assert float(losses["classification"]) * everything == pytest.approx(float(lost), rel=1e-5)
    assert float(losses["bbox_regression"]) * everything == pytest.approx(
        float(misplaced), rel=1e-5
    )


def test_ghm_r_weighs_a_box_as_it_does_unmined():
    """Its mean over coordinates is a fourth of a sum over boxes."""
    _, _, predicted, expected = batch()
    whole, mined = (
        build_losses(TrainOptions(mining=mining)).regression(predicted, expected)
        for mining in ("none", "ohem")
    )
    # Float32 rounding of one division.
    assert float(mined) / len(predicted) == pytest.approx(float(whole), rel=1e-6)


def test_regions_are_chosen_image_by_image_however_many_there_are():
    """Two that see the same, an image without any, and one with fewer than are kept."""
    mining = HardRegions(OHEM(2, 0.7), entries_of, SmoothL1().rows)
    same = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]]
    regions = [torch.tensor(same), torch.zeros(0, 4), torch.tensor(same[:1])]
    lost = [
        Lost(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 0.0, 0.0])),
        Lost(torch.zeros(0), torch.zeros(0)),
        Lost(torch.zeros(1), torch.zeros(1)),
    ]
    kept = [row.tolist() for row in mining(lost, regions)]
    assert kept == [[True, False, True], [], [True]]
    assert [row.tolist() for row in mining(lost[1:2], regions[1:2])] == [[]]


def test_focal_loss_chooses_by_focal_loss():
    logits, labels, *_ = batch()
    losses = build_losses(TrainOptions(cls_loss="focal", reg_loss="sl1", mining="ohem"))
    expected = focal_loss(logits, labels, reduction="none").sum(-1)
    assert torch.equal(losses.mining.classification(logits, labels), expected)


def test_s_ohem_moves_with_the_steps_of_training():
    options = TrainOptions(cls_loss="ce", reg_loss="sl1", mining="s-ohem", steps=10, mining_keep=7)
    head = head_of(build_losses(options)).train()
    alphas = []
    for _ in range(2):
        for _ in range(5):
            head.dense_losses(*batch())
        alphas.append(float(head.mining.choose.alpha()))
    # The course of alpha is that of the run.
    assert alphas == pytest.approx([0.5, 0.25])
    assert "mining.choose.updates" in head.state_dict()
    learnt, _ = head.mining(*batch())
    assert (learnt >= 0).sum(1).tolist() == [7, 7]


def test_ignored_places_are_never_chosen_and_an_image_may_have_none():
    logits, labels, predicted, expected = batch()
    labels[1] = -1
    positives = int(((labels >= 0) & (labels < CLASSES)).sum())
    predicted, expected = predicted[:positives], expected[:positives]
    mining = HardPlaces(OHEM(1000), entries_of, SmoothL1().rows)
    learnt, kept = mining(logits, labels, predicted, expected)
    assert torch.equal(learnt, labels)
    assert bool(kept.all())
    labels[:] = -1
    losses = head_of(
        HeadLosses(FocalLoss(reduction="sum"), SmoothL1("sum"), mining=mining)
    ).dense_losses(logits, labels, predicted[:0], expected[:0])
    assert float(losses["classification"]) == float(losses["bbox_regression"]) == 0.0


def test_the_observer_sees_what_was_assigned_not_what_was_mined():
    logits, labels, predicted, expected = batch()
    head = head_of(build_losses(TrainOptions(mining="ohem", mining_keep=2)))
    seen = []
    head.observer = seen.append
    head.dense_losses(logits, labels, predicted, expected)
    assert torch.equal(seen[0], labels)


def test_guided_loss_scales_the_classification_before_its_weight():
    options = TrainOptions(cls_loss="focal", reg_loss="sl1", cls_weight=3.0, reg_weight=0.5)
    plain = head_of(build_losses(options)).dense_losses(*batch())
    options = dataclasses.replace(options, guided_loss=True)
    guided = head_of(build_losses(options)).dense_losses(*batch())
    # What the guide found, for the eye alone; plain is three times that.
    unguided = guided["unguided_classification"]
    assert 3 * float(unguided) == pytest.approx(float(plain["classification"]), rel=1e-6)
    assert not unguided.requires_grad
    assert "unguided_classification" not in plain
    # w_reg L_reg, and w_cls r L_cls = w_cls w_reg L_reg; to float32 rounding.
    assert float(guided["bbox_regression"]) == float(plain["bbox_regression"])
    wanted = 3.0 * float(plain["bbox_regression"])
    assert float(guided["classification"]) == pytest.approx(wanted, rel=1e-6)


def test_guided_loss_leaves_the_boxes_their_gradient_and_background_its_usual_weight():
    options = TrainOptions(cls_loss="focal", reg_loss="sl1", cls_weight=3.0, guided_loss=True)
    logits, labels, predicted, expected = batch()
    head = head_of(build_losses(options))
    losses = head.dense_losses(logits, labels, predicted.requires_grad_(), expected)
    sum(losses.values()).backward()
    alone = predicted.detach().requires_grad_()
    SmoothL1()(alone, expected).backward()
    assert torch.equal(predicted.grad, alone.grad)
    nothing = torch.where(labels >= 0, CLASSES, -1)
    unguided = losses["unguided_classification"]
    ratio = float(losses["bbox_regression"].detach() / unguided)
    losses = head.dense_losses(logits, nothing, predicted[:0], expected[:0])
    wanted = 3.0 * ratio * float(FocalLoss()(logits, nothing))  # scaled as the batch before
    # Float32 rounding of products.
    assert float(losses["classification"].detach()) == pytest.approx(wanted, rel=2e-6)
