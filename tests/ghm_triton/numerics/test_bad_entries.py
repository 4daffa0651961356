"""Entries that are missing, ignored, not finite or out of range."""

import math

import pytest
import torch

from ghm_triton import GHMCLoss, GHMRLoss, GHMSoftmaxLoss

# The interpreter's, which says what it does with what is not finite.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered in"
)

ULPS = 1e-6  # relative, of float32: a handful of roundings
LOG2 = math.log(2)  # the cross entropy of a logit of 0, whatever the target

# Not every value with every density, as the interpreter is slow.
each_bad_value = pytest.mark.parametrize(
    ("density", "value"),
    [
        *(("unit_region", value) for value in (torch.nan, torch.inf, -torch.inf)),
        *(("exact", value) for value in (torch.nan, torch.inf)),
        ("streaming", torch.nan),
    ],
)


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
    def test_nothing_to_learn_from(self, device, backend, call, state_of, density, reduction):
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
            assert before["updates"] == 1
            assert state_of(criterion) == before

    @each_bad_value
    def test_a_logit_or_prediction_that_is_not_finite(
        self, device, generator, backend, call, state_of, density, value
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
            assert state_of(criterion) == before

    @each_bad_value
    def test_an_ignored_entry_is_anything(
        self, device, generator, backend, call, state_of, density, value
    ):
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
            assert state_of(other) == state_of(plain)

    @pytest.mark.parametrize("density", ["unit_region", "exact", "streaming"])
    def test_a_target_out_of_range(self, device, generator, backend, call, state_of, density):
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
            assert state_of(criterion) == before
            criterion.validate = False
            loss, slope = call(criterion, device, x, target)
            assert loss.isnan()
            assert slope[:3].isnan().all()
            assert state_of(criterion) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_of_zero_of_either_sign_ignores_and_any_other_keeps(
    device, backend, call, outer, dtype
):
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter compares the bits of bfloat16, where -0.0 is 32,768")
    least = torch.finfo(dtype).tiny
    weight = torch.tensor([0.0, -0.0, least, torch.finfo(dtype).max], dtype=dtype).unsqueeze(1)
    criterion = GHMCLoss(2, 0.0, strength=1.0, reduction="none", backend=backend)
    x = torch.zeros(4, 1)
    loss, slope = call(criterion, device, x, x, weight)
    assert loss.flatten().tolist() == pytest.approx([0, 0, LOG2, LOG2], rel=ULPS)
    assert slope.flatten().tolist() == pytest.approx([0, 0, outer / 2, outer / 2], rel=ULPS)
    assert criterion.density.smoothed.tolist() == [0.0, 2.0]
