"""The losses as modules: what they remember and what they forget."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ghm_triton import (
    FocalLoss,
    GHMCLoss,
    GHMRLoss,
    GHMSoftmaxLoss,
    StrengthSchedule,
    focal_loss,
    ghm_c_loss,
    ghm_softmax_loss,
)

OUTER = 3.7


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(11)


@pytest.fixture
def group_of_one():
    """A process group that is this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def step(criterion, predictions, *given):
    """Loss and gradient of one call."""
    x = predictions.detach().requires_grad_()
    loss = criterion(x, *given)
    (slope,) = torch.autograd.grad(loss * OUTER, x)
    return loss.detach(), slope


@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
@pytest.mark.parametrize("strength", [1.0, 0.25, StrengthSchedule(1.0, 0.0, 3)])
@pytest.mark.parametrize("normalizer", ["valid_bins", "bins"])
def test_ghm_c_over_several_steps(paper, device, generator, backend, ema, strength, normalizer):
    criterion = GHMCLoss(
        bins=10,
        momentum=0.75,
        strength=strength,
        ema=ema,
        normalizer=normalizer,
        average="positives",
        loss_weight=2.0,
        backend=backend,
    ).to(device)
    state = paper.Average(np.zeros(10))
    for n in range(4):
        # Each batch is of another size and spread, so that regions fall empty and fill again.
        target = torch.randint(-1, 4, (20 + 17 * n,), generator=generator)
        logits = paper.draw_logits(
            (len(target), 3), target, torch.float32, 10, generator, spread=[4, 0.5, 8, 2][n]
        )
        at = max(1.0 - n / 3, 0.0) if isinstance(strength, StrengthSchedule) else strength
        options = {"strength": at, "ema": ema, "normalizer": normalizer, "momentum": 0.75}
        truth = paper.ghm_c(logits, target, bins=10, state=state, **options)
        loss, slope = step(criterion, logits.to(device), target.to(device))
        scale = 2.0 * truth.scale("mean", "positives")
        paper.assert_close(loss, truth.entries.sum() * scale)
        paper.assert_close(slope, truth.slopes * scale * OUTER)
        paper.assert_close(criterion.density.smoothed, state.smoothed)


@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
def test_ghm_r_over_several_steps(paper, device, generator, backend, ema):
    criterion = GHMRLoss(ema=ema, strength=0.5, loss_weight=10.0, backend=backend).to(device)
    state = paper.Average(np.zeros(10))
    for spread in (0.1, 0.005, 1.0):
        target = torch.zeros(40, 4)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator, spread=spread)
        options = {"strength": 0.5, "ema": ema, "momentum": 0.7}
        truth = paper.ghm_r(pred, target, state=state, **options)
        loss, slope = step(criterion, pred.to(device), target.to(device))
        paper.assert_close(loss, truth.entries.sum() / 160 * 10)
        paper.assert_close(slope, truth.slopes / 160 * 10 * OUTER)


@pytest.mark.parametrize("density", ["exact", "streaming"])
@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
def test_sliding_windows_over_several_steps(paper, device, generator, backend, density, ema):
    schedule = StrengthSchedule(1.0, 0.5, 2)
    options = {"strength": schedule, "ema": ema, "density": density, "backend": backend}
    classify = GHMCLoss(bins=10, loss_weight=2.0, **options).to(device)
    regress = GHMRLoss(loss_weight=10.0, **options).to(device)
    states = [paper.Average(np.zeros(classify.density.regions)) for _ in range(2)]
    for n, spread in enumerate([4.0, 0.5, 2.0]):
        options = {"density": density, "ema": ema, "strength": [1.0, 0.75, 0.5][n]}
        target = torch.randint(-1, 4, (20 + 17 * n,), generator=generator)
        logits = paper.draw_logits(
            (len(target), 3), target, torch.float32, 10, generator, spread, density
        )
        truth = paper.ghm_c(logits, target, bins=10, state=states[0], momentum=0.75, **options)
        loss, slope = step(classify, logits.to(device), target.to(device))
        scale = 2.0 * truth.scale("mean", "valid")
        # A window is at least 1/20 long, and a norm next to 1 is off by 2 steps of float32 at most.
        ulps = paper.FLOAT32_ULPS + 2 * 20
        paper.assert_close(loss, truth.entries.sum() * scale, ulps=ulps)
        paper.assert_close(slope, truth.slopes * scale * OUTER, ulps=ulps)

        pred = paper.draw_pred(
            torch.zeros(30, 4), torch.float32, 10, 0.02, generator, 0.02 * spread, density
        )
        truth = paper.ghm_r(pred, torch.zeros(30, 4), state=states[1], momentum=0.7, **options)
        loss, slope = step(regress, pred.to(device), torch.zeros(30, 4, device=device))
        paper.assert_close(loss, truth.entries.sum() / 120 * 10, ulps=ulps)
        paper.assert_close(slope, truth.slopes / 120 * 10 * OUTER, ulps=ulps)
    if density == "streaming":
        paper.assert_close(classify.density.smoothed, states[0].smoothed)
        paper.assert_close(regress.density.smoothed, states[1].smoothed)


@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
@pytest.mark.parametrize("density", ["unit_region", "streaming"])
@pytest.mark.parametrize("strength", [1.0, StrengthSchedule(1.0, 0.0, 3)])
def test_softmax_over_several_steps(paper, device, generator, backend, ema, density, strength):
    criterion = GHMSoftmaxLoss(
        10, 0.75, strength, 2.0, density, ema=ema, backend=backend, validate=False
    ).to(device)
    state = paper.Average(np.zeros(criterion.density.regions))
    for n, spread in enumerate([4.0, 0.5, 2.0]):
        # Each batch is of another size and spread, so that regions fall empty and fill again.
        index = torch.randint(-1, 4, (20 + 17 * n,), generator=generator)
        shape = (len(index), 4)
        logits = paper.draw_rows(shape, index, torch.float32, 10, generator, spread, density)
        at = max(1.0 - n / 3, 0.0) if isinstance(strength, StrengthSchedule) else strength
        options = {"strength": at, "ema": ema, "density": density, "momentum": 0.75}
        truth = paper.ghm_softmax(logits, index, bins=10, state=state, **options)
        loss, slope = step(criterion, logits.to(device), index.to(device))
        scale = 2.0 * truth.scale("mean", "valid")
        # As above: the shortest window is 1/20 long.
        ulps = paper.FLOAT32_ULPS + 2 * 20 * (density == "streaming")
        paper.assert_close(loss, truth.entries.sum() * scale, ulps=ulps)
        paper.assert_close(slope, truth.slopes * scale * OUTER, ulps=ulps)
        paper.assert_close(criterion.density.smoothed, state.smoothed)


class TestAsReleased:
    """`ema="mmdet", normalizer="valid_bins", strength=1` is the authors' own algorithm."""

    @pytest.mark.parametrize("momentum", [0.0, 0.75])
    def test_ghm_c(self, paper, device, generator, backend, momentum):
        released = paper.ReleasedGHM(bins=30, momentum=momentum)
        criterion = GHMCLoss(
            momentum=momentum, ema="mmdet", normalizer="valid_bins", strength=1.0, backend=backend
        ).to(device)
        for n in range(5):
            target = (torch.rand(60 + n, 5, generator=generator) < 0.1).float()
            weight = torch.randint(0, 3, (60 + n, 5), generator=generator).float()
            logits = paper.draw_logits(
                tuple(target.shape), target, torch.float32, 30, generator, spread=1.0 + n
            )
            expected, expected_slope = released.ghm_c(
                paper.as_numpy(logits), paper.as_numpy(target), paper.as_numpy(weight)
            )
            loss, slope = step(criterion, *(t.to(device) for t in (logits, target, weight)))
            lost = np.abs(expected_slope).max() * 10 * paper.EPS32  # dense targets: p - p* cancels
            paper.assert_close(loss, expected)
            paper.assert_close(slope, expected_slope * OUTER, absolute=lost * OUTER)
        if momentum:
            paper.assert_close(criterion.density.smoothed, np.array(released.acc))

    @pytest.mark.parametrize("momentum", [0.0, 0.7])
    def test_ghm_r(self, paper, device, generator, backend, momentum):
        released = paper.ReleasedGHM(bins=10, momentum=momentum)
        criterion = GHMRLoss(
            momentum=momentum, ema="mmdet", normalizer="valid_bins", strength=1.0, backend=backend
        ).to(device)
        for n in range(5):
            target = torch.randn(40, 4, generator=generator)
            # Weights other than 0 and 1: the released `tot` is their sum, and cancels.
            weight = torch.randint(0, 3, (40, 1), generator=generator).float().expand(40, 4) / 2
            pred = paper.draw_pred(
                target, torch.float32, 10, 0.02, generator, spread=0.01 * (1 + 3 * n)
            )
            d = paper.as_numpy(pred) - paper.as_numpy(target)
            expected, expected_slope = released.ghm_r(d, paper.as_numpy(weight), 0.02)
            loss, slope = step(criterion, *(t.to(device) for t in (pred, target, weight)))
            paper.assert_close(loss, expected)
            paper.assert_close(slope, expected_slope * OUTER)

    def test_a_region_hit_for_the_first_time_shouts(self, paper, generator):
        """What users of the released code report; the default does not do it."""
        busy = torch.full((1000, 1), -4.0)
        rare = torch.cat([busy, torch.full((1, 1), 2.0)])
        weights = {}
        for ema in ("mmdet", "debiased"):
            criterion = GHMCLoss(ema=ema, momentum=0.9, strength=1.0, reduction="none")
            for _ in range(40):
                criterion(busy, torch.zeros_like(busy))
            loss = criterion(rare, torch.zeros_like(rare))
            fresh = ghm_c_loss(rare, torch.zeros_like(rare), strength=1.0, reduction="none")
            weights[ema] = float(loss[-1] / fresh[-1])
        # Against a fresh count, 1 / (1 - a) either way at once ...
        assert weights["mmdet"] == pytest.approx(10, rel=1e-3)
        # ... but only the released one starts every region so: the first step is 10x too heavy.
        first = {}
        for ema in ("mmdet", "debiased"):
            criterion = GHMCLoss(ema=ema, momentum=0.9, strength=1.0)
            first[ema] = float(criterion(rare, torch.zeros_like(rare)))
        plain = float(ghm_c_loss(rare, torch.zeros_like(rare), strength=1.0))
        assert first["mmdet"] == pytest.approx(10 * plain, rel=1e-5)
        assert first["debiased"] == pytest.approx(plain, rel=1e-5)


class TestState:
    def test_a_checkpoint_resumes_to_the_same_losses(self, device, generator, backend):
        criterion = GHMCLoss(strength=StrengthSchedule(1.0, 0.0, 8), backend=backend).to(device)
        batches = [
            (
                (torch.randn(30, 3, generator=generator) * k).to(device),
                torch.zeros(30, 3).to(device),
            )
            for k in (1, 2, 3, 4)
        ]
        for batch in batches[:2]:
            criterion(*batch)
        saved = copy.deepcopy(criterion.state_dict())
        assert set(saved) == {"density.smoothed", "density.updates"}
        resumed = GHMCLoss(strength=StrengthSchedule(1.0, 0.0, 8), backend=backend).to(device)
        resumed.load_state_dict(saved)
        for batch in batches[2:]:
            assert torch.equal(resumed(*batch), criterion(*batch))

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    def test_bad_batches_leave_no_trace(self, device, generator, backend, poison):
        criterion = GHMCLoss(backend=backend).to(device)
        good = torch.randn(30, 3, generator=generator).to(device)
        target = torch.zeros(30, 3, device=device)
        criterion(good, target)
        before = copy.deepcopy(criterion.state_dict())
        bad = good.clone()
        bad[3, 1] = poison
        assert criterion(bad, target).isnan()
        assert criterion(good, target, torch.zeros(1, device=device)) == 0.0
        criterion.eval()
        criterion(good * 2, target)
        assert all(torch.equal(before[k], v) for k, v in criterion.state_dict().items())
        criterion.train()
        criterion(good, target)
        assert int(criterion.density.updates) == 2

    def test_evaluation_mode_weighs_as_training_would(self, device, generator, backend):
        criterion = GHMCLoss(backend=backend).to(device)
        target = torch.zeros(30, 3, device=device)
        criterion(torch.randn(30, 3, generator=generator).to(device), target)
        batch = (torch.randn(30, 3, generator=generator) * 3).to(device)
        criterion.eval()
        evaluated = criterion(batch, target)
        criterion.train()
        assert torch.equal(criterion(batch, target), evaluated)

    @pytest.mark.parametrize("cast", ["half", "bfloat16"])
    def test_a_module_in_half_precision_counts_in_full(self, device, backend, cast):
        criterion = getattr(GHMCLoss(strength=1.0, backend=backend).to(device), cast)()
        dtype = getattr(torch, {"half": "float16"}.get(cast, cast))
        logits = torch.zeros(70_000, 1, dtype=dtype, device=device)
        loss = criterion(logits, torch.zeros(70_000, dtype=torch.int64, device=device))
        # g is sigmoid(0) = 1/2 at the single entry of each row: one region, so plain BCE log 2.
        assert float(loss) == pytest.approx(np.log(2), rel=1e-5)
        assert criterion.density.smoothed.dtype == torch.float32
        assert float(criterion.density.smoothed[15]) == pytest.approx(0.25 * 70_000)

    def test_the_order_of_entries_does_not_matter(self, device, generator, backend):
        logits = (torch.randn(500, 3, generator=generator) * 4).to(device)
        target = torch.randint(0, 4, (500,), generator=generator).to(device)
        shuffled = torch.randperm(500, generator=generator).to(device)
        one, another = (GHMCLoss(strength=1.0, backend=backend).to(device) for _ in range(2))
        loss, slope = step(one, logits, target)
        loss_too, slope_too = step(another, logits[shuffled], target[shuffled])
        # The weights are the same to the bit, made from integers; a vector unit and the scalar
        # code for the last few entries round apart, and the loss is added in another order.
        torch.testing.assert_close(slope[shuffled], slope_too, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, loss_too, rtol=1e-6, atol=0)


class TestSoftmaxState:
    def test_a_checkpoint_resumes_to_the_same_losses(self, device, generator, backend):
        options = {"strength": StrengthSchedule(1.0, 0.0, 8), "backend": backend}
        index = torch.zeros(30, dtype=torch.int64, device=device)
        batches = [torch.randn(30, 3, generator=generator).to(device) * k for k in (1, 2, 3)]
        criterion = GHMSoftmaxLoss(**options).to(device)
        criterion(batches[0], index)
        saved = copy.deepcopy(criterion.state_dict())
        assert set(saved) == {"density.smoothed", "density.updates"}
        resumed = GHMSoftmaxLoss(**options).to(device)
        resumed.load_state_dict(saved)
        for batch in batches[1:]:
            assert torch.equal(resumed(batch, index), criterion(batch, index))
        assert int(resumed.density.updates) == 3

    def test_bad_batches_and_evaluation_leave_no_trace(self, device, generator, backend):
        criterion = GHMSoftmaxLoss(backend=backend, validate=False).to(device)
        logits = torch.randn(30, 3, generator=generator).to(device)
        index = torch.zeros(30, dtype=torch.int64, device=device)
        criterion(logits, index)
        before = copy.deepcopy(criterion.state_dict())
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = logits.clone()
            bad[3, 1] = value
            assert criterion(bad, index).isnan()
        assert criterion(logits, index + 3).isnan()
        assert criterion(logits, index - 1) == 0.0
        criterion.eval()
        evaluated = criterion(logits * 2, index)
        assert all(torch.equal(before[k], v) for k, v in criterion.state_dict().items())
        criterion.train()
        assert torch.equal(criterion(logits * 2, index), evaluated)
        assert int(criterion.density.updates) == 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_module_in_half_precision_counts_in_full(self, device, backend, dtype):
        criterion = GHMSoftmaxLoss(strength=1.0, backend=backend).to(device).to(dtype)
        logits = torch.zeros(2051, 2, dtype=dtype, device=device)
        loss = criterion(logits, torch.zeros(2051, dtype=torch.int64, device=device))
        # g is 1/2 in every row: one region, so plain cross entropy log 2; 70,000 is no float16.
        assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
        assert criterion.density.smoothed.dtype == torch.float32
        assert float(criterion.density.smoothed[15]) == 0.25 * 2051

    def test_a_state_elsewhere_is_refused(self):
        criterion = GHMSoftmaxLoss().to("meta")
        with pytest.raises(ValueError, match=r"move the loss with .to\('cpu'\)"):
            criterion(torch.zeros(2, 3), torch.zeros(2, dtype=int))

    def test_a_group_of_one_changes_nothing(self, device, generator, backend, group_of_one):
        logits = (torch.randn(50, 4, generator=generator) * 3).to(device)
        index = torch.randint(-1, 4, (50,), generator=generator).to(device)
        options = {"strength": 1.0, "backend": backend}
        alone = GHMSoftmaxLoss(**options).to(device)
        shared = GHMSoftmaxLoss(process_group=group_of_one, **options).to(device)
        for _ in range(2):
            loss, slope = step(alone, logits, index)
            loss_too, slope_too = step(shared, logits, index)
            assert torch.equal(loss, loss_too)
            assert torch.equal(slope, slope_too)
        assert torch.equal(alone.density.smoothed, shared.density.smoothed)


@pytest.mark.parametrize("density", ["exact", "streaming"])
def test_windows_do_not_look_at_the_order(device, generator, backend, density):
    logits = (torch.randn(500, 3, generator=generator) * 4).to(device)
    target = torch.randint(0, 4, (500,), generator=generator).to(device)
    shuffled = torch.randperm(500, generator=generator).to(device)
    criterion = GHMCLoss(strength=1.0, density=density, backend=backend).to(device).eval()
    loss, slope = step(criterion, logits, target)
    loss_too, slope_too = step(criterion, logits[shuffled], target[shuffled])
    # As without windows: the weights are the same, and what multiplies them rounds by place.
    torch.testing.assert_close(slope[shuffled], slope_too, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, loss_too, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("reduction must be one of", lambda: GHMCLoss(reduction="x")),
        ("average must be one of", lambda: GHMCLoss(average="x")),
        ("backend must be one of", lambda: GHMCLoss(backend="x")),
        ("ema must be one of", lambda: GHMCLoss(ema="x")),
        (r"momentum must lie in \[0, 1\), got 1", lambda: GHMCLoss(momentum=1)),
        ("mu must be positive, got 0", lambda: GHMRLoss(mu=0)),
        ("density must be one of", lambda: GHMCLoss(density="x")),
        ("takes no process_group", lambda: GHMRLoss(density="exact", process_group=object())),
        ("reduction must be one of", lambda: GHMRLoss(reduction="x")),
        ("backend must be one of", lambda: GHMRLoss(backend="x")),
        ("average must be one of", lambda: FocalLoss(average="x")),
        ("backend must be one of", lambda: FocalLoss(backend="x")),
        ("unit_region, streaming; got 'exact'", lambda: GHMSoftmaxLoss(density="exact")),
        ("reduction must be one of", lambda: GHMSoftmaxLoss(reduction="x")),
        ("backend must be one of", lambda: GHMSoftmaxLoss(backend="x")),
    ],
)
def test_bad_options_are_refused_at_once(match, make):
    with pytest.raises(ValueError, match=match):
        make()


def test_focal_passes_its_options_on(device, generator, backend):
    logits = torch.randn(20, 3, generator=generator).to(device)
    target, weight = torch.rand(2, 20, 3, generator=generator).to(device)
    options = {"alpha": 0.4, "gamma": 1.0, "average": "valid", "backend": backend}
    options |= {"weighted": True, "reduction": "sum", "validate": False}
    target[0] = 1.5
    assert FocalLoss(**options)(logits, target, weight).isnan()
    target[0] = 0.5
    loss = FocalLoss(loss_weight=3.0, **options)(logits, target, weight)
    expected = 3.0 * focal_loss(logits, target, weight, **options)
    # The factor is multiplied before the sum is rounded, or after.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_softmax_passes_its_options_on(generator):
    logits, target = torch.randn(20, 3, generator=generator), torch.zeros(20, dtype=int)
    weight = torch.rand(20, generator=generator)
    options = {"bins": 5, "strength": 0.7, "normalizer": "bins", "max_weight": 1.1}
    for density in ("unit_region", "streaming"):
        options |= {"weighted": True, "reduction": "sum", "density": density}
        loss = GHMSoftmaxLoss(momentum=0.0, loss_weight=2.0, **options)(logits, target, weight)
        assert torch.equal(loss, 2.0 * ghm_softmax_loss(logits, target, weight, **options))


def test_ghm_modules_pass_their_options_on(generator):
    logits, target = torch.randn(20, 3, generator=generator), torch.rand(20, 3, generator=generator)
    weight = torch.rand(20, 1, generator=generator)
    options = {"average": "positives", "weighted": True, "reduction": "sum"}
    for density in ("unit_region", "exact", "streaming"):
        shared = {"strength": 0.7, "normalizer": "bins", "max_weight": 1.1, "density": density}
        shared["bins"] = 5
        loss = GHMCLoss(momentum=0.0, loss_weight=2.0, **options, **shared)(logits, target, weight)
        assert torch.equal(loss, 2.0 * ghm_c_loss(logits, target, weight, **options, **shared))
