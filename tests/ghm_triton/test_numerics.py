"""What the losses return where arithmetic is hard; the table in the README, row by row, and more.

Each row of "In hard cases" has a test of its name in `TestInHardCases`. What several processes make
of a value that is not finite is in `test_distributed.py`.
"""

import copy
import math

import numpy as np
import pytest
import torch

from ghm_triton import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss

# The interpreter's, which says what it does with what is not finite.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered in"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
OUTER = 3.7
ULPS = 1e-6  # relative, of float32: a handful of roundings
LOG2 = math.log(2)  # the cross entropy of a logit of 0, whatever the target

each_density = pytest.mark.parametrize("density", ["unit_region", "exact", "streaming"])
# Not every value with every density, as the interpreter is slow.
each_bad_value = pytest.mark.parametrize(
    ("density", "value"),
    [
        *(("unit_region", value) for value in (torch.nan, torch.inf, -torch.inf)),
        *(("exact", value) for value in (torch.nan, torch.inf)),
        ("streaming", torch.nan),
    ],
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(17)


def state_of(criterion):
    return copy.deepcopy(criterion.density.state_dict())


def same(state, criterion):
    return all(
        torch.equal(state[key], value) for key, value in criterion.density.state_dict().items()
    )


def call(criterion, device, values, *given):
    """Loss and gradient, the module having been moved to the device."""
    x = values.detach().clone().to(device).requires_grad_()
    loss = criterion.to(device)(x, *(tensor.to(device) for tensor in given))
    (loss * OUTER).sum().backward()
    return loss.detach(), x.grad


def at_norms(counts, device):
    """Logits of 0 and targets that put so many entries into the regions [0, 1/2) and [1/2, 1]."""
    below, above = counts
    target = torch.tensor([0.25] * below + [1.0] * above, device=device).unsqueeze(1)
    return torch.zeros_like(target), target


def weights(criterion, counts, device):
    """The weights of the two regions in a training step; 0 where empty."""
    loss = criterion(*at_norms(counts, device)).flatten() / LOG2
    below, above = counts
    assert loss[:below].unique().numel() == (below > 0)
    return [float(loss[0]) if below else 0.0, float(loss[-1]) if above else 0.0]


class TestInHardCases:
    @pytest.mark.parametrize(
        ("density", "reduction"),
        [
            ("unit_region", "mean"),
            ("unit_region", "none"),
            ("exact", "none"),
            ("streaming", "mean"),
        ],
    )
    def test_nothing_to_learn_from(self, device, backend, density, reduction):
        options = {"density": density, "reduction": reduction, "backend": backend}
        classify, regress = GHMCLoss(**options), GHMRLoss(**options)
        softmax = GHMSoftmaxLoss(reduction=reduction, backend=backend)
        x, index = torch.zeros(4, 3), torch.tensor([0, 1, 3, -1])
        call(classify, device, x, index)
        call(regress, device, x, x + 0.01)
        call(softmax, device, x, index % 3)
        nothing = torch.zeros(4, 3)
        for criterion, *given in (
            (classify, x, torch.full((4,), -1)),
            (classify, x, index, nothing),
            (classify, x[:0], index[:0]),
            (classify, x, x, -nothing),  # -0.0 is no weight either
            (regress, x, x + 1, nothing),
            (regress, x[:0], x[:0]),
            (softmax, x, torch.full((4,), -1)),
            (softmax, x, index % 3, nothing[:, 0]),
            (softmax, x[:0], index[:0]),
        ):
            before = state_of(criterion)
            loss, slope = call(criterion, device, *given)
            entries = given[0].shape[: 1 if criterion is softmax else 2]
            assert loss.shape == (entries if reduction == "none" else ())
            assert not loss.any()
            assert slope.shape == given[0].shape
            assert not slope.any()
            assert int(before["updates"]) == 1
            assert same(before, criterion)

    @each_bad_value
    def test_a_logit_or_prediction_that_is_not_finite(
        self, device, generator, backend, density, value
    ):
        x = torch.randn(6, 3, generator=generator)
        weight = torch.ones(6, 3)
        weight[5] = 0
        bad = x.clone()
        bad[2, 1] = value
        for criterion, target in (
            (GHMCLoss(density=density, backend=backend), torch.zeros(6, dtype=torch.int64)),
            (GHMCLoss(density=density, backend=backend), torch.rand(6, 3, generator=generator)),
            (GHMRLoss(density=density, backend=backend), torch.zeros(6, 3)),
            (GHMSoftmaxLoss(backend=backend), torch.zeros(6, dtype=torch.int64)),
        ):
            kept = weight[:, 0] if isinstance(criterion, GHMSoftmaxLoss) else weight
            call(criterion, device, x, target, kept)
            before = state_of(criterion)
            loss, slope = call(criterion, device, bad, target, kept)
            assert loss.isnan()
            assert slope[:5].isnan().all()
            assert same(before, criterion)

    @each_bad_value
    def test_an_ignored_entry_is_anything(self, device, generator, backend, density, value):
        x, target = torch.randn(6, 3, generator=generator), torch.rand(6, 3, generator=generator)
        weight = torch.ones(6, 3)
        weight[2, 1] = 0
        bad, bad_target = x.clone(), target.clone()
        bad[2, 1] = bad_target[2, 1] = value
        for kind in (GHMCLoss, GHMRLoss):
            plain, other = (kind(density=density, backend=backend) for _ in range(2))
            loss, slope = call(plain, device, x, target, weight)
            other_loss, other_slope = call(other, device, bad, bad_target, weight)
            # A block with such an entry may go another way, which rounds apart.
            torch.testing.assert_close(other_loss, loss, rtol=ULPS, atol=0)
            torch.testing.assert_close(other_slope, slope, rtol=ULPS, atol=0)
            assert other_slope[2, 1] == 0
            assert same(state_of(plain), other)

    @each_density
    def test_a_target_out_of_range(self, device, generator, backend, density):
        x = torch.randn(4, 3, generator=generator)
        criterion = GHMCLoss(density=density, backend=backend)
        call(criterion, device, x, torch.zeros(4, dtype=torch.int64))
        before = state_of(criterion)
        for target, named in (
            (torch.tensor([0, 4, 3, -1]), "class index 4, but logits have 3 classes"),
            (torch.tensor([[0.5, 1.0, 1.5]]).expand(4, 3), "target must lie in .* got 0.5 to 1.5"),
            (torch.full((4, 3), torch.nan), "target must lie in .* got nan"),
        ):
            criterion.validate = True
            with pytest.raises(ValueError, match=named):
                call(criterion, device, x, target)
            assert same(before, criterion)
            criterion.validate = False
            loss, slope = call(criterion, device, x, target)
            assert loss.isnan()
            assert slope[:3].isnan().all()
            assert same(before, criterion)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", ["1e4", "largest"])
    @pytest.mark.parametrize("kind", ["index", "hard", "soft"])
    def test_the_largest_logits(self, paper, device, backend, dtype, size, kind):
        largest = 1e4 if size == "1e4" else torch.finfo(dtype).max
        x = torch.tensor([largest, -largest, largest, -largest, 1.0], dtype=dtype).unsqueeze(1)
        hard = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0]).unsqueeze(1)
        target = {"index": 1 - hard.flatten().long(), "hard": hard, "soft": hard * 0.5 + 0.25}[kind]
        truth = paper.ghm_c(x, target)
        entries = GHMCLoss(strength=1.0, reduction="none", backend=backend)
        loss, slope = call(entries, device, x, target)
        lost = truth.weights * paper.cancellation(x, target)
        paper.assert_close(loss, truth.entries, lost)
        # p - p* is rounded at 1, whatever the logit.
        paper.assert_gradient_close(slope, truth.slopes * OUTER, 4 * paper.EPS32 * OUTER)
        mean = GHMCLoss(strength=1.0, backend=backend)
        loss, slope = call(mean, device, x, target)
        paper.assert_gradient_close(slope, truth.slopes / 5 * OUTER, paper.EPS32 * OUTER)
        assert int(mean.density.updates) == 1
        if truth.entries.sum() < torch.finfo(torch.float32).max:
            paper.assert_close(loss, truth.entries.sum() / 5, lost.sum())
        else:  # the sum is beyond float32: infinite, or right where it was added as a mean
            assert loss.isinf() or float(loss) == pytest.approx(truth.entries.sum() / 5, rel=ULPS)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bins", [2, 4, 8])
    def test_an_edge_opens_its_region(self, device, backend, dtype, bins):
        """Also `g = 0` and `g = 1`, and what lies 1e-6 below an edge."""
        edges = torch.arange(bins + 1) / bins
        norms = torch.cat([edges, edges[1:] - 2**-20])
        # p is exactly 1/2 or 1, and what a target takes from it is exact too.
        far = norms > 0.5
        x = torch.where(far, 8192.0, 0.0)
        target = torch.where(far, 1.0 - norms, 0.5 - norms)
        criterion = GHMCLoss(bins, 0.75, strength=1.0, reduction="none", backend=backend)
        loss, _ = call(criterion, device, x.to(dtype), target)
        expected = torch.tensor([2.0] * (bins - 1) + [3.0])
        assert torch.equal(4 * criterion.density.smoothed.cpu(), expected)
        region = (norms * bins).long().clamp(max=bins - 1)
        weight = len(norms) / expected[region] / bins
        entropy = torch.where(far, 8192.0 * norms, LOG2)
        torch.testing.assert_close(loss.cpu(), weight * entropy, rtol=ULPS, atol=0)

    @each_density
    def test_a_difference_that_overflows(self, device, backend, density):
        criterion = GHMRLoss(density=density, backend=backend)
        ordinary = torch.zeros(2, 4)
        call(criterion, device, ordinary, ordinary + 0.01)
        for dtype, overflows in (
            (torch.float32, True),
            (torch.bfloat16, True),
            (torch.float16, False),
        ):
            before = state_of(criterion)
            largest = torch.full((2, 4), torch.finfo(dtype).max, dtype=dtype)
            loss, slope = call(criterion, device, largest, -largest)
            # Two numbers of float16 differ by 131,008 at most: float32 holds that.
            assert (loss.isnan(), slope.isnan().all()) == (overflows, overflows)
            assert same(before, criterion) == overflows

    def test_the_first_steps(self, device, backend):
        """Counts (6, 2), (2, 6), (8, 0) at momentum 1/2; by hand."""
        batches = [(6, 2), (2, 6), (8, 0)]
        expected = {
            # S of (3, 1), (5/2, 7/2), (21/4, 7/4), divided by 1/2, 3/4, 7/8.
            "debiased": [[2 / 3, 2], [6 / 5, 6 / 7], [4 / 3, 0]],
            # S of (3, 1), (5/2, 7/2), (21/4, 7/2): undivided, and the empty region stays.
            "mmdet": [[4 / 3, 4], [8 / 5, 8 / 7], [32 / 21, 0]],
        }
        for ema, by_step in expected.items():
            criterion = GHMCLoss(
                2, 0.5, strength=1.0, ema=ema, reduction="none", backend=backend
            ).to(device)
            for counts, weight in zip(batches, by_step, strict=True):
                assert weights(criterion, counts, device) == pytest.approx(weight, rel=ULPS)

    @pytest.mark.parametrize("ema", ["debiased", "mmdet"])
    def test_a_region_hit_after_a_long_time(self, device, backend, ema):
        options = {"ema": ema, "reduction": "none", "backend": backend}
        momentum, empty = 0.75, 3
        once, bounded, milder = (
            GHMCLoss(2, momentum, **options, **more).to(device)
            for more in ({"strength": 1.0}, {"strength": 1.0, "max_weight": 10.0}, {})
        )
        for criterion in (once, bounded, milder):
            weights(criterion, (60, 4), device)
            for _ in range(empty):
                weights(criterion, (64, 0), device)
        if ema == "debiased":  # decayed
            average = (
                (1 - momentum) * (4 * momentum ** (empty + 1) + 1) / (1 - momentum ** (empty + 2))
            )
        else:  # as it was, moved on once
            average = momentum * (1 - momentum) * 4 + (1 - momentum)
        expected = 64 / average / 2
        assert weights(once, (63, 1), device)[1] == pytest.approx(expected, rel=ULPS)
        assert weights(bounded, (63, 1), device)[1] == 10.0
        assert weights(milder, (63, 1), device)[1] == pytest.approx(expected**0.25, rel=ULPS)
        # For ever: what has decayed to the smallest number, or to nothing, weighs N / ((1 - a) n).
        for left in (1e-45, 0.0):
            state = {"smoothed": torch.tensor([64.0, left]), "updates": torch.tensor(10_000)}
            once.density.load_state_dict(state)
            assert weights(once, (63, 1), device)[1] == 64 / (1 - momentum) / 2

    @pytest.mark.parametrize("kind", ["index", "soft", "deltas"])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_under_a_gradient_scaler(
        self, paper, device, generator, backend, dtype, kind
    ):
        """A step of mixed precision as users write it; gradients of 1e-8 are not lost."""
        training = Mixed(paper, device, generator, backend, dtype, kind)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        loss, gradient = training.backward(scaler)
        assert loss.dtype == torch.float32
        paper.assert_close(
            loss, training.truth.entries.sum() / training.divisor, training.lost.sum()
        )
        scaler.unscale_(training.optimizer)
        assert gradient.dtype == torch.float32
        scaled = (gradient * 2.0**16).to(dtype)
        assert torch.equal(scaled.float(), gradient * 2.0**16)  # the dtype held it
        slopes, lost = (
            x / training.divisor * 2.0**16 for x in (training.truth.slopes, training.lost)
        )
        paper.assert_gradient_close(scaled, slopes, lost)
        assert np.abs(slopes[slopes != 0]).min() / 2.0**16 < 6e-8  # float16 has none as small
        before = training.weight.detach().clone()
        scaler.step(training.optimizer)
        scaler.update()
        assert torch.equal(training.weight, before - gradient)
        assert scaler.get_scale() == 2.0**16

    def test_a_step_that_the_scaler_skips(self, paper, device, generator, backend):
        training = Mixed(paper, device, generator, backend, torch.float16, "index")
        before = training.weight.detach().clone()
        # Forward is sound, and backward overflows: what was counted has been counted.
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**30)
        loss, _ = training.backward(scaler)
        assert loss.isfinite()
        assert training.predictions.grad.isinf().any()
        assert not training.predictions.grad.isnan().any()
        scaler.step(training.optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**29
        assert torch.equal(training.weight, before)
        assert int(training.criterion.density.updates) == 1
        # Forward overflows float16: nothing is counted, and nothing is learnt either.
        counted = state_of(training.criterion)
        with torch.no_grad():
            training.weight[0, 0] = 1e5
        before = training.weight.detach().clone()
        loss, _ = training.backward(scaler)
        assert loss.isnan()
        scaler.step(training.optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**28
        assert torch.equal(training.weight, before)
        assert same(counted, training.criterion)


class Mixed:
    """A model whose predictions under autocast are its parameters in half precision."""

    def __init__(self, paper, device, generator, backend, dtype, kind):
        rows, classes = 60, 3
        shape = (rows, classes)
        if kind == "deltas":
            # Of one region, so that weights are 1; small ones have small gradients.
            self.target = torch.zeros(shape)
            values = 10 ** torch.linspace(-7, -3, rows * classes).view(shape).to(dtype)
            self.truth = paper.ghm_r(values, self.target)
            self.lost, self.divisor = np.zeros(shape), rows * classes
            self.criterion = GHMRLoss(strength=1.0, backend=backend)
        else:
            self.target = torch.rand(shape, generator=generator)
            if kind == "index":
                self.target = torch.randint(-1, classes + 1, shape[:1], generator=generator)
            values = paper.draw_logits(shape, self.target, dtype, 30, generator)
            if kind == "index":  # a background of 1e-7, and one that no number stands for
                self.target[:2] = classes
                values[:2] = torch.tensor([[-16.0], [-12.0]], dtype=dtype)
            else:
                values[0], self.target[0] = -16.0, 0.0
            self.truth = paper.ghm_c(values, self.target)
            self.lost = self.truth.weights * paper.cancellation(values, self.target)
            self.divisor = int(self.truth.valid.sum())
            self.criterion = GHMCLoss(strength=1.0, backend=backend)
        self.criterion.to(device)
        self.dtype, self.device = dtype, device
        self.target = self.target.to(device)
        self.weight = torch.nn.Parameter(values.float().to(device))
        self.features = torch.eye(rows, device=device)
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)

    def backward(self, scaler):
        """The loss, and the gradient of the parameters as it is then."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=self.dtype):
            self.predictions = self.features @ self.weight
            self.predictions.retain_grad()
            loss = self.criterion(self.predictions, self.target)
        assert self.predictions.dtype == self.dtype
        scaler.scale(loss).backward()
        return loss.detach(), self.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(device, generator, backend, dtype):
    x, dense = torch.randn(30, 3, generator=generator), torch.rand(30, 3, generator=generator)
    x, index = x.to(dtype), torch.randint(-1, 4, (30,), generator=generator)
    for criterion, target in (
        (GHMCLoss(backend=backend), index),
        (GHMCLoss(backend=backend, average="positives"), dense),
        (GHMCLoss(backend=backend, density="exact", bins=4), index),
        (GHMCLoss(backend=backend, density="streaming", bins=4), dense),
        (GHMRLoss(backend=backend), dense),
        (GHMSoftmaxLoss(backend=backend), index % 3),
        (FocalLoss(backend=backend), index),
    ):
        plain, other = criterion, copy.deepcopy(criterion)
        loss, slope = call(plain, device, x, target)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            cast_loss, cast_slope = call(other, device, x, target)
        assert torch.equal(cast_loss, loss)
        assert torch.equal(cast_slope, slope)
        assert slope.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_the_smallest_logits_are_zero(device, backend, dtype, kind):
    """Numbers below the normal ones: g is 1/2 on either side of 0, and opens the upper half."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([smallest, -smallest, 0.0, -0.0], dtype=dtype).unsqueeze(1)
    target = torch.tensor([0, 1, 0, 1])
    target = target.unsqueeze(1).float() if kind == "dense" else target
    criterion = GHMCLoss(2, strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, device, x, target)
    assert loss.flatten().tolist() == pytest.approx([LOG2] * 4, rel=ULPS)
    sign = -1 if kind == "dense" else 1
    expected = [sign * s * 0.5 * OUTER for s in (-1, 1, -1, 1)]
    assert slope.flatten().tolist() == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)
    assert criterion.density.smoothed.tolist() == [0.0, 1.0]


def test_losses_below_the_normal_numbers_may_be_zero(device, backend):
    x = torch.tensor([[-95.0], [-100.0], [-200.0]])
    criterion = GHMCLoss(strength=0.0, reduction="none", backend=backend)
    tiny = torch.finfo(torch.float32).tiny
    for result in call(criterion, device, x, torch.ones(3, dtype=torch.int64)):
        assert (result >= 0).all()
        assert (result < tiny * OUTER).all()


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, torch.finfo(torch.float16).max)],
)
def test_softmax_of_large_logits(device, backend, dtype, largest):
    x = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) * largest
    x = x.to(dtype)
    criterion = GHMSoftmaxLoss(strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, device, x, torch.tensor([0, 0, 2]))
    # One sample in each of three regions: every weight is 1.
    assert loss.tolist() == pytest.approx([0.0, float(x[1, 1] - x[1, 0].float()), math.log(3)])
    expected = torch.tensor([[0, 0, 0], [-1, 1, 0], [1 / 3, 1 / 3, -2 / 3]]) * OUTER
    # Rounded to the dtype, and in bfloat16 once more as it is multiplied.
    step = max(2 * torch.finfo(dtype).eps, ULPS)
    torch.testing.assert_close(slope.cpu().float(), expected, rtol=step, atol=0)


@pytest.mark.parametrize("mu", [1e-18, 1e-6, 1e6, 1e14])
def test_any_width_of_the_quadratic_part(paper, device, backend, mu):
    pred = torch.tensor([0.0, 0.25, -1.0, 3.0, -100.0]) * mu
    truth = paper.ghm_r(pred, torch.zeros(5), mu=mu)
    criterion = GHMRLoss(mu, strength=1.0, reduction="none", backend=backend)
    loss, slope = call(criterion, device, pred, torch.zeros(5))
    paper.assert_close(loss, truth.entries)
    paper.assert_close(slope, truth.slopes * OUTER)


def test_a_width_whose_square_is_zero(device, backend):
    pred = torch.tensor([0.0, 1.0, -1e6, 1e30])
    criterion = GHMRLoss(1e-30, strength=0.0, reduction="none", backend=backend)
    loss, slope = call(criterion, device, pred, torch.zeros(4))
    assert loss.tolist() == pytest.approx(pred.abs().tolist(), rel=ULPS)
    assert slope.tolist() == pytest.approx([0, OUTER, -OUTER, OUTER], rel=ULPS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_of_zero_of_either_sign_ignores_and_any_other_keeps(device, backend, dtype):
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter compares the bits of bfloat16, where -0.0 is 32,768")
    least = torch.finfo(dtype).tiny
    weight = torch.tensor([0.0, -0.0, least, torch.finfo(dtype).max], dtype=dtype).unsqueeze(1)
    criterion = GHMCLoss(2, 0.0, strength=1.0, reduction="none", backend=backend)
    x = torch.zeros(4, 1)
    loss, slope = call(criterion, device, x, x, weight)
    assert loss.flatten().tolist() == pytest.approx([0, 0, LOG2, LOG2], rel=ULPS)
    assert slope.flatten().tolist() == pytest.approx([0, 0, OUTER / 2, OUTER / 2], rel=ULPS)
    assert criterion.density.smoothed.tolist() == [0.0, 2.0]
