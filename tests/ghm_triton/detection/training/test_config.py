import dataclasses

import pytest
import torch

from ghm_triton.detection.training.build import build_losses, build_optimizer
from ghm_triton.detection.training.config import TrainOptions


def test_the_learning_rate_warms_up_and_falls_to_zero():
    options = TrainOptions(steps=100, warmup=10, lr=1.0)
    rates = [options.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], rel=1e-6)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_strengths_run_from_start_to_end():
    options = TrainOptions(steps=10, strength=0.4, strength_end=0.1, reg_strength_end=None)
    losses = build_losses(options)
    density = losses.classification.loss.density
    assert float(density.current_strength()) == pytest.approx(0.4)
    for _ in range(10):
        losses.classification(torch.randn(1, 5, 3), torch.zeros(1, 5, dtype=torch.int64))
    assert float(density.current_strength()) == pytest.approx(0.1)
    assert losses.regression.loss.density.schedule is None


def test_the_strength_of_the_boxes_moves_with_batches_that_have_some():
    options = TrainOptions(steps=10, reg_strength=0.4, reg_strength_end=0.0)
    regression = build_losses(options).regression
    for boxes in 5 * (3, 0):
        regression(torch.randn(boxes, 4), torch.zeros(boxes, 4))
    assert float(regression.loss.density.current_strength()) == pytest.approx(0.2)


def test_cross_entropy_is_ghm_of_strength_zero():
    options = TrainOptions(cls_loss="ce", strength=1.0)
    logits, labels = torch.randn(4, 6, 3), torch.randint(0, 4, (4, 6))
    target = torch.nn.functional.one_hot(labels, 4)[..., :3].float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    ours = build_losses(options).classification(logits, labels)
    # 72 float32 terms in another order.
    assert float(ours) == pytest.approx(float(expected / target.sum()), rel=1e-5)


def test_weights_multiply():
    pred, target = torch.randn(7, 4), torch.randn(7, 4)
    one, three = (build_losses(TrainOptions(reg_weight=w)).regression(pred, target) for w in (1, 3))
    assert float(three) == pytest.approx(3 * float(one), rel=1e-6)


def test_the_weight_of_the_regression_follows_its_loss():
    ghm, sl1 = (build_losses(TrainOptions(reg_loss=x)).regression for x in ("ghm", "sl1"))
    assert (ghm.weight, sl1.weight) == (10.0, 1.0)


def test_smooth_l1_is_the_papers():
    d = torch.tensor([[0.05, -0.05, 0.5, -2.0]], dtype=torch.float64)
    delta = 1 / 9
    expected = 2 * (0.05**2 / (2 * delta)) + (0.5 - delta / 2) + (2 - delta / 2)
    ours = build_losses(TrainOptions(reg_loss="sl1", reg_weight=1.0)).regression(
        d, torch.zeros_like(d)
    )
    assert float(ours) == pytest.approx(expected, rel=1e-12)


def test_norms_and_biases_are_not_decayed():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    decayed, free = build_optimizer(TrainOptions(weight_decay=0.1), module).param_groups
    assert [p.dim() for p in decayed["params"]] == [4]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cls_loss", "hinge"),
        ("reg_loss", "l7"),
        ("optimizer", "adam"),
        ("amp", "fp8"),
        ("on_damage", "ignore"),
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("clip", -1.0),
        ("hflip", 1.1),
        ("strength", 2.0),
        ("reg_strength", float("nan")),
        ("cls_weight", -1.0),
        ("cls_weight", float("nan")),
        ("reg_weight", -1.0),
        ("reg_weight", float("nan")),
        ("reg_weight", float("inf")),
    ],
)
def test_an_option_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        TrainOptions(**{field: value})


@pytest.mark.parametrize("field", ["cls_weight", "reg_weight"])
def test_a_guide_refuses_a_loss_without_weight(field):
    message = f"{field} must be positive with guided_loss.*got 0"
    with pytest.raises(ValueError, match=message):
        TrainOptions(cls_loss="focal", guided_loss=True, **{field: 0.0})
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{field: 0.0})  # guided by default
    build_losses(TrainOptions(guided_loss=False, **{field: 0.0}))


def test_options_survive_plain_values():
    options = TrainOptions(steps=7, strength_end=None)
    assert TrainOptions.from_dict({**options.to_dict(), "step": 3}) == options
    assert dataclasses.replace(options, steps=8) != options


@pytest.mark.parametrize(
    ("architecture", "classifier", "changes", "message"),
    [
        (
            "fcos",
            "sigmoid",
            {},
            "must be iou or giou for fcos, which regresses whole boxes.*got 'ghm'",
        ),
        ("fcos", "sigmoid", {"reg_loss": "sl1"}, "GHM-R and smooth L1 are losses of single"),
        (
            "faster-rcnn",
            "sigmoid",
            {"reg_loss": "giou"},
            "ghm or sl1 or asl1 for faster-rcnn.*giou",
        ),
        (
            "faster-rcnn",
            "sigmoid",
            {"reg_loss": "iou"},
            "IoU losses are losses of whole boxes.*'iou'",
        ),
        ("retinanet", "sigmoid", {"cls_loss": "ghm-softmax"}, "needs a softmax classifier"),
        (
            "faster-rcnn",
            "softmax",
            {"cls_loss": "ce", "init": "prior=0.1"},
            "init must be prior or optimal .*'prior=0.1'",
        ),
        ("faster-rcnn", "softmax", {}, "softmax classifier is trained by cls_loss ce.*got 'ghm'"),
        ("faster-rcnn", "softmax", {"cls_loss": "focal"}, "got 'focal'"),
    ],
)
def test_a_loss_that_does_not_fit_the_detector_is_refused_with_the_reason(
    architecture, classifier, changes, message
):
    options = TrainOptions(**changes)
    with pytest.raises(ValueError, match=message):
        build_losses(options, architecture=architecture, classifier=classifier)


@pytest.mark.parametrize(
    ("architecture", "reg_loss", "weight"),
    [("retinanet", "ghm", 10.0), ("faster-rcnn", "ghm", 1.0), ("fcos", "giou", 1.0)],
)
def test_the_weight_of_the_regression_follows_the_scale_of_its_targets(
    architecture, reg_loss, weight
):
    options = TrainOptions(reg_loss=reg_loss)
    assert build_losses(options, architecture=architecture).regression.weight == weight


def test_generalised_iou_is_the_papers():
    pred = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 3, 3]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0, 4, 2], [4, 0, 6, 2], [1, 1, 3, 3]], dtype=torch.float64)
    # IoU 8/16 in a hull of 16; IoU 0 with 4 of a hull of 12 between; the same box.
    expected = (1 - 0.5) + (1 + 4 / 12) + 0.0
    loss = build_losses(TrainOptions(reg_loss="giou"), architecture="fcos").regression
    # torchvision adds 1e-7 to areas that it divides by.
    assert float(loss(pred, target)) == pytest.approx(expected / 3, abs=1e-7)
    assert float(loss(pred[:0], target[:0])) == 0.0


@pytest.mark.parametrize(
    ("architecture", "chosen", "guided"),
    [
        ("retinanet", {}, True),
        ("fcos", {"reg_loss": "giou"}, True),
        ("retinanet", {"guided_loss": False}, False),
        ("retinanet", {"mining": "ohem"}, False),
        ("retinanet", {"cls_loss": "focal"}, False),
        ("retinanet", {"cls_loss": "focal", "guided_loss": True}, True),
        ("faster-rcnn", {}, True),
        ("faster-rcnn", {"cls_loss": "focal", "guided_loss": True, "sampling": False}, True),
        ("faster-rcnn", {"mining": "s-ohem"}, False),
    ],
)
def test_harmonized_losses_are_guided_unless_told_otherwise(architecture, chosen, guided):
    options = TrainOptions(cls_weight=3.0, **chosen)
    losses = build_losses(options, architecture=architecture)
    assert (losses.guide is not None) == guided
    # The guide multiplies, or the loss itself does: never both.
    assert losses.classification.weight == (1.0 if guided else 3.0)
    if losses.guide is not None:
        assert losses.guide.cls_weight == 3.0
    settled = options.settled(architecture)
    assert settled.guided_loss is guided
    assert settled.settled(architecture) == settled


@pytest.mark.parametrize("reg_weight", [1.0, 100.0])
def test_of_guided_losses_the_weight_of_the_boxes_is_that_of_both(reg_weight):
    options = TrainOptions(reg_loss="sl1", cls_weight=3.0, reg_weight=reg_weight)
    losses = build_losses(options)
    classification = losses.classification(torch.ones(2, 3), torch.tensor([0, 3]))
    regression = losses.regression(torch.full((2, 4), 0.5), torch.zeros(2, 4))
    terms = losses.guide.terms(classification, regression)
    assert float(terms.classification) == pytest.approx(3.0 * float(regression), rel=1e-6)
    plain = 4 * (0.5 - 1 / 18)  # smooth L1 of a box
    assert float(terms.regression) == pytest.approx(reg_weight * plain, rel=1e-6)


def test_options_that_are_left_open_are_settled_by_the_detector():
    weights = {
        ("retinanet", "ghm"): 10.0,
        ("faster-rcnn", "ghm"): 1.0,
        ("retinanet", "sl1"): 1.0,
        ("fcos", "giou"): 1.0,
    }
    for (architecture, reg_loss), weight in weights.items():
        assert TrainOptions(reg_loss=reg_loss).settled(architecture).reg_weight == weight
    assert TrainOptions(reg_weight=2.5).settled("retinanet").reg_weight == 2.5


def test_a_run_that_knows_no_guide_had_none():
    before = TrainOptions().to_dict()
    del before["guided_loss"]
    assert TrainOptions.of_run(before).guided_loss is False
    assert TrainOptions.of_run(TrainOptions().to_dict()).guided_loss is None
