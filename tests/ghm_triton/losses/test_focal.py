"""Focal loss as a function, by either backend, against its formula in float64."""

import numpy as np
import pytest
import torch

from ghm_triton import focal_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


def draw(generator, kind, shape, dtype=torch.float32, spread=4.0):
    """Logits, and targets: `index` with some ignored rows, `hard`, `soft` or `bool`."""
    logits = (torch.randn(shape, generator=generator) * spread).to(dtype)
    if kind == "index":
        return logits, torch.randint(-1, shape[-1] + 1, shape[:-1], generator=generator)
    uniform = torch.rand(shape, generator=generator)
    return logits, {"soft": uniform, "bool": uniform < 0.2, "hard": (uniform < 0.2).float()}[kind]


def check(paper, device, logits, target, label_weight=None, **options):
    """The loss and its gradient are those of the formula."""
    backend, reduction = options.pop("backend"), options.pop("reduction", "mean")
    average, loss_weight = options.pop("average", "positives"), options.pop("loss_weight", 1.0)
    x = logits.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    own = {"reduction": reduction, "average": average, "loss_weight": loss_weight}
    loss = focal_loss(x, target.to(device), given, backend=backend, **own, **options)
    (loss * OUTER).sum().backward()

    truth = paper.focal(logits, target, label_weight, **options)
    scale = loss_weight * truth.scale(reduction, average)
    # A soft target's two slopes cancel: to a few ulps of either, below 2 where gamma is 2 or less.
    lost = truth.weights * scale * 8 * paper.EPS32 * float(paper.is_dense(target))
    ulps = tolerance(paper, logits, options.get("gamma", 2.0))
    assert loss.dtype == torch.float32
    entries = truth.entries if reduction == "none" else truth.entries.sum()
    paper.assert_close(loss, entries * scale, ulps=ulps)
    assert x.grad.dtype == logits.dtype
    roundings = 2 if logits.dtype == torch.bfloat16 else 1  # as in paper.assert_gradient_close
    slopes = truth.slopes * scale * OUTER
    paper.assert_close(x.grad, slopes, lost * OUTER, ulps=ulps, roundings=roundings)


def tolerance(paper, logits, gamma):
    """`q^gamma` is an exponential of `-gamma |x|` in one way or another, to an ulp of that."""
    finite = paper.as_numpy(logits)[np.isfinite(paper.as_numpy(logits))]
    # Beyond 110 it is 0 in float32.
    return paper.FLOAT32_ULPS + 2 * gamma * min(float(np.abs(finite).max(initial=0)), 110.0)


class TestAgainstTheFormula:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["index", "hard", "soft", "bool"])
    def test_every_dtype_and_target(self, paper, device, generator, backend, dtype, kind):
        logits, target = draw(generator, kind, (2, 30, 5), dtype)
        check(paper, device, logits, target, backend=backend)

    @pytest.mark.parametrize(
        ("alpha", "gamma"), [(0, 2), (1, 1.0), (0.25, 0), (0.4, 0.5), (0.25, 1.5), (0.9, 5)]
    )
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_alpha_and_gamma(self, paper, device, generator, backend, alpha, gamma, kind):
        logits, target = draw(generator, kind, (40, 3))
        options = {"alpha": alpha, "gamma": gamma, "reduction": "none"}
        check(paper, device, logits, target, backend=backend, **options)

    @pytest.mark.parametrize("classes", [1, 3, 16, 20, 91])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_any_number_of_classes(self, paper, device, generator, backend, classes, kind):
        # 131 rows are not a multiple of any tile.
        logits, target = draw(generator, kind, (131, classes))
        check(paper, device, logits, target, backend=backend)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("average", ["valid", "positives"])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_reductions(self, paper, device, generator, backend, reduction, average, kind):
        logits, target = draw(generator, kind, (50, 4))
        options = {"reduction": reduction, "average": average, "loss_weight": 2.5}
        check(paper, device, logits, target, backend=backend, **options)

    @pytest.mark.parametrize("shape", [(30, 5), (5,), (30, 1), (2, 1, 1), (2, 30, 5)])
    @pytest.mark.parametrize("kind", ["index", "hard"])
    @pytest.mark.parametrize(
        ("weighted", "average"), [(False, "valid"), (True, "valid"), (True, "positives")]
    )
    def test_label_weight(self, paper, device, generator, backend, shape, kind, weighted, average):
        logits, target = draw(generator, kind, (2, 30, 5))
        label_weight = torch.randint(0, 3, shape, generator=generator) * 0.7
        options = {"weighted": weighted, "average": average, "backend": backend}
        check(paper, device, logits, target, label_weight, **options)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
    def test_label_weight_of_any_dtype(self, paper, device, generator, backend, dtype):
        logits, target = draw(generator, "index", (40, 3))
        label_weight = torch.randint(0, 2, (40, 3), generator=generator).to(dtype)
        check(paper, device, logits, target, label_weight, weighted=True, backend=backend)

    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded", "channels"])
    def test_any_strides(self, paper, device, generator, backend, kind, layout):
        logits, target = draw(generator, kind, (2, 4, 5, 6) if layout == "channels" else (40, 6))
        logits = logits.to(device)
        if layout == "transposed":
            viewed = logits.t().contiguous().t()
        elif layout == "strided":
            viewed = torch.full((80, 18), torch.nan, device=device)
            viewed[::2, ::3] = logits
            viewed = viewed[::2, ::3]
        elif layout == "offset":
            viewed = torch.full((41, 7), torch.nan, device=device)
            viewed[1:, 1:] = logits
            viewed = viewed[1:, 1:]
        elif layout == "expanded":
            viewed = logits[:1].expand(40, 6)
        else:
            viewed = logits.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert layout == "expanded" or torch.equal(viewed, logits)
        reduction = "none" if kind == "index" else "mean"
        check(paper, device, viewed, target, reduction=reduction, backend=backend)

    def test_a_vector_of_logits(self, paper, device, generator, backend):
        check(paper, device, *draw(generator, "soft", (77,)), backend=backend)
        # One sample with a class index: the vector is its row.
        logits, _ = draw(generator, "soft", (5,))
        check(paper, device, logits, torch.tensor(2), backend=backend)

    def test_float64_runs_in_torch(self, paper, generator):
        logits, target = draw(generator, "soft", (40, 3), torch.float64)
        logits.requires_grad_()
        loss = focal_loss(logits, target.double(), gamma=1.5)
        (loss * OUTER).backward()
        truth = paper.focal(logits, target, gamma=1.5)
        scale = truth.scale("mean", "positives")
        assert loss.dtype == torch.float64
        # No float32 anywhere: a billionth of its step.
        assert loss.item() == pytest.approx(truth.entries.sum() * scale, rel=1e-14)
        slopes = paper.as_numpy(logits.grad)
        np.testing.assert_allclose(slopes, truth.slopes * scale * OUTER, rtol=1e-12, atol=1e-14)

    def test_gamma_zero_is_cross_entropy(self, device, generator, backend):
        logits, target = (t.to(device) for t in draw(generator, "soft", (40, 3)))
        options = {"alpha": 0.5, "gamma": 0.0, "average": "valid", "loss_weight": 2.0}
        ours = focal_loss(logits, target, backend=backend, **options)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        torch.testing.assert_close(ours, theirs)

    def test_it_agrees_with_torchvision(self, device, generator, backend):
        ops = pytest.importorskip("torchvision.ops")
        logits, target = (t.to(device) for t in draw(generator, "hard", (40, 3), spread=1.0))
        theirs = ops.sigmoid_focal_loss(logits, target, reduction="sum") / target.sum()
        torch.testing.assert_close(focal_loss(logits, target, backend=backend), theirs)


class TestNumerics:
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize("kind", ["index", "dense"])
    def test_huge_logits(self, paper, device, backend, gamma, kind):
        sizes = torch.tensor([0.0, 3.0, 8.0, 12.0, 16.0, 20.0, 40.0, 80.0, 120.0, 1e4])
        logits = torch.cat([sizes, -sizes]).repeat(2)[:, None]
        target = torch.arange(40) // 20
        if kind == "dense":
            target = 1.0 - target[:, None].float()
        options = {"gamma": gamma, "reduction": "none", "backend": backend}
        check(paper, device, logits, target, **options)

    @pytest.mark.parametrize("gamma", [1.0, 2.0])
    def test_a_hard_entry_that_is_nearly_lost(self, paper, device, backend, gamma):
        """Its slope holds `p_t log p_t`, where `p_t` of `1 - (1 - p_t)` would keep few digits."""
        logits = torch.arange(8.0, 18.0, 0.25, device=device).requires_grad_()
        target = torch.zeros(40, device=device)
        options = {"gamma": gamma, "alpha": 0.0, "reduction": "none", "backend": backend}
        loss = focal_loss(logits, target, **options)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        truth = paper.focal(logits, target, alpha=0.0, gamma=gamma)
        # A division to 2 ulps, which gamma multiplies, and as many products; rounded 1 - p_t, 14.
        paper.assert_close(slope, truth.slopes, ulps=2 + 2 * gamma)
        paper.assert_close(loss, truth.entries, ulps=2 + 2 * gamma)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize(("kind", "gamma"), [("index", 2.0), ("hard", 2.0), ("hard", 0.0)])
    def test_a_logit_that_is_not_finite(
        self, device, generator, backend, reduction, poison, kind, gamma
    ):
        logits, target = draw(generator, "hard", (40, 3))
        target[7] = torch.tensor([1.0, 0.0, 0.0])
        if kind == "index":
            target = target.argmax(dim=1)
        for column in range(2):  # the row's class, and another
            x = logits.clone()
            x[7, column] = poison
            x = x.to(device).requires_grad_()
            options = {"gamma": gamma, "reduction": reduction, "backend": backend}
            loss = focal_loss(x, target.to(device), **options)
            (slope,) = torch.autograd.grad(loss.sum(), x)
            assert (loss if reduction == "mean" else loss[7, column]).isnan()
            assert slope[7, column].isnan()
            assert int(slope.isnan().sum()) == 1

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("average", ["valid", "positives"])
    def test_what_is_ignored_may_be_anything(
        self, paper, device, generator, backend, poison, kind, average
    ):
        logits, target = draw(generator, kind, (40, 3))
        weight = torch.ones(40, 3)
        weight[5:9, 1] = 0
        logits[5:9, 1] = poison
        if kind == "index":
            target[20] = -1
            logits[20] = poison
            weight[20] = torch.inf
        else:
            target[5:9, 1] = poison
        options = {"average": average, "weighted": True, "backend": backend}
        check(paper, device, logits, target, weight, **options)

    @pytest.mark.parametrize("average", ["valid", "positives"])
    @pytest.mark.parametrize("weight", [None, torch.ones(1)])
    def test_a_target_out_of_range(self, device, generator, backend, average, weight):
        logits = torch.randn(40, 3, generator=generator).to(device).requires_grad_()
        index = torch.zeros(40, dtype=torch.int64, device=device)
        dense = torch.zeros(40, 3, device=device)
        weight = None if weight is None else weight.to(device)
        options = {"average": average, "backend": backend}
        assert focal_loss(logits, index + 3, weight, **options).isfinite()
        for wrong in (4, 2**40):
            index[3] = wrong
            with pytest.raises(ValueError, match=f"class index {wrong}, but logits have 3"):
                focal_loss(logits, index, weight, validate=True, **options)
            loss = focal_loss(logits, index, weight, validate=False, **options)
            (slope,) = torch.autograd.grad(loss, logits)
            assert loss.isnan()
            assert slope[3].isnan().all()
        for wrong in (1.5, -0.1, torch.nan):
            dense[3, 1] = wrong
            with pytest.raises(ValueError, match=r"target must lie in \[0, 1\]"):
                focal_loss(logits, dense, weight, validate=True, **options)
            loss = focal_loss(logits, dense, weight, validate=False, **options)
            (slope,) = torch.autograd.grad(loss, logits)
            assert loss.isnan()
            assert slope[3, 1].isnan()

    def test_float16_gradients_do_not_underflow_under_a_loss_scale(self, device, backend):
        # The slope of an easy negative is some 3e-7, divided by 4000 entries: 0 in float16, whose
        # smallest number is 6e-8; times the loss scale it is 4e-6.
        logits = torch.full((1000, 4), -8.0, dtype=torch.float16, device=device)
        logits.requires_grad_()
        target = torch.full((1000,), 4, device=device)
        options = {"gamma": 1.0, "average": "valid", "backend": backend}
        (focal_loss(logits, target, **options) * 65536.0).backward()
        q = 1 / (1 + np.exp(8.0))
        expected = 65536.0 / 4000 * 0.75 * q * ((1 - q) * np.logaddexp(0, -8.0) + q)
        # Half a step of the smallest numbers, 2^-24 apart.
        np.testing.assert_allclose(
            logits.grad.float().cpu(), expected, rtol=1e-3, atol=2.0**-25 * 1.01
        )
        assert logits.grad.all()


class TestEdges:
    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 5)])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize(
        ("reduction", "average"), [("mean", "valid"), ("mean", "positives"), ("none", "valid")]
    )
    def test_nothing_in_nothing_out(self, device, backend, shape, kind, reduction, average):
        if kind == "index" and len(shape) == 1:
            shape = (0, 1)
        logits = torch.zeros(shape, device=device, requires_grad=True)
        target = torch.zeros(shape[:-1] if kind == "index" else shape, device=device)
        target = target.long() if kind == "index" else target
        options = {"reduction": reduction, "average": average, "backend": backend}
        loss = focal_loss(logits, target, **options)
        (loss.sum() * OUTER).backward()
        assert float(loss.detach().sum()) == 0.0
        assert loss.shape == (logits.shape if reduction == "none" else ())
        assert logits.grad.shape == logits.shape

    @pytest.mark.parametrize("average", ["valid", "positives"])
    def test_everything_ignored(self, device, generator, backend, average):
        logits = torch.randn(20, 3, generator=generator).to(device).requires_grad_()
        none = torch.zeros(20, 3, device=device)
        for index, weight in ((torch.full((20,), -1), None), (torch.zeros(20).long(), none)):
            options = {"average": average, "backend": backend}
            loss = focal_loss(logits, index.to(device), weight, **options)
            (slope,) = torch.autograd.grad(loss * OUTER, logits)
            assert float(loss.detach()) == 0.0
            assert not slope.any()

    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_the_same_bits_every_time_and_inputs_untouched(self, device, generator, backend, kind):
        logits, target = (t.to(device) for t in draw(generator, kind, (150, 5)))
        weight = torch.rand(150, 1, generator=generator).to(device)
        logits.requires_grad_()
        given = [tensor.detach().clone() for tensor in (logits, target, weight)]
        results = []
        for _ in range(3):
            loss = focal_loss(logits, target, weight, weighted=True, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss * OUTER, logits)))
        for loss, slope in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(slope, results[0][1])
        for before, after in zip(given, (logits, target, weight), strict=True):
            assert torch.equal(before, after.detach())

    @pytest.mark.parametrize(
        ("match", "options"),
        [
            (r"alpha must lie in \[0, 1\], got 2", {"alpha": 2}),
            (r"alpha must lie in \[0, 1\], got nan", {"alpha": float("nan")}),
            ("gamma must be at least 0, got -1", {"gamma": -1}),
            ("gamma must be at least 0, got nan", {"gamma": float("nan")}),
            ("average must be one of valid, positives; got 'x'", {"average": "x"}),
            ("reduction must be one of mean, sum, none; got 'x'", {"reduction": "x"}),
            ("backend must be one of auto, triton, torch; got 'x'", {"backend": "x"}),
        ],
        ids=str,
    )
    def test_bad_options(self, match, options):
        with pytest.raises(ValueError, match=match):
            focal_loss(torch.zeros(1), torch.zeros(1), **options)
