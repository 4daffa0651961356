"""How work is cut into tiles, and the sum in a fixed order."""

import pytest
import torch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((0, 5), (0, 256, 8)),
        ((1, 1), (1, 2048, 1)),
        ((2049, 1), (2, 2048, 1)),
        ((512, 4), (1, 512, 4)),
        ((128, 80), (5, 128, 16)),
        ((129, 91), (12, 128, 16)),
    ],
)
def test_tiling(shape, expected):
    from ghm_triton.ops.tiles import tiling

    assert tiling(torch.empty(shape)) == expected
    assert tiling(torch.empty(shape)).programs == max(1, expected[0])


def test_the_sum_adds_what_is_there_and_nothing_else(device):
    from ghm_triton.ops.tiles import sum_partials

    for count in (1, 2, 3, 100, 1024):
        store = torch.full((2048,), torch.nan, device=device)
        store[:count] = torch.arange(1, count + 1, device=device)
        total = sum_partials(store[:count], torch.tensor(0.5, device=device))
        assert float(total) == count * (count + 1) / 4


def test_the_sum_keeps_what_float32_would_lose(device):
    from ghm_triton.ops.tiles import sum_partials

    partials = torch.tensor([2.0**25, 1.0, -(2.0**25)], device=device)
    assert float(sum_partials(partials, torch.ones((), device=device))) == 1.0


def test_booleans_pass_as_bytes():
    from ghm_triton.ops.tiles import pointer, strides

    flags = torch.zeros(4, 6, dtype=torch.bool)[:, ::2]
    assert pointer(flags).dtype == torch.uint8
    assert pointer(flags).data_ptr() == flags.data_ptr()
    assert strides(pointer(flags)) == (6, 2)
    assert (pointer(None), strides(None)) == (None, (0, 0))
    assert strides(torch.zeros(4)[::2]) == (2, 0)
