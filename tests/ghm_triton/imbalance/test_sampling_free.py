import copy
import math

import pytest
import torch

from ghm_triton.imbalance.sampling_free import (
    GuidedLoss,
    count_priors,
    guided,
    initial_loss,
    optimal_prior,
    prior_bias,
)


def test_the_optimal_prior_is_the_papers_for_coco():
    # N / N_f about 1123, 80 classes: about 1.113e-5, to the digits that are given.
    assert optimal_prior(1, 1123, 80) == pytest.approx(1.113e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("prior", "foreground", "background"),
    [(0.5, 0.693, 55451), (1e-2, 4.605, 804.0), (1e-5, 11.51, 0.800), (1e-10, 23.03, 8e-6)],
)
def test_the_initial_loss_is_the_papers_table(prior, foreground, background):
    ours = initial_loss(prior, positives=1, counted=1000, classes=80)
    # The table has three digits or more.
    assert ours.foreground == pytest.approx(foreground, rel=1e-3)
    assert ours.background == pytest.approx(background, rel=1e-3)


def test_the_table_is_what_cross_entropy_loses_at_that_bias():
    positives, counted, classes, prior = 3, 100, 5, 0.02
    logits = torch.full((counted, classes), prior_bias(prior), dtype=torch.float64)
    target = torch.zeros_like(logits)
    target[range(positives), 0] = 1.0
    entries = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    ours = initial_loss(prior, positives=positives, counted=counted, classes=classes)
    # float64 roundings of 500 terms.
    of_positives = float(entries[target == 1].sum()) / positives
    assert ours.foreground == pytest.approx(of_positives, rel=1e-12)
    of_negatives = float(entries[target == 0].sum()) / positives
    assert ours.background == pytest.approx(of_negatives, rel=1e-12)


def test_no_prior_starts_lower_than_the_optimal():
    counts = {"positives": 7, "counted": 900, "classes": 4}
    best = optimal_prior(**counts)
    lowest = sum(initial_loss(best, **counts))
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert sum(initial_loss(best * factor, **counts)) > lowest


def test_the_bias_is_the_papers_and_a_sigmoid_says_the_prior():
    prior = optimal_prior(1, 1123, 80)
    assert prior_bias(prior) == pytest.approx(-math.log(1123 * 80 - 1), rel=1e-12)  # float64
    bias = torch.tensor(prior_bias(0.01), dtype=torch.float64)
    assert float(torch.sigmoid(bias)) == pytest.approx(0.01, rel=1e-12)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 100, 3), "no positive among 100 anchors"),
        ((5, 5, 1), "no negative"),
        ((6, 5, 1), "no such counts: positives=6, counted=5"),
        ((-1, 5, 1), "positives=-1"),
        ((1, 5, 0), "classes=0"),
    ],
)
def test_counts_without_an_optimum_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        optimal_prior(*counts)


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, float("nan")])
def test_a_prior_lies_between_zero_and_one(prior):
    with pytest.raises(ValueError, match=f"got {prior}"):
        prior_bias(prior)
    with pytest.raises(ValueError, match=f"got {prior}"):
        initial_loss(prior, positives=1, counted=10, classes=2)


class Drawer:
    """An assigner with the answers ready."""

    def labels(self, targets):
        return torch.stack([target["answer"] for target in targets])


def test_priors_count_what_the_assigner_says():
    batches = [
        [{"answer": torch.tensor([0, 2, 2, -1])}, {"answer": torch.tensor([2, 2, -1, -1])}],
        [{"answer": torch.tensor([1, 1, 0, 2])}],
    ]
    counted = count_priors(Drawer(), batches, ("a", "b"))
    assert counted.anchors == 9
    assert counted.positives.tolist() == [2, 2]
    assert optimal_prior(4, counted.anchors, 2) == pytest.approx(4 / 18)


def leaves(*values):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def test_guided_loss_is_the_papers():
    cls, reg = leaves(0.02, 1.5)
    loss = GuidedLoss(cls_weight=0.7, reg_weight=2.0)(cls, reg)
    r = 2.0 * 1.5 / 0.02
    # float64 roundings.
    assert float(loss.detach()) == pytest.approx(2.0 * 1.5 + 0.7 * r * 0.02, rel=1e-14)
    (3 * loss).backward()
    # r is a constant: the regression's gradient knows nothing of it.
    assert float(cls.grad) == pytest.approx(3 * 0.7 * r, rel=1e-14)
    assert float(reg.grad) == pytest.approx(3 * 2.0, rel=1e-14)


def test_both_terms_weigh_the_same_by_default():
    cls, reg = leaves(123.0, 0.5)
    terms = guided(cls, reg)
    assert float(terms.classification.detach()) == pytest.approx(0.5, rel=1e-14)
    assert float(terms.regression.detach()) == 0.5


def test_no_classification_loss_is_no_division_by_zero():
    cls, reg = leaves(0.0, 1.5)
    loss = GuidedLoss()(cls, reg)
    loss.backward()
    assert float(loss.detach()) == 1.5
    assert (float(cls.grad), float(reg.grad)) == (1.0, 1.0)


def test_a_batch_without_positives_still_learns_its_background():
    cls, reg = leaves(0.3, 0.0)
    loss = GuidedLoss(cls_weight=2.0)(cls, reg)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.6, rel=1e-14)
    assert float(cls.grad) == 2.0


def test_a_batch_without_positives_is_as_loud_as_those_before_it():
    guide = GuidedLoss(cls_weight=2.0, reg_weight=3.0)
    cls_before, reg_before = 0.0, 0.0
    for cls, reg in ((4.0, 1.0), (2.0, 0.1), (8.0, 0.5)):
        guide(*leaves(cls, reg))
        cls_before, reg_before = 0.9 * cls_before + 0.1 * cls, 0.9 * reg_before + 0.1 * 3.0 * reg
    cls, reg = leaves(0.3, 0.0)
    guide(cls, reg).backward()
    # What is remembered is float32.
    assert float(cls.grad) == pytest.approx(2.0 * reg_before / cls_before, rel=1e-6)
    again, _ = leaves(0.3, 0.0)
    guide(again, leaves(0.0)[0]).backward()
    assert float(again.grad) == float(cls.grad)  # and it teaches the guide nothing


@pytest.mark.parametrize("values", [(1.0, 0.0), (0.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_guide_remembers_sound_batches_only(values):
    guide = GuidedLoss()
    guide(*leaves(4.0, 1.0))
    before = guide.usual.clone()
    assert before.all()
    guide(*leaves(*values))
    assert torch.equal(guide.usual, before)


def test_a_guide_in_evaluation_mode_remembers_nothing():
    guide = GuidedLoss().eval()
    guide(*leaves(4.0, 1.0))
    assert not guide.usual.any()


def test_what_a_guide_remembers_travels_and_stays_float32():
    guide, other = GuidedLoss(), GuidedLoss()
    guide(*leaves(1e5, 1.0))  # infinite in float16
    assert guide.half().usual.dtype == torch.float32
    other.load_state_dict(guide.state_dict())
    assert float(other.usual[0]) == pytest.approx(1e4, rel=1e-6)
    guide.reset_parameters()
    assert not guide.usual.any()


def test_a_copy_of_a_guide_shares_its_group():
    group = Uncopied()
    guide = GuidedLoss(process_group=group)
    twin = copy.deepcopy(guide)
    assert twin.process_group is group
    assert twin.usual is not guide.usual


class Uncopied:
    """As process groups are."""

    def __deepcopy__(self, memo):
        raise TypeError("a process group cannot be copied")


def test_a_vanishing_classification_loss_stays_finite():
    cls = torch.tensor(1e-40, requires_grad=True)  # a denormal
    loss = GuidedLoss()(cls, torch.tensor(100.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cls.grad)


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_what_is_not_finite_is_not_hidden(values):
    assert not torch.isfinite(GuidedLoss()(*leaves(*values)))


def test_arguments_of_guided_loss_are_checked():
    with pytest.raises(ValueError, match=r"regression must be a scalar, got \[2\]"):
        guided(torch.tensor(1.0), torch.zeros(2))
    with pytest.raises(ValueError, match="cls_weight must be positive, got 0"):
        guided(*leaves(1.0, 1.0), cls_weight=0)
    with pytest.raises(ValueError, match="reg_weight must be positive, got nan"):
        guided(*leaves(1.0, 1.0), reg_weight=math.nan)
    with pytest.raises(ValueError, match="cls_weight must be positive, got -1"):
        GuidedLoss(cls_weight=-1)


def test_ranks_share_one_ratio(monkeypatch):
    """A rank without positives scales its negatives as the others do theirs."""
    others = torch.tensor([0.3, 2.0], dtype=torch.float64)
    group = object()

    def add_others(values, *, group):
        shared.append(group)
        values += others

    shared = []
    monkeypatch.setattr(torch.distributed, "all_reduce", add_others)
    cls, reg = leaves(0.1, 0.0)
    loss = GuidedLoss(process_group=group)(cls, reg)
    loss.backward()
    assert shared == [group]
    # The ratio of the means is that of the sums; float64.
    assert float(cls.grad) == pytest.approx(2.0 / 0.4, rel=1e-14)
    assert float(reg.grad) == 1.0


def test_a_prior_that_one_minus_it_rounds_to_one_still_costs_something():
    ours = initial_loss(1e-20, positives=1, counted=1000, classes=80).background
    assert ours == pytest.approx(79999 * 1e-20, rel=1e-12)  # log(1 - x) = -x to far beyond float64
