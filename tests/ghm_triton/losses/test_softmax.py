"""Softmax GHM as a function, by either backend, against float64."""

import numpy as np
import pytest
import torch

from ghm_triton import GradientDensity, ghm_c_loss, ghm_softmax_loss

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


def draw(paper, generator, shape, dtype=torch.float32, bins=30, **options):
    """Logits and classes, some of which are ignored."""
    index = torch.randint(-1, shape[-1], shape[:-1], generator=generator)
    return paper.draw_rows(shape, index, dtype, bins, generator, **options), index


def check(paper, device, logits, index, label_weight=None, **options):
    """The loss and its gradient are those of the definition."""
    own = {"backend": options.pop("backend"), "reduction": options.pop("reduction", "mean")}
    own["loss_weight"] = options.pop("loss_weight", 1.0)
    ulps = options.pop("ulps", paper.FLOAT32_ULPS)
    options = {"strength": 1.0, **options}
    x = logits.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    loss = ghm_softmax_loss(x, index.to(device), given, **own, **options)
    (loss * OUTER).sum().backward()

    truth = paper.ghm_softmax(logits, index, label_weight, **options)
    scale = own["loss_weight"] * truth.scale(own["reduction"], "valid")
    assert loss.dtype == torch.float32
    entries = truth.entries if own["reduction"] == "none" else truth.entries.sum()
    paper.assert_close(loss, entries * scale, ulps=ulps)
    assert x.grad.dtype == logits.dtype
    roundings = 2 if logits.dtype == torch.bfloat16 else 1  # as in paper.assert_gradient_close
    paper.assert_close(x.grad, truth.slopes * scale * OUTER, ulps=ulps, roundings=roundings)


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_every_dtype(self, paper, device, generator, backend, dtype, reduction):
        logits, index = draw(paper, generator, (2, 60, 5), dtype)
        check(paper, device, logits, index, reduction=reduction, backend=backend)

    @pytest.mark.parametrize("classes", [1, 2, 3, 16, 91])
    def test_any_number_of_classes(self, paper, device, generator, backend, classes):
        # 67 rows are not a multiple of any tile.
        logits, index = draw(paper, generator, (67, classes))
        check(paper, device, logits, index, backend=backend)

    @pytest.mark.parametrize("classes", [1025, 4096])
    def test_a_row_that_fills_a_tile(self, paper, device, generator, backend, classes):
        logits, index = draw(paper, generator, (3, classes))
        check(paper, device, logits, index, backend=backend)

    @pytest.mark.parametrize(
        "options",
        [
            {"strength": 0.0},
            {"strength": 0.25},
            {"strength": 0.5, "normalizer": "bins"},
            {"max_weight": 1.5, "strength": 0.5},
            {"reduction": "sum", "loss_weight": 2.5},
            {"reduction": "none", "loss_weight": 2.5},
            {"bins": 1},
            {"bins": 32},
            {"bins": 200},
        ],
        ids=str,
    )
    def test_options(self, paper, device, generator, backend, options):
        logits, index = draw(paper, generator, (80, 5), bins=options.get("bins", 30))
        check(paper, device, logits, index, backend=backend, **options)

    @pytest.mark.parametrize("bins", [3, 30])
    def test_a_sliding_window(self, paper, device, generator, backend, bins):
        logits, index = draw(paper, generator, (80, 5), bins=bins, density="streaming")
        # As with sigmoids: a window is 1/60 long at least, a norm at 1 off by 2 steps of float32.
        ulps = paper.FLOAT32_ULPS + 2 * 2 * bins
        options = {"density": "streaming", "bins": bins, "ulps": ulps}
        check(paper, device, logits, index, backend=backend, **options)

    @pytest.mark.parametrize("shape", [(2, 30), (30,), (1,), (2, 1), ()])
    @pytest.mark.parametrize(
        ("weighted", "reduction"), [(False, "mean"), (True, "mean"), (True, "none")]
    )
    def test_label_weight(self, paper, device, generator, backend, shape, weighted, reduction):
        logits, index = draw(paper, generator, (2, 30, 5))
        label_weight = torch.randint(0, 3, shape, generator=generator) * 0.7
        if label_weight.numel() < 3:
            label_weight += 0.7
        options = {"weighted": weighted, "reduction": reduction, "backend": backend}
        check(paper, device, logits, index, label_weight, **options)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
    def test_label_weight_of_any_dtype(self, paper, device, generator, backend, dtype):
        logits, index = draw(paper, generator, (40, 3))
        label_weight = torch.randint(0, 2, (40,), generator=generator).to(dtype)
        check(paper, device, logits, index, label_weight, weighted=True, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
    def test_index_of_any_dtype(self, paper, device, generator, backend, dtype):
        logits, index = draw(paper, generator, (40, 3))
        if dtype == torch.uint8:
            index = index.clamp(min=0)
            logits = paper.draw_rows((40, 3), index, torch.float32, 30, generator)
        check(paper, device, logits, index.to(dtype), backend=backend)

    @pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded", "channels"])
    def test_any_strides(self, paper, device, generator, backend, layout):
        shape = (2, 4, 5, 6) if layout == "channels" else (40, 6)
        logits, index = draw(paper, generator, shape)
        logits = logits.to(device)
        if layout == "transposed":
            viewed = logits.t().contiguous().t()
        elif layout == "strided":
            viewed = torch.full((80, 18), torch.nan, device=device)
            viewed[::2, ::3] = logits
            viewed = viewed[::2, ::3]
            index = torch.stack([index, torch.full_like(index, 99)], dim=1)[:, 0]
        elif layout == "offset":
            viewed = torch.full((41, 7), torch.nan, device=device)
            viewed[1:, 1:] = logits
            viewed = viewed[1:, 1:]
        elif layout == "expanded":
            index = index.clamp(min=0)[:1].expand(40)
            row = paper.draw_rows((1, 6), index[:1], torch.float32, 30, generator)
            viewed = row.to(device).expand(40, 6)
        else:
            viewed = logits.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert layout == "expanded" or torch.equal(viewed, logits)
        reduction = "none" if layout in ("strided", "channels") else "mean"
        check(paper, device, viewed, index, reduction=reduction, backend=backend)

    def test_one_sample(self, paper, device, generator, backend):
        index = torch.tensor(2)
        logits = paper.draw_rows((5,), index, torch.float32, 30, generator)
        for reduction in ("mean", "none"):
            check(paper, device, logits, index, reduction=reduction, backend=backend)

    def test_float64_runs_in_torch(self, paper, generator):
        logits, index = draw(paper, generator, (40, 3), torch.float64)
        logits.requires_grad_()
        loss = ghm_softmax_loss(logits, index, strength=1.0)
        (loss * OUTER).backward()
        truth = paper.ghm_softmax(logits, index)
        scale = truth.scale("mean", "valid")
        # The weights are float32, rounded once each step of their making.
        paper.assert_close(loss, truth.entries.sum() * scale)
        paper.assert_close(logits.grad, truth.slopes * scale * OUTER)
        assert loss.dtype == torch.float64

    def test_strength_zero_is_cross_entropy(self, device, generator, backend):
        logits = (torch.randn(2, 40, 3, generator=generator) * 4).to(device).requires_grad_()
        index = torch.randint(-1, 3, (2, 40), generator=generator).to(device)
        ours = ghm_softmax_loss(logits, index, strength=0.0, backend=backend)
        (ours_slope,) = torch.autograd.grad(ours * OUTER, logits)
        torchs = torch.nn.functional.cross_entropy(logits.mT, index, ignore_index=-1)
        (torchs_slope,) = torch.autograd.grad(torchs * OUTER, logits)
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(ours_slope, torchs_slope)

    @pytest.mark.parametrize("strength", [0.0, 1.0])
    def test_two_classes_are_one_sigmoid(self, paper, device, generator, backend, strength):
        """`1 - p_y` of two classes is `|sigmoid(x_0 - x_1) - p*|`, and so is the rest."""
        logits, index = draw(paper, generator, (60, 2))
        logits = logits.round(decimals=2).to(device).requires_grad_()
        index = index.to(device)
        options = {"strength": strength, "backend": backend}
        pair = ghm_softmax_loss(logits, index, **options)
        (slope,) = torch.autograd.grad(pair * OUTER, logits)
        single = (logits[:, :1] - logits[:, 1:]).detach().requires_grad_()
        sigmoid = ghm_c_loss(single, index, **options)  # class 0, or background
        (expected,) = torch.autograd.grad(sigmoid * OUTER, single)
        # float32 either way; the difference is rounded before the one and within the other.
        torch.testing.assert_close(pair, sigmoid, rtol=1e-5, atol=0)
        both = torch.cat([expected, -expected], dim=1)
        torch.testing.assert_close(slope, both, rtol=1e-5, atol=0)


class TestNumerics:
    def test_small_and_large_losses_keep_their_digits(self, paper, device, backend):
        # Integers, so that the difference is exact and its exponential alone is rounded.
        gaps = torch.tensor([0.0, 1.0, 5.0, 17.0, 40.0, 60.0])
        logits = torch.zeros(24, 3)
        index = torch.arange(24) % 3
        for row, gap in enumerate(torch.cat([gaps, -gaps, gaps, -gaps])):
            logits[row, int(index[row])] = gap
        logits[12:] -= 1000
        check(paper, device, logits, index, strength=0.0, reduction="none", backend=backend)

    @pytest.mark.parametrize("strength", [0.0, 1.0])
    @pytest.mark.parametrize("classes", [2, 5])
    def test_huge_logits(self, paper, device, generator, backend, classes, strength):
        index = torch.arange(40) % classes
        logits = torch.randint(-1, 2, (40, classes), generator=generator) * 1e4
        logits[::3] += torch.randn(14, classes, generator=generator).round(decimals=3)
        logits = logits.float()
        options = {"strength": strength, "bins": 7, "backend": backend}
        norms = paper.softmax_parts(paper.as_numpy(logits), index.numpy())[2]
        assert paper.away_from_edges(norms, 7).all()
        assert (norms == 0).any()
        assert (norms == 1).any()
        check(paper, device, logits, index, reduction="none", **options)

    def test_classes_masked_by_the_smallest_number(self, paper, device, generator, backend):
        logits, index = draw(paper, generator, (30, 4))
        logits = torch.cat([logits, torch.full((30, 2), torch.finfo(torch.float32).min)], dim=1)
        check(paper, device, logits, index, backend=backend)

    def test_exact_edges_and_the_ends(self, paper, device, backend):
        # Equal logits have p of exactly 1 / C: 1/2 and 3/4 are edges, and an edge opens its region.
        low = -1e4
        logits = torch.tensor(
            [[0, 0, low, low], [0, 0, 0, 0], [0, low, low, low], [low, 0, 0, 0.0], [low, 0, 0, low]]
        )
        index = torch.zeros(5, dtype=torch.int64)
        truth = paper.ghm_softmax(logits, index, bins=4)
        assert truth.counts == [1, 0, 1, 3]
        check(paper, device, logits, index, bins=4, reduction="none", backend=backend)

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("column", [0, 2])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_logit_that_is_not_finite(
        self, device, generator, backend, poison, column, reduction
    ):
        logits = torch.randn(40, 3, generator=generator)
        logits[7, column] = poison
        logits = logits.to(device).requires_grad_()
        index = torch.zeros(40, dtype=torch.int64, device=device)
        state = GradientDensity(10, momentum=0.5, device=device)
        options = {"reduction": reduction, "state": state, "backend": backend}
        loss = ghm_softmax_loss(logits, index, **options)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().all()
        assert slope[7].isnan().all()
        assert int(state.updates) == 0
        assert not state.smoothed.any()

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_ignored_may_be_anything(self, paper, device, generator, backend, poison):
        logits, index = draw(paper, generator, (40, 3))
        weight = torch.ones(40)
        weight[5:9] = 0
        logits[5:9, 1] = poison
        index[20] = -7
        logits[20] = poison
        weight[20] = torch.inf
        for reduction in ("mean", "none"):
            options = {"reduction": reduction, "weighted": True, "backend": backend}
            check(paper, device, logits, index, weight, **options)

    def test_an_index_that_is_no_class(self, device, generator, backend):
        logits = torch.randn(40, 3, generator=generator).to(device).requires_grad_()
        index = torch.zeros(40, dtype=torch.int64, device=device)
        for wrong in (3, 4, 2**40):
            index[3] = wrong
            expected = rf"class index {wrong}, but logits have 3 classes \(0..2, negative ignored\)"
            with pytest.raises(ValueError, match=expected):
                ghm_softmax_loss(logits, index, backend=backend, validate=True)
            loss = ghm_softmax_loss(logits, index, backend=backend, validate=False)
            (slope,) = torch.autograd.grad(loss, logits)
            assert loss.isnan()
            assert slope[3].isnan().all()
            # Under a weight of 0 it is nobody's business, where nobody looks.
            weight = torch.ones(40, device=device)
            weight[3] = 0
            kept = ghm_softmax_loss(logits, index, weight, backend=backend, validate=False)
            assert kept.isfinite()

    def test_float16_gradients_do_not_underflow_under_a_loss_scale(self, device, backend):
        # As for GHM-C: 1 / N times the slope is below 6e-8, and times a loss scale of 65,536 not.
        logits = torch.zeros(3000, 2, dtype=torch.float16, device=device)
        logits[:, 0] = 8.0
        logits.requires_grad_()
        index = torch.zeros(3000, dtype=torch.int64, device=device)
        loss = ghm_softmax_loss(logits, index, strength=0.0, backend=backend)
        (loss * 65536.0).backward()
        expected = 65536.0 / 3000 / (1 + np.exp(8.0))
        slope = logits.grad.float().cpu().numpy()
        np.testing.assert_allclose(slope, [[-expected, expected]] * 3000, rtol=1e-3)  # its eps


class TestEdges:
    @pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_nothing_in_nothing_out(self, device, backend, shape, reduction):
        logits = torch.zeros(shape, device=device, requires_grad=True)
        index = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        loss = ghm_softmax_loss(logits, index, reduction=reduction, backend=backend)
        (loss.sum() * OUTER).backward()
        assert float(loss.detach().sum()) == 0.0
        assert loss.shape == (index.shape if reduction == "none" else ())
        assert logits.grad.shape == logits.shape

    def test_everything_ignored(self, device, generator, backend):
        logits = torch.randn(20, 3, generator=generator).to(device).requires_grad_()
        none = torch.zeros(20, device=device)
        for index, weight in ((torch.full((20,), -1), None), (torch.zeros(20).long(), none)):
            loss = ghm_softmax_loss(logits, index.to(device), weight, backend=backend)
            (slope,) = torch.autograd.grad(loss * OUTER, logits)
            assert float(loss.detach()) == 0.0
            assert not slope.any()

    def test_the_same_bits_every_time_and_inputs_untouched(self, device, generator, backend):
        logits = (torch.randn(150, 5, generator=generator) * 4).to(device).requires_grad_()
        index = torch.randint(-1, 5, (150,), generator=generator).to(device)
        weight = torch.rand(150, generator=generator).to(device)
        given = [tensor.detach().clone() for tensor in (logits, index, weight)]
        results = []
        for _ in range(3):
            loss = ghm_softmax_loss(logits, index, weight, weighted=True, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss * OUTER, logits)))
        for loss, slope in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(slope, results[0][1])
        for before, after in zip(given, (logits, index, weight), strict=True):
            assert torch.equal(before, after.detach())

    def test_the_default_is_a_mild_weight_in_unit_regions(self, generator):
        logits, index = torch.randn(40, 3, generator=generator), torch.zeros(40, dtype=int)
        options = {"strength": 0.25, "bins": 30, "density": "unit_region", "reduction": "mean"}
        assert ghm_softmax_loss(logits, index) == ghm_softmax_loss(logits, index, **options)


class TestBadInput:
    @pytest.mark.parametrize(
        ("error", "match", "arguments"),
        [
            (TypeError, "logits must be a tensor, got list", ([1.0], torch.zeros(1))),
            (TypeError, "logits must be float32", (torch.zeros(2, 3).int(), torch.zeros(2).int())),
            (ValueError, r"C of at least 1, got \[\]", (torch.zeros(()), torch.zeros(()).int())),
            (ValueError, r"got \[2, 0\]", (torch.zeros(2, 0), torch.zeros(2).int())),
            (ValueError, r"target must be integer \[2\]", (torch.zeros(2, 3), torch.zeros(2))),
            (ValueError, r"got torch.int64 \[3\]", (torch.zeros(2, 3), torch.zeros(3).long())),
            (ValueError, r"got torch.bool \[2\]", (torch.zeros(2, 3), torch.zeros(2).bool())),
            (
                ValueError,
                r"label_weight \[2, 3\] does not broadcast to \[2\]",
                (torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3)),
            ),
            (
                ValueError,
                r"label_weight must lie in \[0, inf\]; got -1 to -1",
                (torch.zeros(2, 3), torch.zeros(2).long(), -torch.ones(2)),
            ),
            (
                ValueError,
                "target is on meta, the predictions on cpu",
                (torch.zeros(2, 3), torch.zeros(2, device="meta").long()),
            ),
        ],
    )
    def test_tensors(self, error, match, arguments):
        with pytest.raises(error, match=match):
            ghm_softmax_loss(*arguments)

    @pytest.mark.parametrize(
        ("match", "options"),
        [
            ("bins must be an integer from 1 to 1024, got 0", {"bins": 0}),
            (r"strength must lie in \[0, 1\], got 1.5", {"strength": 1.5}),
            ("normalizer must be one of valid_bins, bins; got 'x'", {"normalizer": "x"}),
            ("reduction must be one of mean, sum, none; got 'x'", {"reduction": "x"}),
            ("max_weight must be positive, got 0", {"max_weight": 0}),
            ("backend must be one of auto, triton, torch; got 'x'", {"backend": "x"}),
            ("'unit_region' or 'streaming', not 'exact'", {"density": "exact"}),
            ("not 'exact'", {"state": GradientDensity(10, density="exact")}),
        ],
        ids=str,
    )
    def test_options(self, match, options):
        with pytest.raises(ValueError, match=match):
            ghm_softmax_loss(torch.zeros(2, 3), torch.zeros(2).long(), **options)

    @pytest.mark.kernels
    def test_more_classes_than_a_tile_holds(self, kernels_run, device, generator):
        logits = torch.randn(2, 4097, generator=generator).to(device)
        index = torch.tensor([5, 4096], device=device)
        with pytest.raises(ValueError, match="up to 4096 classes, got 4097; use backend='torch'"):
            ghm_softmax_loss(logits, index, backend="triton")
        loss = ghm_softmax_loss(logits, index)
        assert torch.equal(loss, ghm_softmax_loss(logits, index, backend="torch"))
