"""How work is cut into tiles, the sum in a fixed order, and the gradient scaled in place."""

import pytest
import torch
import triton
import triton.language as tl

from ghm_triton.ops.device import first_tile, next_tile, previous_tile
from ghm_triton.ops.launch import pointer, scale_gradient, strides, sum_partials, tiling

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((0, 5), (0, 256, 8, 1)),
        ((1, 1), (1, 2048, 1, 1)),
        ((2049, 1), (2, 2048, 1, 2)),
        ((512, 4), (1, 512, 4, 1)),
        ((128, 80), (5, 128, 16, 5)),
        ((129, 91), (12, 128, 16, 12)),
        ((200_000, 80), (7815, 128, 16, 1024)),
    ],
)
def test_tiling(shape, expected):
    assert tiling(torch.empty(shape)) == (*expected, 4)


@triton.jit
def walk(seen_ptr, tiles, cols, BACK: tl.constexpr):
    start = tl.program_id(0)
    if BACK:
        start = tiles - 1 - start
    tile_r, tile_c = first_tile(start, cols, 4)
    step_r, step_c = first_tile(tl.num_programs(0), cols, 4)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tl.atomic_add(seen_ptr + tile_r * tl.cdiv(cols, 4) + tile_c, 1)
        if BACK:
            tile_r, tile_c = previous_tile(tile_r, tile_c, step_r, step_c, cols, 4)
        else:
            tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, 4)


@pytest.mark.parametrize(("tiles_of", "programs"), [((1, 1), 1), ((7, 3), 5), ((40, 11), 17)])
def test_the_walk_meets_every_tile_once_forwards_and_backwards(device, tiles_of, programs):
    rows, cols = tiles_of
    for back in (False, True):
        seen = torch.zeros(rows * cols + 8, dtype=torch.int32, device=device)
        walk[(programs,)](seen, rows * cols, cols * 4 - 1, BACK=back)
        assert seen.tolist() == [1] * (rows * cols) + [0] * 8


def test_booleans_pass_as_bytes():
    flags = torch.zeros(4, 6, dtype=torch.bool)[:, ::2]
    assert pointer(flags).dtype == torch.uint8
    assert pointer(flags).data_ptr() == flags.data_ptr()
    assert strides(pointer(flags)) == (6, 2)
    assert (pointer(None), strides(None)) == (None, (0, 0))
    assert strides(torch.zeros(4)[::2]) == (2, 0)


def test_the_sum_adds_what_is_there_and_nothing_else(device):
    for count in (1, 2, 3, 100, 1024):
        store = torch.full((2048,), torch.nan, device=device)
        store[:count] = torch.arange(1, count + 1, device=device)
        total = sum_partials(store[:count], torch.tensor(0.5, device=device))
        assert float(total) == count * (count + 1) / 4


def test_the_sum_keeps_what_float32_would_lose(device):
    partials = torch.tensor([2.0**25, 1.0, -(2.0**25)], device=device)
    assert float(sum_partials(partials, torch.ones((), device=device))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2047, 2049, 9001])
def test_a_gradient_is_scaled_where_it_lies(device, two_programs, dtype, count):
    store = torch.arange(-8, count + 8, device=device).to(dtype)
    expected = store.clone()
    expected[8 : 8 + count] *= -0.5  # a power of two: no rounding
    scale_gradient(store[8 : 8 + count], torch.tensor(-0.5, device=device))
    assert torch.equal(store, expected)


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_any_factor_but_one_reaches_the_gradient(device, factor):
    gradient = torch.ones(5, 3, device=device).t()
    scale_gradient(gradient, torch.tensor(factor, device=device))
    torch.testing.assert_close(gradient, torch.full_like(gradient, factor), equal_nan=True)


def test_a_factor_of_one_writes_nothing(device, monkeypatch):
    """Also where writing back would change the bits, as for a signalling NaN it does."""
    bits = torch.full((4,), 0x7F800001, dtype=torch.int32, device=device)
    scale_gradient(bits.view(torch.float32), torch.ones((), device=device))
    assert bits.tolist() == [0x7F800001] * 4


def test_a_gradient_with_its_dimensions_in_any_order(device):
    gradient = torch.empty(4, 6, 5, device=device).permute(2, 0, 1)
    gradient.copy_(torch.arange(120.0, device=device).view(5, 4, 6))
    expected = gradient * 3
    scale_gradient(gradient, torch.tensor(3.0, device=device))
    assert torch.equal(gradient, expected)
