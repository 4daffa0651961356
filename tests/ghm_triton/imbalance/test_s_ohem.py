import pytest
import torch

from ghm_triton.imbalance.ohem import hard_examples
from ghm_triton.imbalance.s_ohem import (
    StratifiedOHEM,
    allot,
    strata,
    stratified_hard_examples,
)


def test_strata_are_quarters_of_the_share_of_localisation():
    localization = torch.tensor([0.0, 0.24, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0])
    found = strata(1 - localization, localization)
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    # The share counts, not the size; a sample without loss has no share.
    assert strata(100 * (1 - localization), 100 * localization).tolist() == found.tolist()
    assert strata(torch.zeros(1), torch.zeros(1)).tolist() == [0]
    assert strata(torch.tensor([torch.nan]), torch.ones(1)).tolist() == [0]


def by_hand(losses, stratum, quotas, valid):
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
    assert torch.equal(ours, torch.stack([by_hand(a, b, quotas, c) for a, b, c in rows]))
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


def test_what_a_harder_sample_overlaps_is_left_out_of_every_stratum():
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


def test_the_weights_decide_who_is_hardest():
    place = {"steps": 1, "keep": 1, "quotas": (0, 1, 0, 0)}  # filled by the rest
    classification, localization = torch.tensor([[3.0, 2.0]]), torch.tensor([[0.0, 2.0]])
    early = StratifiedOHEM(alpha=0.9, alpha_end=0.9, **place)
    late = StratifiedOHEM(alpha=0.1, alpha_end=0.1, **place)
    # 2.7 against 1.8 + 0.2, then 0.3 against 0.2 + 1.8; stratum 1 stays empty.
    assert early(classification, localization).tolist() == [[True, False]]
    assert late(classification, localization).tolist() == [[False, True]]


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


def test_shapes_and_ranges_are_checked():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        StratifiedOHEM(steps=10, alpha=1.5)
    with pytest.raises(ValueError, match="keep must be"):
        StratifiedOHEM(steps=10, keep=0)
    with pytest.raises(ValueError, match=r"localization must be \[1, 3\]"):
        StratifiedOHEM(steps=10)(torch.zeros(1, 3), torch.zeros(1, 4))
