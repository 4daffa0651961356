"""GHM-C as a function, by either backend, against float64."""

import numpy as np
import pytest
import torch

from ghm_triton import (
    StrengthSchedule,
    ghm_c_loss,
    ghm_r_loss,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


def draw_target(kind, shape, generator):
    """`index` with some ignored rows, `soft` or `bool`, for logits of `shape`."""
    if kind == "index":
        return torch.randint(-1, shape[-1] + 1, shape[:-1], generator=generator)
    uniform = torch.rand(shape, generator=generator)
    return uniform < 0.2 if kind == "bool" else uniform


def check_ghm_c(paper, device, logits, target, label_weight=None, reduction="mean", **options):
    """The loss and its gradient are those of the paper."""
    average = options.pop("average", "valid")
    backend = options.pop("backend")
    options = {"strength": 1.0, **options}  # the paper's; the default is milder
    x = logits.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    loss = ghm_c_loss(
        x,
        target.to(device),
        given,
        reduction=reduction,
        average=average,
        backend=backend,
        **options,
    )
    (loss * OUTER).sum().backward()

    truth = paper.ghm_c(logits, target, label_weight, **options)
    scale = truth.scale(reduction, average)
    lost = truth.weights * scale * paper.cancellation(logits, target)
    assert loss.dtype == torch.float32
    if reduction == "none":
        paper.assert_close(loss, truth.entries, lost)
    else:
        paper.assert_close(loss, truth.entries.sum() * scale, lost.sum())
    assert x.grad.dtype == logits.dtype
    paper.assert_gradient_close(x.grad, truth.slopes * scale * OUTER, lost * OUTER)


class TestGHMC:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["index", "soft", "bool"])
    def test_every_dtype_and_target(self, paper, device, generator, backend, dtype, kind):
        target = draw_target(kind, (2, 60, 5), generator)
        logits = paper.draw_logits((2, 60, 5), target, dtype, 30, generator)
        check_ghm_c(paper, device, logits, target, backend=backend)

    @pytest.mark.parametrize("classes", [1, 3, 16, 80, 91])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_any_number_of_classes(self, paper, device, generator, backend, classes, kind):
        # 131 rows are not a multiple of any tile.
        target = draw_target(kind, (131, classes), generator)
        logits = paper.draw_logits((131, classes), target, torch.float32, 30, generator)
        check_ghm_c(paper, device, logits, target, backend=backend)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("average", ["valid", "positives"])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_reductions(self, paper, device, generator, backend, reduction, average, kind):
        target = draw_target(kind, (50, 4), generator)
        logits = paper.draw_logits((50, 4), target, torch.float32, 30, generator)
        options = {"reduction": reduction, "average": average, "backend": backend}
        check_ghm_c(paper, device, logits, target, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"strength": 0.0},
            {"strength": 0.25},
            {"strength": 0.5, "normalizer": "bins"},
            {"normalizer": "bins"},
            {"max_weight": 1.5},
            {"max_weight": 1.5, "strength": 0.5},
            {"bins": 1},
            {"bins": 7},
            {"bins": 31},
            {"bins": 32},
            {"bins": 200},
        ],
        ids=str,
    )
    def test_options(self, paper, device, generator, backend, options):
        target = draw_target("index", (80, 5), generator)
        bins = options.get("bins", 30)
        logits = paper.draw_logits((80, 5), target, torch.float32, bins, generator)
        check_ghm_c(paper, device, logits, target, backend=backend, **options)

    @pytest.mark.parametrize("shape", [(30, 5), (5,), (30, 1), (2, 1, 1), (2, 30, 5)])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_weight(self, paper, device, generator, backend, shape, kind, weighted):
        target = draw_target(kind, (2, 30, 5), generator)
        logits = paper.draw_logits((2, 30, 5), target, torch.float32, 30, generator)
        label_weight = torch.randint(0, 3, shape, generator=generator) / 2 + 0.25
        label_weight[label_weight == 0.25] = 0
        options = {"weighted": weighted, "backend": backend}
        check_ghm_c(paper, device, logits, target, label_weight, **options)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.float16])
    def test_label_weight_of_any_dtype(self, paper, device, generator, backend, dtype):
        target = draw_target("index", (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator)
        label_weight = torch.randint(0, 2, (40, 3), generator=generator).to(dtype)
        options = {"weighted": True, "backend": backend}
        check_ghm_c(paper, device, logits, target, label_weight, **options)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_index_of_any_dtype(self, paper, device, generator, backend, dtype):
        target = torch.randint(0, 4, (40,), generator=generator).to(dtype)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator)
        check_ghm_c(paper, device, logits, target, backend=backend)

    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded", "channels"])
    def test_any_strides(self, paper, device, generator, backend, kind, layout):
        shape = (40, 6)
        if layout == "channels":  # a head's output [N, C, H, W] seen as [N, H, W, C]
            shape = (2, 4, 5, 6)
        target = draw_target(kind, shape, generator)
        # Made where they are used: a copy to a device does not keep every layout.
        logits = paper.draw_logits(shape, target, torch.float32, 30, generator).to(device)
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
            target = torch.zeros(40, dtype=torch.int64) if kind == "index" else target[:1]
            target = target.expand(40, *target.shape[1:])
            row = paper.draw_logits((1, 6), target[:1], torch.float32, 30, generator)
            viewed = row.to(device).expand(40, 6)
        else:
            viewed = logits.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert layout == "expanded" or torch.equal(viewed, logits)
        check_ghm_c(paper, device, viewed, target, backend=backend)

    def test_a_vector_of_logits(self, paper, device, generator, backend):
        target = torch.rand(77, generator=generator)
        logits = paper.draw_logits((77,), target, torch.float32, 30, generator)
        check_ghm_c(paper, device, logits, target, backend=backend)
        # One sample with a class index: the vector is its row.
        index = torch.tensor(2)
        logits = paper.draw_logits((5,), index, torch.float32, 30, generator)
        check_ghm_c(paper, device, logits, index, backend=backend)

    def test_float64_runs_in_torch(self, paper, generator):
        target = draw_target("soft", (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float64, 30, generator).requires_grad_()
        loss = ghm_c_loss(logits, target.double(), strength=1.0)
        (loss * OUTER).backward()
        truth = paper.ghm_c(logits, target)
        # The weights are float32, rounded once each step of their making.
        paper.assert_close(loss, truth.entries.sum() / 120)
        paper.assert_close(logits.grad, truth.slopes / 120 * OUTER)
        assert loss.dtype == torch.float64

    def test_a_schedule_without_state_gives_its_start(self, paper, device, generator, backend):
        target = draw_target("index", (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator).to(device)
        strength = StrengthSchedule(0.5, 0.0, steps=10)
        loss = ghm_c_loss(logits, target.to(device), strength=strength, backend=backend)
        truth = paper.ghm_c(logits, target, strength=0.5)
        paper.assert_close(loss, truth.entries.sum() / truth.valid.sum())

    def test_the_default_strength_is_the_one_that_trains_best(self, generator):
        logits, target = torch.randn(40, 3, generator=generator), torch.zeros(40, dtype=int)
        assert ghm_c_loss(logits, target) == ghm_c_loss(logits, target, strength=0.25)
        assert ghm_r_loss(logits, -logits) == ghm_r_loss(logits, -logits, strength=0.25)

    def test_strength_zero_is_cross_entropy(self, device, generator, backend):
        logits = (torch.randn(40, 3, generator=generator) * 4).to(device).requires_grad_()
        target = torch.rand(40, 3, generator=generator).to(device)
        ours = ghm_c_loss(logits, target, strength=0.0, backend=backend)
        (ours_slope,) = torch.autograd.grad(ours * OUTER, logits)
        torchs = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        (torchs_slope,) = torch.autograd.grad(torchs * OUTER, logits)
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(ours_slope, torchs_slope)

    def test_hard_dense_targets_are_index_targets(self, device, generator, backend):
        logits = (torch.randn(60, 4, generator=generator) * 4).to(device)
        index = torch.randint(0, 5, (60,), generator=generator).to(device)
        dense = torch.nn.functional.one_hot(index, 5)[:, :4].float()
        by_index = ghm_c_loss(logits, index, backend=backend)
        torch.testing.assert_close(by_index, ghm_c_loss(logits, dense, backend=backend))

    def test_exact_edges_and_the_ends(self, paper, device, backend):
        # p = 1/2 exactly, so g = p* is 0 and 1/4, 1/2, 3/4 are edges: an edge opens its region.
        # Logits of +-1e4 have g of exactly 0 and 1; 1 belongs to the last region.
        logits = torch.tensor([0.0, 0.0, 0.0, 1e4, -1e4, 1e4, -1e4])
        target = torch.tensor([0.5, 0.25, 0.0, 1.0, 0.0, 0.0, 1.0])
        truth = paper.ghm_c(logits, target, bins=4)
        assert truth.counts == [3, 1, 1, 2]
        check_ghm_c(paper, device, logits, target, bins=4, backend=backend)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 5)])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_nothing_in_nothing_out(self, device, backend, shape, kind, reduction):
        if kind == "index" and len(shape) == 1:
            shape = (0, 1)
        logits = torch.zeros(shape, device=device, requires_grad=True)
        target = torch.zeros(shape[:-1] if kind == "index" else shape, device=device)
        target = target.long() if kind == "index" else target
        loss = ghm_c_loss(logits, target, reduction=reduction, backend=backend)
        (loss.sum() * OUTER).backward()
        assert float(loss.detach().sum()) == 0.0
        assert loss.shape == (logits.shape if reduction == "none" else ())
        assert logits.grad.shape == logits.shape

    @pytest.mark.parametrize("positives", [0.0, 0.25, 1.0, 1.5])
    def test_positives_below_one_count_as_one(self, device, backend, positives):
        logits = torch.zeros(10, 1, device=device)
        target = torch.zeros(10, 1, device=device)
        target[:2] = positives / 2
        options = {"strength": 0.0, "backend": backend}
        mean = ghm_c_loss(logits, target, average="positives", **options)
        whole = ghm_c_loss(logits, target, reduction="sum", **options)
        assert float(mean) == pytest.approx(float(whole) / max(positives, 1.0), rel=1e-6)

    def test_everything_ignored(self, device, generator, backend):
        logits = torch.randn(20, 3, generator=generator).to(device).requires_grad_()
        for target, weight in (
            (torch.full((20,), -1), None),
            (torch.zeros(20, dtype=torch.int64), torch.zeros(20, 3)),
        ):
            given = None if weight is None else weight.to(device)
            loss = ghm_c_loss(logits, target.to(device), given, backend=backend)
            (slope,) = torch.autograd.grad(loss * OUTER, logits)
            assert float(loss.detach()) == 0.0
            assert not slope.any()

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_what_is_ignored_may_be_anything(self, paper, device, generator, backend, poison, kind):
        target = draw_target(kind, (40, 3), generator)
        logits = paper.draw_logits((40, 3), target, torch.float32, 30, generator)
        weight = torch.ones(40, 3)
        weight[5:9, 1] = 0
        logits[5:9, 1] = poison
        if kind == "index":
            target[20] = -1
            logits[20] = poison
        else:
            target[5:9, 1] = poison
        check_ghm_c(paper, device, logits, target, weight, backend=backend)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    def test_a_logit_that_is_not_finite(self, device, generator, backend, reduction, poison):
        logits = torch.randn(40, 3, generator=generator)
        logits[7, 2] = poison
        logits = logits.to(device).requires_grad_()
        target = torch.zeros(40, dtype=torch.int64, device=device)
        loss = ghm_c_loss(logits, target, reduction=reduction, backend=backend)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().any()
        assert slope[7, 2].isnan()

    def test_an_index_above_the_classes(self, device, generator, backend):
        logits = torch.randn(40, 3, generator=generator).to(device)
        target = torch.zeros(40, dtype=torch.int64, device=device)
        assert not ghm_c_loss(logits, target + 3, backend=backend, validate=False).isnan()
        target[3] = 4
        with pytest.raises(ValueError, match=r"class index 4, but logits have 3 classes"):
            ghm_c_loss(logits, target, backend=backend, validate=True)
        assert ghm_c_loss(logits, target, backend=backend, validate=False).isnan()

    @pytest.mark.parametrize("wrong", [1.5, -0.1, torch.nan])
    def test_a_target_out_of_range(self, device, generator, backend, wrong):
        logits = torch.randn(40, 3, generator=generator).to(device)
        target = torch.zeros(40, 3, device=device)
        target[3, 1] = wrong
        with pytest.raises(ValueError, match=r"target must lie in \[0, 1\]"):
            ghm_c_loss(logits, target, backend=backend, validate=True)
        assert ghm_c_loss(logits, target, backend=backend, validate=False).isnan()

    @pytest.mark.parametrize("kind", ["index", "soft"])
    def test_the_same_bits_every_time_and_inputs_untouched(self, device, generator, backend, kind):
        target = draw_target(kind, (700, 5), generator).to(device)
        logits = (torch.randn(700, 5, generator=generator) * 4).to(device).requires_grad_()
        weight = torch.randint(0, 3, (700, 1), generator=generator).float().to(device)
        given = [tensor.detach().clone() for tensor in (logits, target, weight)]
        results = []
        for _ in range(3):
            loss = ghm_c_loss(logits, target, weight, weighted=True, backend=backend)
            results.append((loss.detach(), *torch.autograd.grad(loss * OUTER, logits)))
        for loss, slope in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(slope, results[0][1])
        for before, after in zip(given, (logits, target, weight), strict=True):
            assert torch.equal(before, after.detach())

    def test_float16_gradients_do_not_underflow_under_a_loss_scale(self, device, backend):
        # 1 / N is 5e-5 and a background gradient 3e-4: their product is zero in float16 (smallest
        # 6e-8), and 1e-3 of the loss scale 65,536 is not.
        logits = torch.full((4000, 5), -8.0, dtype=torch.float16, device=device)
        logits.requires_grad_()
        target = torch.full((4000,), 5, device=device)
        loss = ghm_c_loss(logits, target, strength=0.0, backend=backend)
        (loss * 65536.0).backward()
        expected = 65536.0 / 20000 / (1 + np.exp(8.0))
        np.testing.assert_allclose(logits.grad.float().cpu(), expected, rtol=1e-3)  # eps of float16

    def test_no_gradient_reaches_anything_but_the_logits(self, device, generator, backend):
        logits = torch.randn(10, 3, generator=generator).to(device).requires_grad_()
        target = torch.rand(10, 3, generator=generator).to(device).requires_grad_()
        weight = torch.rand(10, 3, generator=generator).to(device).requires_grad_()
        ghm_c_loss(logits, target, weight, weighted=True, backend=backend).backward()
        assert target.grad is None
        assert weight.grad is None
        assert logits.grad.abs().sum() > 0
