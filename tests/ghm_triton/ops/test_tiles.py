"""How work is cut into tiles, and the sum in a fixed order."""

import pytest
import torch
import triton
import triton.language as tl

from ghm_triton.ops.device import first_tile, next_tile, previous_tile

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
    from ghm_triton.ops.launch import tiling

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
    from ghm_triton.ops.launch import pointer, strides

    flags = torch.zeros(4, 6, dtype=torch.bool)[:, ::2]
    assert pointer(flags).dtype == torch.uint8
    assert pointer(flags).data_ptr() == flags.data_ptr()
    assert strides(pointer(flags)) == (6, 2)
    assert (pointer(None), strides(None)) == (None, (0, 0))
    assert strides(torch.zeros(4)[::2]) == (2, 0)
