"""The peers against loops in float64 and torchvision."""

import numpy as np
import pytest
import torch

from benchmarks import peers


def released(norm, total, bins, momentum, average, last_edge):
    """Compute MMDetection's weights entry by entry; updates `average`."""
    edges = [j / bins for j in range(bins)] + [last_edge]
    region = np.array([max(j for j in range(bins) if g >= edges[j]) for g in norm.flat])
    assert (norm < last_edge).all()
    occupied = sorted(set(region))
    for j in occupied:
        average[j] = momentum * average[j] + (1 - momentum) * (region == j).sum()
    weights = [total / average[j] / len(occupied) for j in region]
    return np.array(weights).reshape(norm.shape)


def test_released_ghm_c_over_two_batches():
    torch.manual_seed(0)
    criterion, average = peers.ReleasedGHMC(), np.zeros(30)
    for _ in range(2):
        logits = torch.randn(40, 5, requires_grad=True)
        labels = torch.randint(0, 6, (40,))
        x, target = logits.detach().double().numpy(), np.eye(6)[labels][:, :5]
        p = 1 / (1 + np.exp(-x))
        weights = released(np.abs(p - target), x.size, 30, 0.75, average, 1 + 1e-6)
        entries = -target * np.log(p) - (1 - target) * np.log(1 - p)
        loss = criterion(logits, labels)
        # Float32, a few hundred sums and logarithms.
        assert float(loss.detach()) == pytest.approx((weights * entries).sum() / x.size, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        expected = torch.from_numpy(weights * (p - target) / x.size).float()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_released_ghm_c_ignores_where_the_label_weight_is_0():
    torch.manual_seed(0)
    logits, labels = torch.randn(40, 5), torch.randint(0, 6, (40,))
    keep = (torch.arange(40) % 3 > 0).float()
    expected = peers.ReleasedGHMC()(logits[keep > 0], labels[keep > 0]).item()
    assert peers.ReleasedGHMC()(logits, labels, keep).item() == pytest.approx(expected, rel=1e-6)
    assert peers.ReleasedGHMC()(logits, labels).item() != pytest.approx(expected, rel=1e-3)


def test_released_ghm_r():
    torch.manual_seed(0)
    pred, target = torch.randn(50, 4), torch.randn(50, 4)
    pred[0] = target[0] + 0.001
    d = (pred - target).double().numpy()
    length = np.hypot(d, 0.02)
    weights = released(np.abs(d) / length, d.size, 10, 0.7, np.zeros(10), 1e3)
    expected = (weights * (length - 0.02)).sum() / d.size
    assert peers.ReleasedGHMR()(pred, target).item() == pytest.approx(expected, rel=1e-5)
    keep = torch.zeros(50, 4)
    keep[:7] = 1
    part = peers.ReleasedGHMR()(pred, target, keep).item()
    assert part == pytest.approx(peers.ReleasedGHMR()(pred[:7], target[:7]).item(), rel=1e-6)


def test_the_focal_formula_is_torchvisions():
    from torchvision.ops import sigmoid_focal_loss

    assert peers.focal_entries is sigmoid_focal_loss
    assert peers.FOCAL == "focal torchvision"
    torch.manual_seed(0)
    logits, target = torch.randn(20, 5) * 3, torch.rand(20, 5).round()
    entries = peers.focal_formula(logits, target)
    torch.testing.assert_close(entries, sigmoid_focal_loss(logits, target))
    assert peers.focal(logits, target).item() == pytest.approx(
        float(entries.sum() / target.sum()), rel=1e-6
    )
    background = torch.zeros(20, 5)  # without positives it is divided by 1
    assert peers.focal(logits, background).item() == pytest.approx(
        float(sigmoid_focal_loss(logits, background).sum()), rel=1e-6
    )
