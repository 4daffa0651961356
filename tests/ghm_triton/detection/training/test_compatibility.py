import itertools

import pytest

from ghm_triton.detection.training.compatibility import require_compatible
from ghm_triton.detection.training.config import TrainOptions


@pytest.mark.parametrize("assigner", ["iou", "cleanliness"])
@pytest.mark.parametrize(("classifier", "cls_loss"), [("sigmoid", "ghm"), ("softmax", "ce")])
def test_regions_are_mined_guided_and_hidden_in_any_combination(classifier, cls_loss, assigner):
    mining, adversarial = ("none", "ohem", "s-ohem"), ("none", "asdn+astn")
    guides = (
        {"guided_loss": False},
        {"guided_loss": True},
        {"guided_loss": True, "sampling": False},
    )
    for mined, guided, init, hidden in itertools.product(
        mining, guides, ("prior", "optimal"), adversarial
    ):
        options = TrainOptions(
            cls_loss=cls_loss, mining=mined, init=init, adversarial=hidden, **guided
        )
        require_compatible(options, "faster-rcnn", classifier, assigner)


@pytest.mark.parametrize(
    ("architecture", "changes", "assigner", "message"),
    [
        ("retinanet", {"mining": "ohem"}, "cleanliness", "which trains on every anchor.*'ohem'"),
        ("retinanet", {"mining": "s-ohem"}, "cleanliness", "got 's-ohem'"),
        ("fcos", {"reg_loss": "sl1", "mining": "ohem"}, "iou", "must be iou or giou for fcos"),
        ("retinanet", {"sampling": False}, "iou", "sampling must be True for retinanet"),
        (
            "faster-rcnn",
            {"cls_loss": "ce", "sampling": False},
            "cleanliness",
            "sampling=False needs guided_loss",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(architecture, changes, assigner, message):
    with pytest.raises(ValueError, match=message):
        require_compatible(TrainOptions(**changes), architecture, "sigmoid", assigner)


def test_a_softmax_starts_at_no_prior_of_its_own():
    options = TrainOptions(cls_loss="ce", init="prior=0.1")
    require_compatible(options, "faster-rcnn", "sigmoid")
    with pytest.raises(ValueError, match=r"no such bias \(optimal is for the proposals\)"):
        require_compatible(options, "faster-rcnn", "softmax")
