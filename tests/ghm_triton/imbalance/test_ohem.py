import pytest
import torch

from ghm_triton.imbalance.ohem import (
    OHEM,
    StratifiedOHEM,
    allot,
    cross_entropy_of_samples,
    hard_examples,
    strata,
    stratified_hard_examples,
)


def by_sorting(losses, keep, valid):
    """The definition, image by image."""
    kept = torch.zeros_like(valid)
    for row in range(len(losses)):
        own = [i for i in range(losses.shape[1]) if bool(valid[row, i])]
        own.sort(key=lambda i: -float(losses[row, i]))
        kept[row, own[:keep]] = True
    return kept


@pytest.mark.parametrize("keep", [1, 5, 15, 40, 100])
def test_the_largest_losses_of_every_image_are_kept(keep):
    generator = torch.Generator().manual_seed(keep)
    losses = torch.rand(4, 40, generator=generator) - 0.5
    valid = torch.rand(4, 40, generator=generator) < 0.5
    valid[2] = False  # nothing to keep
    assert torch.equal(hard_examples(losses, keep, valid), by_sorting(losses, keep, valid))
    everything = torch.ones_like(valid)
    assert torch.equal(hard_examples(losses, keep), by_sorting(losses, keep, everything))


def test_no_gradient_flows_through_the_choice():
    losses = torch.rand(1, 9, requires_grad=True)
    kept = hard_examples(losses, 4)
    assert not kept.requires_grad
    losses[kept].sum().backward()
    assert torch.equal(losses.grad, kept.float())


def test_a_loss_that_is_nan_is_not_hidden():
    losses = torch.tensor([[5.0, float("nan"), 7.0]])
    assert hard_examples(losses, 1).tolist() == [[False, True, False]]


def test_what_a_harder_sample_overlaps_is_left_out():
    # The second overlaps the first by 0.8, the third by 0.6 of the union; the last is elsewhere.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [50, 50, 60, 60]]])
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert hard_examples(losses, 3, boxes=boxes).tolist() == [[True, False, True, True]]
    strict = hard_examples(losses, 3, boxes=boxes, iou_threshold=0.5)
    assert strict.tolist() == [[True, False, False, True]]
    # One that may not be kept suppresses nothing.
    valid = torch.tensor([[False, True, True, True]])
    kept = hard_examples(losses, 3, valid, boxes=boxes, iou_threshold=0.7)
    assert kept.tolist() == [[False, True, False, True]]


def test_images_do_not_suppress_each_other():
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[0, 0, 10, 10]]])
    assert hard_examples(torch.tensor([[2.0], [1.0]]), 1, boxes=boxes).all()


def test_the_module_adds_both_losses():
    classification = torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    localization = torch.tensor([[0.0, 4.0, 0.0, 1.5]])
    assert OHEM(2)(classification).tolist() == [[True, False, True, False]]
    assert OHEM(2)(classification, localization).tolist() == [[True, True, False, False]]
    valid = torch.tensor([[True, False, True, True]])
    assert OHEM(2)(classification, localization, valid).tolist() == [[True, False, False, True]]
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 9], [70, 0, 80, 9]]])
    apart = OHEM(3, iou_threshold=0.7)
    assert apart(classification, boxes=boxes).tolist() == [[True, True, False, True]]
    with pytest.raises(ValueError, match=r"iou_threshold=0.7 needs boxes"):
        apart(classification)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_how_many_to_keep_is_a_positive_integer(keep):
    with pytest.raises(ValueError, match=f"keep must be an integer of at least 1, got {keep}"):
        OHEM(keep)


def test_shapes_and_ranges_are_checked():
    losses = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"valid must be \[2, 3\].*\[3\]"):
        hard_examples(losses, 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boxes must be \[2, 3, 4\], got \[3, 4\]"):
        hard_examples(losses, 1, boxes=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"iou_threshold must lie in \[0, 1\], got 7"):
        hard_examples(losses, 1, boxes=torch.zeros(2, 3, 4), iou_threshold=7)
    with pytest.raises(ValueError, match="localization must be"):
        OHEM(1)(losses, torch.zeros(2, 4))


def test_a_sample_loses_the_sum_over_its_classes():
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 8, (3, 50), generator=generator)
    target = torch.nn.functional.one_hot(labels.clamp(min=0), 8)[..., :7].double()
    p = torch.sigmoid(logits.to(torch.float64))
    # log(1 - p) through the other sign: 1 - p would round.
    plain = -(target * p.log() + (1 - target) * torch.sigmoid(-logits).log()).sum(-1)
    expected = plain.masked_fill(labels < 0, 0.0)
    ours = cross_entropy_of_samples(logits, labels)
    assert ours.dtype == torch.float64
    # float64: a few roundings of a sum of seven.
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.tensor([[30.0, -12.0]], dtype=dtype)
    ours = cross_entropy_of_samples(logits, torch.tensor([2]))
    expected = cross_entropy_of_samples(logits.double(), torch.tensor([2]))
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)  # float32's rounding


def test_large_logits_stay_finite_and_small_losses_keep_their_digits():
    logits = torch.tensor([[1e4], [-1e4], [40.0]], dtype=torch.float64)
    ours = cross_entropy_of_samples(logits, torch.tensor([0, 0, 0])).tolist()
    assert ours[0] == 0.0
    assert ours[1] == 1e4
    assert ours[2] == pytest.approx(4.248354255291589e-18, rel=1e-12)  # exp(-40)


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"labels are \[3\], logits \[2, 3\]"):
        cross_entropy_of_samples(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))


def test_strata_are_quarters_of_the_share_of_localisation():
    localization = torch.tensor([0.0, 0.24, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0])
    found = strata(1 - localization, localization)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # The share counts, not the size; a sample without loss has no share.
    assert strata(100 * (1 - localization), 100 * localization).tolist() == found.tolist()
    assert strata(torch.zeros(1), torch.zeros(1)).tolist() == [0]
    assert strata(torch.tensor([torch.nan]), torch.ones(1)).tolist() == [0]


def by_strata(losses, stratum, quotas, valid):
    kept = set()
    own = [i for i in range(len(losses)) if bool(valid[i])]
    hardest = sorted(own, key=lambda i: -float(losses[i]))
    for number, quota in enumerate(quotas):
        kept.update([i for i in hardest if int(stratum[i]) == number][:quota])
    rest = [i for i in hardest if i not in kept]
    kept.update(rest[: sum(quotas) - len(kept)])
    return torch.tensor([i in kept for i in range(len(losses))])


@pytest.mark.parametrize("quotas", [(2, 2, 2, 2), (0, 5, 1, 2), (30, 30, 30, 30)])
def test_each_stratum_gives_its_hardest_and_the_rest_is_filled_by_loss(quotas):
    generator = torch.Generator().manual_seed(sum(quotas))
    losses = torch.rand(3, 30, generator=generator)
    stratum = torch.randint(0, 4, (3, 30), generator=generator)
    stratum[1] = torch.where(stratum[1] == 2, 0, stratum[1])  # a stratum without samples
    valid = torch.rand(3, 30, generator=generator) < 0.7
    ours = stratified_hard_examples(losses, stratum, quotas, valid)
    rows = zip(losses, stratum, valid, strict=True)
    assert torch.equal(ours, torch.stack([by_strata(a, b, quotas, c) for a, b, c in rows]))
    count = torch.minimum(valid.sum(1), torch.tensor(sum(quotas)))
    assert ours.sum(1).tolist() == count.tolist()


def test_background_alone_is_mined_as_by_ohem():
    losses = torch.rand(2, 50, generator=torch.Generator().manual_seed(5))
    ours = StratifiedOHEM(steps=10, keep=8)(losses, torch.zeros_like(losses))
    assert torch.equal(ours, hard_examples(losses, 8))


def test_what_is_ill_placed_is_kept_though_others_lose_more():
    classification = torch.tensor([[9.0, 8.0, 7.0, 6.0, 0.1]])
    localization = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]])
    assert not hard_examples(classification + localization, 4)[0, 4]
    assert StratifiedOHEM(steps=10, keep=4)(classification, localization)[0, 4]


def test_a_sample_that_overlaps_a_harder_one_is_left_out_of_every_stratum():
    # The second overlaps the first by 0.9; its own stratum would have kept it.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [70, 0, 80, 9]]])
    classification = torch.tensor([[9.0, 0.1, 2.0, 1.0]])
    localization = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    both = {"steps": 10, "keep": 2, "quotas": (0.5, 0.0, 0.0, 0.5), "alpha": 0.5, "alpha_end": 0.5}
    miner = StratifiedOHEM(**both, iou_threshold=0.7)
    kept = miner(classification, localization, boxes=boxes)
    assert kept.tolist() == [[True, False, True, False]]
    plain = StratifiedOHEM(**both)(classification, localization)
    assert plain.tolist() == [[True, True, False, False]]
    # One that may not be kept suppresses nothing.
    valid = torch.tensor([[False, True, True, True]])
    kept = miner(classification, localization, valid, boxes)
    assert kept.tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match=r"iou_threshold=0.7 needs boxes, got None"):
        miner(classification, localization)


def test_alpha_moves_from_classification_to_localisation():
    miner = StratifiedOHEM(steps=4, keep=1, alpha=0.9, alpha_end=0.1, quotas=(0, 1, 0, 0))
    classification, localization = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    alphas, first = [], []
    for _ in range(6):
        alphas.append(float(miner.alpha()))
        # Neither is of stratum 1, whose place goes to the larger loss.
        first.append(miner(classification, localization)[0].tolist())
    assert alphas == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1])
    assert first[:2] == [[True, False]] * 2
    assert first[3:] == [[False, True]] * 3
    assert int(miner.updates) == 6


def test_evaluation_does_not_move_alpha_and_a_checkpoint_keeps_it():
    miner = StratifiedOHEM(steps=10, keep=1)
    losses = torch.rand(1, 3)
    for _ in range(3):
        miner(losses, losses)
    miner.eval()(losses, losses)
    assert int(miner.updates) == 3
    again = StratifiedOHEM(steps=10, keep=1)
    again.load_state_dict(miner.state_dict())
    assert torch.equal(again.alpha(), miner.alpha())
    assert float(again.alpha()) != float(StratifiedOHEM(steps=10).alpha())


@pytest.mark.parametrize(
    ("keep", "shares", "expected"),
    [
        (8, (0.25, 0.25, 0.25, 0.25), (2, 2, 2, 2)),
        (10, (0.7, 0.1, 0.1, 0.1), (7, 1, 1, 1)),
        (10, (0.26, 0.24, 0.25, 0.25), (3, 2, 3, 2)),
        (1, (0.0, 0.0, 0.0, 1.0), (0, 0, 0, 1)),
    ],
)
def test_quotas_are_whole_and_add_up(keep, shares, expected):
    assert allot(keep, shares) == expected


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5), (0.5, 0.5, 0.5, -0.5), (0.1,) * 4, (float("nan"),) * 4]
)
def test_quotas_that_are_no_shares_are_refused(shares):
    with pytest.raises(ValueError, match="quotas must be 4 shares with sum 1"):
        StratifiedOHEM(steps=10, quotas=shares)


def test_shapes_and_ranges_of_strata_are_checked():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        StratifiedOHEM(steps=10, alpha=1.5)
    with pytest.raises(ValueError, match=r"localization must be \[1, 3\]"):
        StratifiedOHEM(steps=10)(torch.zeros(1, 3), torch.zeros(1, 4))
