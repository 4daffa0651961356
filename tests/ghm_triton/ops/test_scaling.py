"""The sum in a fixed order, and the gradient scaled in place."""

import pytest
import torch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


def test_the_sum_adds_what_is_there_and_nothing_else(device):
    from ghm_triton.ops.launch import sum_partials

    for count in (1, 2, 3, 100, 1024):
        store = torch.full((2048,), torch.nan, device=device)
        store[:count] = torch.arange(1, count + 1, device=device)
        total = sum_partials(store[:count], torch.tensor(0.5, device=device))
        assert float(total) == count * (count + 1) / 4


def test_the_sum_keeps_what_float32_would_lose(device):
    from ghm_triton.ops.launch import sum_partials

    partials = torch.tensor([2.0**25, 1.0, -(2.0**25)], device=device)
    assert float(sum_partials(partials, torch.ones((), device=device))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2047, 2049, 9001])
def test_a_gradient_is_scaled_where_it_lies(device, two_programs, dtype, count):
    from ghm_triton.ops.launch import scale_gradient

    store = torch.arange(-8, count + 8, device=device).to(dtype)
    expected = store.clone()
    expected[8 : 8 + count] *= -0.5  # a power of two: no rounding
    scale_gradient(store[8 : 8 + count], torch.tensor(-0.5, device=device))
    assert torch.equal(store, expected)


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_any_factor_but_one_reaches_the_gradient(device, factor):
    from ghm_triton.ops.launch import scale_gradient

    gradient = torch.ones(5, 3, device=device).t()
    scale_gradient(gradient, torch.tensor(factor, device=device))
    torch.testing.assert_close(gradient, torch.full_like(gradient, factor), equal_nan=True)


def test_a_factor_of_one_writes_nothing(device, monkeypatch):
    """Also where writing back would change the bits, as for a signalling NaN it does."""
    from ghm_triton.ops.launch import scale_gradient

    bits = torch.full((4,), 0x7F800001, dtype=torch.int32, device=device)
    scale_gradient(bits.view(torch.float32), torch.ones((), device=device))
    assert bits.tolist() == [0x7F800001] * 4


def test_a_gradient_with_its_dimensions_in_any_order(device):
    from ghm_triton.ops.launch import scale_gradient

    gradient = torch.empty(4, 6, 5, device=device).permute(2, 0, 1)
    gradient.copy_(torch.arange(120.0, device=device).view(5, 4, 6))
    expected = gradient * 3
    scale_gradient(gradient, torch.tensor(3.0, device=device))
    assert torch.equal(gradient, expected)
