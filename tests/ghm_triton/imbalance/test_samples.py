import pytest
import torch

from ghm_triton.imbalance.samples import cross_entropy_of_samples


def test_a_sample_loses_the_sum_over_its_classes():
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 8, (3, 50), generator=generator)
    target = torch.nn.functional.one_hot(labels.clamp(min=0), 8)[..., :7].double()
    p = torch.sigmoid(logits.to(torch.float64))
    # log(1 - p) through the other sign: 1 - p would round.
    plain = -(target * p.log() + (1 - target) * torch.sigmoid(-logits).log()).sum(-1)
    expected = plain.masked_fill(labels < 0, 0.0)
    ours = cross_entropy_of_samples(logits, labels)
    assert ours.dtype == torch.float64
    # float64: a few roundings of a sum of seven.
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.tensor([[30.0, -12.0]], dtype=dtype)
    ours = cross_entropy_of_samples(logits, torch.tensor([2]))
    expected = cross_entropy_of_samples(logits.double(), torch.tensor([2]))
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)  # float32's rounding


def test_large_logits_stay_finite_and_small_losses_keep_their_digits():
    logits = torch.tensor([[1e4], [-1e4], [40.0]], dtype=torch.float64)
    ours = cross_entropy_of_samples(logits, torch.tensor([0, 0, 0])).tolist()
    assert ours[0] == 0.0
    assert ours[1] == 1e4
    assert ours[2] == pytest.approx(4.248354255291589e-18, rel=1e-12)  # exp(-40)


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"labels are \[3\], logits \[2, 3\]"):
        cross_entropy_of_samples(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
