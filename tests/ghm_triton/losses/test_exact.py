"""The losses by sliding window, exact and streaming, by either backend, against float64."""

import numpy as np
import pytest
import torch

from ghm_triton import GHMCLoss, GradientDensity, StrengthSchedule, ghm_c_loss, ghm_r_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it
SETTINGS = {"strength": 1.0, "loss_weight": 1.0, "average": "valid", "reduction": "mean"}


@pytest.fixture(params=["exact", "streaming"])
def density(request):
    return request.param


def draw_target(kind, shape, generator):
    """`index` with some ignored rows, or `soft`, for logits of `shape`."""
    if kind == "index":
        return torch.randint(-1, shape[-1] + 1, shape[:-1], generator=generator)
    return torch.rand(shape, generator=generator)


def of_length(paper, truth, options, norm_error):
    """What an error of a norm costs by way of the window's length, of 1 / (2 M) at least.

    Lengths from regions have no such error. A strength of less than 1 makes it smaller.
    """
    bins = options["bins"] if options["density"] == "exact" else 0
    return 2 * bins * norm_error * np.abs(truth)


def compare(paper, loss, slope, truth, scale, reduction, lost, length_error):
    entries = truth.entries * scale
    error = np.broadcast_to(lost + length_error(entries), entries.shape)
    if reduction == "none":
        paper.assert_close(loss, entries, error)
    else:
        paper.assert_close(loss, entries.sum(), error.sum())
    slopes = truth.slopes * scale * OUTER
    paper.assert_gradient_close(slope, slopes, lost * OUTER + length_error(slopes))


def check_ghm_c(paper, device, logits, target, label_weight=None, **options):
    """The loss and its gradient are those of the paper."""
    options = {**SETTINGS, "bins": 30, **options}
    x = logits.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    loss = ghm_c_loss(x, target.to(device), given, **options)
    (slope,) = torch.autograd.grad((loss * OUTER).sum(), x)
    assert slope.dtype == logits.dtype

    del options["backend"]
    reduction, average = options.pop("reduction"), options.pop("average")
    loss_weight = options.pop("loss_weight")
    truth = paper.ghm_c(logits, target, label_weight, **options)
    scale = truth.scale(reduction, average) * loss_weight
    cancelled = paper.cancellation(logits, target)
    norm_error = 2 * paper.EPS32 + cancelled  # of a sigmoid next to 1; and of p - p*
    compare(
        paper,
        loss,
        slope,
        truth,
        scale,
        reduction,
        truth.weights * scale * cancelled,
        lambda of: of_length(paper, of, options, norm_error),
    )


def check_ghm_r(paper, device, pred, target, label_weight=None, **options):
    """The loss and its gradient are those of the paper."""
    options = {**SETTINGS, "bins": 10, **options}
    del options["average"]
    x = pred.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    loss = ghm_r_loss(x, target.to(device), given, **options)
    (slope,) = torch.autograd.grad((loss * OUTER).sum(), x)
    assert slope.dtype == pred.dtype

    del options["backend"]
    reduction, loss_weight = options.pop("reduction"), options.pop("loss_weight")
    truth = paper.ghm_r(pred, target, label_weight, **options)
    scale = truth.scale(reduction, "valid") * loss_weight
    error = 4 * paper.EPS32  # of a hypotenuse and a division, next to 1
    compare(
        paper,
        loss,
        slope,
        truth,
        scale,
        reduction,
        0.0,
        lambda of: of_length(paper, of, options, error),
    )


class TestGHMC:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_every_dtype_and_target(self, paper, device, generator, backend, density, dtype, kind):
        target = draw_target(kind, (2, 40, 5), generator)
        logits = paper.draw_logits((2, 40, 5), target, dtype, 30, generator, density=density)
        check_ghm_c(paper, device, logits, target, backend=backend, density=density)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("average", ["valid", "positives"])
    def test_reductions(self, paper, device, generator, backend, density, reduction, average):
        options = {"reduction": reduction, "average": average, "loss_weight": 2.5}
        target = draw_target("index", (40, 4), generator)
        logits = paper.draw_logits((40, 4), target, torch.float32, 30, generator, density=density)
        check_ghm_c(paper, device, logits, target, backend=backend, density=density, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"strength": 0.0},
            {"strength": 0.25},
            {"max_weight": 0.9},
            {"max_weight": 0.9, "strength": 0.5},
            {"bins": 1},
            {"bins": 7, "normalizer": "bins"},
            {"bins": 100},
        ],
        ids=str,
    )
    def test_options(self, paper, device, generator, backend, density, options):
        target = draw_target("index", (50, 5), generator)
        bins = options.get("bins", 30)
        logits = paper.draw_logits((50, 5), target, torch.float32, bins, generator, density=density)
        check_ghm_c(paper, device, logits, target, backend=backend, density=density, **options)

    @pytest.mark.parametrize("shape", [(20, 5), (20, 1), (2, 1, 1)])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_weight(self, paper, device, generator, backend, density, shape, kind, weighted):
        target = draw_target(kind, (2, 20, 5), generator)
        logits = paper.draw_logits(
            (2, 20, 5), target, torch.float32, 30, generator, density=density
        )
        label_weight = torch.randint(0, 3, shape, generator=generator) / 2 + 0.25
        label_weight[label_weight == 0.25] = 0
        options = {"weighted": weighted, "backend": backend, "density": density}
        check_ghm_c(paper, device, logits, target, label_weight, **options)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
    def test_label_weight_of_any_dtype(self, paper, device, generator, backend, density, dtype):
        target = draw_target("index", (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator, density=density)
        label_weight = torch.randint(0, 2, (40, 3), generator=generator).to(dtype)
        options = {"weighted": True, "backend": backend, "density": density}
        check_ghm_c(paper, device, logits, target, label_weight, **options)

    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_any_strides(self, paper, device, generator, backend, density, kind):
        target = draw_target(kind, (2, 4, 5, 6), generator)
        logits = paper.draw_logits(
            (2, 4, 5, 6), target, torch.float32, 30, generator, density=density
        )
        viewed = logits.to(device).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        check_ghm_c(paper, device, viewed, target, backend=backend, density=density)
        viewed = logits.flatten(0, 2).to(device).t().contiguous().t()
        target = target.flatten(0, 2)
        check_ghm_c(paper, device, viewed, target, backend=backend, density=density)

    def test_a_vector_of_logits(self, paper, device, generator, backend, density):
        target = torch.rand(77, generator=generator)
        logits = paper.draw_logits((77,), target, torch.float32, 30, generator, density=density)
        check_ghm_c(paper, device, logits, target, backend=backend, density=density)

    def test_float64_runs_in_torch(self, paper, device, generator, density):
        target = draw_target("soft", (40, 3), generator).double()
        logits = paper.draw_logits((40, 3), target, torch.float64, 30, generator, density=density)
        check_ghm_c(paper, device, logits, target, backend="auto", density=density)

    def test_exact_edges_and_the_ends(self, paper, device, backend):
        # p = 1/2 exactly, so g = |1/2 - p*|: 0, 1/8 and so on, which lie on the edges of windows of
        # 1/4; logits of +-1e4 have g of exactly 0 and 1.
        target = torch.tensor([0.5, 0.375, 0.25, 0.25, 0.125, 0.0, 0.625, 1.0, 0.0, 0.0, 1.0])
        logits = torch.zeros(11)
        logits[7:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
        norms = np.array([0, 1, 2, 2, 3, 4, 1, 0, 0, 8, 8]) / 8
        counted = paper.exact_density(norms, np.ones(11, bool), 4)
        assert counted.tolist() == [24, 5 / 0.25, 16, 16, 12, 8, 5 / 0.25, 24, 24, 16, 16]
        options = {"bins": 4, "backend": backend, "density": "exact"}
        check_ghm_c(paper, device, logits, target, **options)

    @pytest.mark.parametrize("logit", [-1e4, 0.7, 1e4])
    def test_one_norm_for_all(self, paper, device, backend, density, logit):
        logits, target = torch.full((50, 3), logit), torch.zeros(50, dtype=torch.int64)
        check_ghm_c(paper, device, logits, target, backend=backend, density=density)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 5)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_nothing_in_nothing_out(self, device, backend, density, shape, reduction):
        logits = torch.zeros(shape, device=device, requires_grad=True)
        options = {"reduction": reduction, "backend": backend, "density": density}
        loss = ghm_c_loss(logits, torch.zeros(shape, device=device), **options)
        (loss.sum() * OUTER).backward()
        assert float(loss.detach().sum()) == 0.0
        assert loss.shape == (logits.shape if reduction == "none" else ())
        assert logits.grad.shape == logits.shape

    def test_everything_ignored(self, device, generator, backend, density):
        logits = torch.randn(20, 3, generator=generator).to(device).requires_grad_()
        target = torch.full((20,), -1, device=device)
        loss = ghm_c_loss(logits, target, backend=backend, density=density)
        (slope,) = torch.autograd.grad(loss * OUTER, logits)
        assert float(loss.detach()) == 0.0
        assert not slope.any()

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_what_is_ignored_may_be_anything(
        self, paper, device, generator, backend, density, poison, kind
    ):
        target = draw_target(kind, (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator, density=density)
        weight = torch.ones(40, 3)
        weight[5:9, 1] = 0
        logits[5:9, 1] = poison
        if kind == "index":
            target[20] = -1
            logits[20] = poison
        else:
            target[5:9, 1] = poison
        check_ghm_c(paper, device, logits, target, weight, backend=backend, density=density)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_a_logit_that_is_not_finite(
        self, device, generator, backend, density, reduction, poison, weighted
    ):
        logits = torch.randn(40, 3, generator=generator)
        logits[7, 2] = poison
        logits = logits.to(device).requires_grad_()
        target = torch.zeros(40, dtype=torch.int64, device=device)
        weight = torch.full((40, 1), 0.5, device=device)
        state = GradientDensity(30, 0.5, device=device, density=density)
        options = {"reduction": reduction, "weighted": weighted, "backend": backend}
        loss = ghm_c_loss(logits, target, weight, state=state, **options)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().all()
        assert slope[7, 2].isnan()
        assert int(state.updates) == 0
        assert not state.smoothed.any()

    def test_bad_targets_without_validation(self, device, generator, backend, density):
        logits = torch.randn(40, 3, generator=generator).to(device)
        options = {"validate": False, "backend": backend, "density": density}
        index = torch.zeros(40, dtype=torch.int64, device=device)
        index[3] = 4
        assert ghm_c_loss(logits, index, **options).isnan()
        for wrong in (1.5, -0.1, torch.nan):
            target = torch.zeros(40, 3, device=device)
            target[3, 1] = wrong
            assert ghm_c_loss(logits, target, **options).isnan()

    def test_the_same_bits_every_time_and_inputs_untouched(
        self, device, generator, backend, density
    ):
        target = draw_target("index", (300, 5), generator).to(device)
        logits = (torch.randn(300, 5, generator=generator) * 4).to(device).requires_grad_()
        weight = torch.randint(0, 3, (300, 1), generator=generator).float().to(device)
        given = [tensor.detach().clone() for tensor in (logits, target, weight)]
        results = []
        for _ in range(3):
            options = {"weighted": True, "backend": backend, "density": density}
            loss = ghm_c_loss(logits, target, weight, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss * OUTER, logits)))
        for loss, slope in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(slope, results[0][1])
        for before, after in zip(given, (logits, target, weight), strict=True):
            assert torch.equal(before, after.detach())

    def test_no_gradient_reaches_anything_but_the_logits(self, device, generator, backend, density):
        logits = torch.randn(10, 3, generator=generator).to(device).requires_grad_()
        target = torch.rand(10, 3, generator=generator).to(device).requires_grad_()
        weight = torch.rand(10, 3, generator=generator).to(device).requires_grad_()
        options = {"weighted": True, "backend": backend, "density": density}
        ghm_c_loss(logits, target, weight, **options).backward()
        assert target.grad is None
        assert weight.grad is None
        assert logits.grad.abs().sum() > 0

    def test_a_schedule_is_read_before_its_update(self, device, generator, backend, density):
        given = torch.randn(40, 3, generator=generator) * 4, torch.rand(40, 3, generator=generator)
        given = [tensor.to(device) for tensor in given]
        schedule = StrengthSchedule(1.0, 0.0, steps=2)
        state = GradientDensity(30, strength=schedule, density=density, device=device)
        for strength in (1.0, 0.5, 0.0):
            loss = ghm_c_loss(*given, state=state, backend=backend)
            options = {"strength": strength, "density": density, "backend": backend}
            assert torch.equal(loss, ghm_c_loss(*given, **options))

    def test_it_compiles_without_a_break(self, generator, density):
        logits = (torch.randn(40, 3, generator=generator) * 4).requires_grad_()
        target = torch.randint(-1, 4, (40,), generator=generator)
        criteria = [GHMCLoss(density=density, backend="torch", validate=False) for _ in range(2)]
        compiled = torch.compile(criteria[0], fullgraph=True, backend="eager", dynamic=False)
        for _ in range(2):
            losses = [compiled(logits, target), criteria[1](logits, target)]
            slopes = [torch.autograd.grad(loss * OUTER, logits)[0] for loss in losses]
            # Uncompiled, entries may be summed in another order.
            torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
            torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-12)
        assert torch.equal(*(criterion.density.smoothed for criterion in criteria))
        assert torch.equal(*(criterion.density.updates for criterion in criteria))


class TestGHMR:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_dtype_and_reduction(
        self, paper, device, generator, backend, density, dtype, reduction
    ):
        target = (torch.randn(60, 4, generator=generator) * 0.1).to(dtype)
        pred = paper.draw_pred(target, dtype, 10, 0.02, generator, density=density)
        options = {"reduction": reduction, "loss_weight": 10.0, "backend": backend}
        check_ghm_r(paper, device, pred, target, density=density, **options)

    @pytest.mark.parametrize(
        "options",
        [{"mu": 0.5}, {"strength": 0.25}, {"max_weight": 0.5}, {"bins": 1}, {"bins": 64}],
        ids=str,
    )
    def test_options(self, paper, device, generator, backend, density, options):
        target = torch.zeros(60, 4)
        mu, bins = options.get("mu", 0.02), options.get("bins", 10)
        given = (torch.float32, bins, mu, generator)
        pred = paper.draw_pred(target, *given, spread=2 * mu, density=density)
        check_ghm_r(paper, device, pred, target, backend=backend, density=density, **options)

    @pytest.mark.parametrize("shape", [(40, 4), (40, 1), (4,)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_weight(self, paper, device, generator, backend, density, shape, weighted):
        target = torch.zeros(40, 4)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator, density=density)
        label_weight = torch.randint(0, 3, shape, generator=generator).float()
        options = {"weighted": weighted, "backend": backend, "density": density}
        check_ghm_r(paper, device, pred, target, label_weight, **options)

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_what_is_not_finite(self, paper, device, generator, backend, density, poison):
        target = torch.zeros(30, 4)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator, density=density)
        pred[3], target[4] = poison, poison
        weight = torch.ones(30, 1)
        weight[3:5] = 0
        check_ghm_r(paper, device, pred, target, weight, backend=backend, density=density)
        weight[3] = 1
        given = [tensor.to(device) for tensor in (pred, target, weight)]
        assert ghm_r_loss(*given, backend=backend, density=density).isnan()

    @pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0)])
    def test_nothing_in_nothing_out(self, device, backend, density, shape):
        pred = torch.zeros(shape, device=device, requires_grad=True)
        loss = ghm_r_loss(pred, torch.zeros_like(pred), backend=backend, density=density)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert pred.grad.shape == shape


class TestBadInput:
    @pytest.mark.parametrize("loss", [ghm_c_loss, ghm_r_loss])
    def test_options(self, loss):
        given = torch.zeros(2, 3), torch.zeros(2, 3)
        with pytest.raises(ValueError, match="density must be one of unit_region, exact, stre"):
            loss(*given, density="window")
        with pytest.raises(ValueError, match=r"at most 341 bins .* got bins=342"):
            loss(*given, density="streaming", bins=342)
        with pytest.raises(ValueError, match="bins must be an integer from 1 to 1024, got 1025"):
            loss(*given, density="exact", bins=1025)
