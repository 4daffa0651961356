"""Against the definitions: what is hidden, what is turned, and who learns from it."""

import math

import pytest
import torch
from torch import Tensor

from ghm_triton.imbalance.adversarial import (
    ASDN,
    ASTN,
    Adversary,
    draw_cells,
    hardest_windows,
    hide,
    reverse_gradient,
    rotate_groups,
)

CHANNELS, CELLS = 8, 7


def features(regions: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(regions)
    return torch.rand(regions, CHANNELS, CELLS, CELLS, generator=generator)


def share_of(cells: Tensor):
    """A detector that is as sure as the share of its evidence, some cells, that it sees."""

    def probability(pooled: Tensor) -> Tensor:
        return (pooled * cells.unsqueeze(1)).sum((1, 2, 3)) / CHANNELS / cells.sum((1, 2))

    return probability


def evidence(*corners: tuple[int, int]) -> Tensor:
    """Two by two cells a region, from each corner."""
    cells = torch.zeros(len(corners), CELLS, CELLS)
    for region, (y, x) in zip(cells, corners, strict=True):
        region[y : y + 2, x : x + 2] = 1
    return cells


def test_the_hardest_window_is_the_best_of_all_places():
    pooled, weight = features(), torch.randn(5, CHANNELS, CELLS, CELLS)

    def probability(x: Tensor) -> Tensor:
        return torch.sigmoid((x * weight).sum((1, 2, 3)) / 10)

    windows = hardest_windows(pooled, probability)
    assert windows.sum((1, 2)).tolist() == [4] * 5
    best = torch.ones(5)
    for y in range(6):
        for x in range(6):
            without = pooled.clone()
            without[:, :, y : y + 2, x : x + 2] = 0
            best = torch.minimum(best, probability(without))
    assert torch.equal(probability(hide(pooled, windows)), best)


def test_fifteen_of_the_twenty_hottest_cells_are_hidden():
    heat = torch.randn(300, CELLS, CELLS)
    hidden = draw_cells(heat)
    assert hidden.sum((1, 2)).tolist() == [15] * 300
    hottest = torch.zeros(300, 49, dtype=torch.bool)
    hottest.scatter_(1, heat.flatten(1).topk(20).indices, True)
    assert not bool((hidden.flatten(1) & ~hottest).any())
    # Each of the 20 is drawn with 3/4: by rank, of 300 regions, within five standard deviations.
    ranked = hidden.flatten(1).gather(1, heat.flatten(1).topk(20).indices).float().mean(0)
    assert float((ranked - 0.75).abs().max()) < 5 * math.sqrt(0.75 * 0.25 / 300)


def test_a_quarter_turn_is_a_quarter_turn_of_its_group_alone():
    pooled = features(1)
    turned = rotate_groups(pooled, torch.tensor([[0.0, math.pi / 2, 0.0, -math.pi / 2]]))
    groups, parts = pooled.chunk(4, 1), turned.chunk(4, 1)
    expected = [groups[0], groups[1].rot90(1, (2, 3)), groups[2], groups[3].rot90(-1, (2, 3))]
    for ours, theirs in zip(parts, expected, strict=True):
        # sin and cos of a quarter turn, and bilinear weights, in float32.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_every_region_has_angles_of_its_own():
    pooled = features(1).expand(2, -1, -1, -1)
    turned = rotate_groups(pooled, torch.tensor([[0.0] * 4, [0.1] * 4]))
    torch.testing.assert_close(turned[0], pooled[0], rtol=0, atol=1e-5)
    assert float((turned[1] - pooled[1]).abs().mean()) > 0.01


def test_a_reversed_gradient_changes_its_sign():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = reverse_gradient(x)
    assert y.tolist() == [2.0, 3.0]
    (y * torch.tensor([1.0, 5.0])).sum().backward()
    assert x.grad.tolist() == [-1.0, -5.0]


def test_the_transformer_starts_at_no_turn_and_never_turns_beyond_ten_degrees():
    astn = ASTN(CHANNELS)
    assert not astn.angles(features()).any()
    with torch.no_grad():
        astn.localisation[-1].bias.copy_(torch.tensor([1e3, -1e3, 0.5, 0.0]))
    expected = [math.radians(10), -math.radians(10), math.radians(10) * math.tanh(0.5), 0.0]
    assert astn.angles(features(1))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_transformer_climbs_where_the_detector_descends():
    torch.manual_seed(0)
    astn = ASTN(CHANNELS)
    with torch.no_grad():
        astn.localisation[-1].bias.fill_(0.3)
        torch.nn.init.normal_(astn.localisation[-1].weight, std=0.1)
    pooled = features().requires_grad_()
    goal = features(5).flip(-1)

    def error() -> Tensor:
        return (astn(pooled) - goal).pow(2).mean()

    before = error()
    before.backward()
    # Through the turned features alone: the features are not to look otherwise to the adversary.
    plain = features().requires_grad_()
    angles = astn.angles(plain).detach()
    (rotate_groups(plain, angles) - goal).pow(2).mean().backward()
    torch.testing.assert_close(pooled.grad, plain.grad, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        for p in astn.parameters():
            p -= 0.1 * p.grad  # what an optimiser does
    assert float(error().detach()) > float(before.detach())


def test_dropout_networks_are_the_papers():
    asdn = ASDN(CHANNELS)
    kernels = [tuple(p.shape) for p in asdn.parameters() if p.dim() == 4]
    assert kernels == [(8, 8, 3, 3)] * 4 + [(1, 8, 3, 3)]
    assert [type(x).__name__ for x in asdn.layers] == ["Conv2d", "ReLU"] * 4 + ["Conv2d"]
    assert asdn(features(3)).shape == (3, 7, 7)


def bce(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits.double())
    return -(target * p.log() + (1 - target) * (1 - p).log())


def test_before_its_start_the_adversary_learns_windows_and_leaves_the_features_alone():
    torch.manual_seed(0)
    adversary, pooled = Adversary(CHANNELS, "asdn+astn", start=1, share=1.0), features(3)
    cells = evidence((1, 1), (4, 0), (2, 5))
    seen, loss = adversary(pooled, share_of(cells))
    assert seen is pooled
    logits = adversary.asdn(pooled)
    window = hardest_windows(pooled, share_of(cells)).double()
    # Float32 against float64.
    assert float(loss.detach()) == pytest.approx(
        float(bce(logits.detach(), window).mean()), rel=1e-5
    )
    loss.backward()
    assert all(p.grad.any() for p in adversary.asdn.layers[-1].parameters())
    seen, _ = adversary(pooled, share_of(cells))
    assert not torch.equal(seen, pooled)


def test_then_it_hides_cells_and_learns_from_the_masks_that_hurt():
    torch.manual_seed(0)
    adversary = Adversary(CHANNELS, "asdn", share=1.0)
    pooled = torch.ones(3, CHANNELS, CELLS, CELLS)
    with torch.no_grad():  # it wants to hide the upper rows
        for p in adversary.asdn.parameters():
            p.zero_()
        adversary.asdn.layers[-1].bias.fill_(0.2)
    heat = torch.arange(49.0).flip(0).view(7, 7) / 49
    adversary.asdn.forward = lambda x: heat.expand(len(x), 7, 7) + adversary.asdn.layers[-1].bias
    # Evidence in the hottest cells, in the coldest, and everywhere (of which 15 of 49 are lost).
    cells = torch.zeros(3, 7, 7)
    cells[0, :2], cells[1, 5:], cells[2] = 1, 1, 1
    harder, loss = adversary(pooled, share_of(cells))
    hidden = harder[:, 0] == 0
    assert hidden.sum((1, 2)).tolist() == [15] * 3
    assert torch.equal(harder, pooled * ~hidden.unsqueeze(1))  # in every channel
    logits = heat + 0.2
    hurt = [bce(logits, hidden[i].double()).mean() for i in (0, 2)]
    assert float(loss.detach()) == pytest.approx(0.0025 * float(sum(hurt)) / 2, rel=1e-5)
    loss.backward()
    assert adversary.asdn.layers[-1].bias.grad is not None


@pytest.mark.parametrize("kind", ["asdn", "astn", "asdn+astn"])
def test_half_of_the_objects_are_spared_and_never_the_same(kind):
    torch.manual_seed(0)
    adversary, pooled = Adversary(CHANNELS, kind), features(400)
    if adversary.astn is not None:
        with torch.no_grad():
            adversary.astn.localisation[-1].bias.fill_(0.5)

    def spared() -> Tensor:
        harder, _ = adversary(pooled, lambda x: x.sum((1, 2, 3)))
        same: Tensor = (harder == pooled).flatten(1).all(1)
        return same

    first, second = spared(), spared()
    # Binomial: within five standard deviations of 200, and of 100 for both times.
    assert abs(int(first.sum()) - 200) < 5 * math.sqrt(400 * 0.25)
    assert abs(int((first & second).sum()) - 100) < 5 * math.sqrt(400 * 0.25 * 0.75)


def test_nothing_is_learnt_from_objects_that_are_spared():
    torch.manual_seed(0)
    adversary, pooled = (
        Adversary(CHANNELS, "asdn", share=0.5),
        torch.ones(4, CHANNELS, CELLS, CELLS),
    )
    logits = adversary.asdn(pooled).detach()
    harder, loss = adversary(pooled, lambda x: x.mean((1, 2, 3)))
    hidden = (harder[:, 0] == 0).double()
    met = hidden.any(2).any(1)
    assert 0 < int(met.sum()) < 4
    wanted = 0.0025 * float(bce(logits[met], hidden[met]).mean())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)  # float32 against float64


def test_a_fall_of_a_tenth_is_not_enough():
    torch.manual_seed(0)
    adversary = Adversary(CHANNELS, "asdn", share=1.0)
    pooled = torch.ones(2, CHANNELS, CELLS, CELLS)

    def falls_by(most: float):
        return lambda x: torch.where((x == 0).flatten(1).any(1), 1 - most, 1.0)

    _, loss = adversary(pooled, falls_by(0.09))
    assert float(loss.detach()) == 0.0
    _, loss = adversary(pooled, falls_by(0.11))
    assert float(loss.detach()) > 0.0


def test_both_follow_one_another_and_the_losses_gradient_stays_with_the_adversary():
    torch.manual_seed(0)
    adversary = Adversary(CHANNELS, "asdn+astn", share=1.0)
    with torch.no_grad():
        adversary.astn.localisation[-1].bias.fill_(0.5)
    pooled = features().requires_grad_()
    torch.manual_seed(1)
    harder, loss = adversary(pooled, lambda x: x.mean((1, 2, 3)))
    torch.manual_seed(1)
    torch.rand(5)  # who is spared
    hidden = hide(pooled, draw_cells(adversary.asdn(pooled)))
    torch.testing.assert_close(harder, rotate_groups(hidden, adversary.astn.angles(hidden)))
    loss.backward(retain_graph=True)
    assert pooled.grad is None or not pooled.grad.any()
    adversary.zero_grad()
    harder.sum().backward()
    assert pooled.grad.any()
    assert not any(p.grad is not None and p.grad.any() for p in adversary.asdn.parameters())
    assert adversary.astn.localisation[-1].bias.grad.any()


@pytest.mark.parametrize("start", [0, 1])
def test_a_batch_without_objects_has_a_gradient_of_zero_for_every_parameter(start):
    adversary = Adversary(CHANNELS, "asdn+astn", start)
    harder, loss = adversary(features()[:0], lambda x: x.sum((1, 2, 3)))
    assert harder.shape == (0, CHANNELS, CELLS, CELLS)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in adversary.parameters())


def test_the_number_of_batches_is_in_the_state_dict():
    adversary = Adversary(CHANNELS, "astn", start=2)
    for _ in range(2):
        adversary(features(1), lambda x: x.sum((1, 2, 3)))
    other = Adversary(CHANNELS, "astn", start=2)
    other.load_state_dict(adversary.state_dict())
    assert int(other.batches) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Adversary(8, "none"), "kind must be one of asdn, .*got 'none'"),
        (lambda: Adversary(8, "asdn", -1), "start must be at least 0, got -1"),
        (lambda: Adversary(8, share=0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: ASTN(6), "channels must be a multiple of 4, got 6"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
