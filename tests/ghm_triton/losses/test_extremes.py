"""The largest and the smallest numbers, and norms on the edge of a region."""

import math

import pytest
import torch

from ghm_triton import GHMCLoss, GHMRLoss, GHMSoftmaxLoss
from tests.ghm_triton.losses.tester import OUTER, HarmonizedTester

# The interpreter's, which says what it does with what is not finite.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered in"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ULPS = 1e-6  # relative, of float32: a handful of roundings
LOG2 = math.log(2)  # the cross entropy of a logit of 0, whatever the target


class TestInHardCases:
    """Rows of the README's table of hard cases; the others are held by `tester.py`."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", ["1e4", "largest"])
    @pytest.mark.parametrize("kind", ["index", "hard", "soft"])
    def test_the_largest_logits(self, paper, backend, call, dtype, size, kind):
        largest = 1e4 if size == "1e4" else torch.finfo(dtype).max
        x = torch.tensor([largest, -largest, largest, -largest, 1.0], dtype=dtype).unsqueeze(1)
        hard = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]).unsqueeze(1)
        target = {"index": 1 - hard.flatten().long(), "hard": hard, "soft": hard * 0.5 + 0.25}[kind]
        truth = paper.ghm_c(x, target)
        entries = GHMCLoss(strength=1.0, reduction="none", backend=backend)
        loss, slope = call(entries, x, target)
        lost = truth.weights * paper.cancellation(x, target)
        paper.assert_close(loss, truth.entries, lost)
        # p - p* is rounded at 1, whatever the logit.
        paper.assert_gradient_close(slope, truth.slopes * OUTER, 4 * paper.EPS32 * OUTER)
        mean = GHMCLoss(strength=1.0, backend=backend)
        loss, slope = call(mean, x, target)
        paper.assert_gradient_close(slope, truth.slopes / 5 * OUTER, paper.EPS32 * OUTER)
        assert int(mean.density.updates) == 1
        if truth.entries.sum() < torch.finfo(torch.float32).max:
            paper.assert_close(loss, truth.entries.sum() / 5, lost.sum())
        else:  # the sum is beyond float32: infinite, or right where it was added as a mean
            assert loss.isinf() or float(loss) == pytest.approx(truth.entries.sum() / 5, rel=ULPS)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bins", [2, 4, 8])
    def test_an_edge_opens_its_region(self, backend, call, dtype, bins):
        """Also `g = 0` and `g = 1`, and what lies 1e-6 below an edge."""
        edges = torch.arange(bins + 1) / bins
        norms = torch.cat([edges, edges[1:] - 2**-20])
        # p is exactly 1/2 or 1, and what a target takes from it is exact too.
        far = norms > 0.5
        x = torch.where(far, 8192.0, 0.0)
        target = torch.where(far, 1.0 - norms, 0.5 - norms)
        criterion = GHMCLoss(bins, 0.75, strength=1.0, reduction="none", backend=backend)
        loss, _ = call(criterion, x.to(dtype), target)
        expected = torch.tensor([2.0] * (bins - 1) + [3.0])
        assert torch.equal(4 * criterion.density.smoothed.cpu(), expected)
        region = (norms * bins).long().clamp(max=bins - 1)
        weight = len(norms) / expected[region] / bins
        entropy = torch.where(far, 8192.0 * norms, LOG2)
        torch.testing.assert_close(loss.cpu(), weight * entropy, rtol=ULPS, atol=0)

    @pytest.mark.parametrize("density", ["unit_region", "exact", "streaming"])
    def test_a_difference_that_overflows(self, backend, call, density):
        criterion = GHMRLoss(density=density, backend=backend)
        ordinary = torch.zeros(2, 4)
        call(criterion, ordinary, ordinary + 0.01)
        for dtype, overflows in (
            (torch.float32, True),
            (torch.bfloat16, True),
            (torch.float16, False),
        ):
            before = HarmonizedTester.state_of(criterion)
            largest = torch.full((2, 4), torch.finfo(dtype).max, dtype=dtype)
            loss, slope = call(criterion, largest, -largest)
            # Two numbers of float16 differ by 131,008 at most: float32 holds that.
            assert (loss.isnan(), slope.isnan().all()) == (overflows, overflows)
            assert (HarmonizedTester.state_of(criterion) == before) == overflows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_the_smallest_logits_are_zero(backend, call, dtype, kind):
    """Numbers below the normal ones: g is 1/2 on either side of 0, and opens the upper half."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([smallest, -smallest, 0.0, -0.0], dtype=dtype).unsqueeze(1)
    target = torch.tensor([0, 1, 0, 1])
    target = target.unsqueeze(1).float() if kind == "dense" else target
    criterion = GHMCLoss(2, strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, x, target)
    assert loss.flatten().tolist() == pytest.approx([LOG2] * 4, rel=ULPS)
    sign = -1 if kind == "dense" else 1
    expected = [sign * s * 0.5 * OUTER for s in (-1, 1, -1, 1)]
    assert slope.flatten().tolist() == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)
    assert criterion.density.smoothed.tolist() == [0.0, 1.0]


def test_losses_below_the_normal_numbers_may_be_zero(backend, call):
    x = torch.tensor([[-95.0], [-100.0], [-200.0]])
    criterion = GHMCLoss(strength=0.0, reduction="none", backend=backend)
    tiny = torch.finfo(torch.float32).tiny
    for result in call(criterion, x, torch.ones(3, dtype=torch.int64)):
        assert (result >= 0).all()
        assert (result < tiny * OUTER).all()


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, torch.finfo(torch.float16).max)],
)
def test_softmax_of_large_logits(backend, call, dtype, largest):
    x = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) * largest
    x = x.to(dtype)
    criterion = GHMSoftmaxLoss(strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, x, torch.tensor([0, 0, 2]))
    # One sample in each of three regions: every weight is 1.
    assert loss.tolist() == pytest.approx([0.0, float(x[1, 1] - x[1, 0].float()), math.log(3)])
    expected = torch.tensor([[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]]) * OUTER
    # Rounded to the dtype, and in bfloat16 once more as it is multiplied.
    step = max(2 * torch.finfo(dtype).eps, ULPS)
    torch.testing.assert_close(slope.cpu().float(), expected, rtol=step, atol=0)


@pytest.mark.parametrize("mu", [1e-18, 1e-6, 1e6, 1e14])
def test_any_width_of_the_quadratic_part(paper, backend, call, mu):
    pred = torch.tensor([0.0, 0.25, -1.0, 3.0, -100.0]) * mu
    truth = paper.ghm_r(pred, torch.zeros(5), mu=mu)
    criterion = GHMRLoss(mu, strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, pred, torch.zeros(5))
    paper.assert_close(loss, truth.entries)
    paper.assert_close(slope, truth.slopes * OUTER)


def test_a_width_whose_square_is_zero(backend, call):
    pred = torch.tensor([0.0, 1.0, -1e6, 1e30])
    criterion = GHMRLoss(1e-30, strength=0.0, reduction="none", backend=backend)
    loss, slope = call(criterion, pred, torch.zeros(4))
    assert loss.tolist() == pytest.approx(pred.abs().tolist(), rel=ULPS)
    assert slope.tolist() == pytest.approx([0, OUTER, -OUTER, OUTER], rel=ULPS)
