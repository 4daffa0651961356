"""Cutting a batch into blocks, reading them, and the memory to work in."""

import threading

import pytest
import torch

from ghm_triton.cpu import blocks as module
from ghm_triton.cpu.blocks import ENTRIES, LOSS, MAX_VIEWS, block_entries, blocks, buffer, reserve
from ghm_triton.cpu.loss import surely_finite

SHAPES = [(0, 3), (1, 1), (45, 1), (46, 1), (20, 7), (3, 44), (3, 45), (3, 46), (2, 200)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_every_entry_is_in_one_block_in_the_order_of_memory(shape):
    entries = torch.arange(shape[0] * shape[1]).view(shape)
    seen = []
    for block in blocks(*shape):
        part = block.cut(entries)
        assert part.shape == block.shape
        assert 0 < block.entries <= 45
        assert part.is_contiguous()
        assert torch.equal(part.reshape(-1), entries.view(-1)[block.flat])
        seen += part.reshape(-1).tolist()
    assert seen == list(range(entries.numel()))


def test_blocks_grow_with_a_second_thread_and_no_further():
    threads = torch.get_num_threads()
    try:
        for count, factor in ((1, 1), (2, 2), (3, 2)):
            torch.set_num_threads(count)
            assert block_entries() == factor * ENTRIES
            rows = block_entries() // 80
            assert len(list(blocks(12500, 80))) == -(-12500 // rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bool])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded", "row"])
@pytest.mark.usefixtures("small_blocks")
def test_reading_any_strides_and_dtype(generator, dtype, layout):
    tensor = (torch.randn(20, 7, generator=generator) * 4).to(dtype)
    if layout == "transposed":
        tensor = tensor.t().contiguous().t()
    elif layout == "strided":
        tensor = tensor.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    elif layout == "expanded":
        tensor = tensor[:1].expand(20, 7)
    elif layout == "row":
        tensor = tensor[:, :1].expand(20, 7)
    for block in blocks(20, 7):
        read = block.read(tensor)
        assert torch.equal(read, tensor[block.rows, block.columns].float().flatten())
        assert read.dtype == torch.float32


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_surely_finite(wrong):
    values = torch.randn(1000)
    assert surely_finite(values)
    values[617] = wrong
    assert not surely_finite(values)
    values[3] = -wrong
    assert not surely_finite(values)
    assert surely_finite(values[:0])


def elsewhere(function):
    """What a function returns on another thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def memory():
    reserve()
    return buffer(LOSS, 10)


def test_each_thread_keeps_its_own_memory():
    assert memory().data_ptr() == memory().data_ptr()
    assert elsewhere(memory).data_ptr() != memory().data_ptr()


def test_memory_first_used_in_inference_mode_is_usable_outside():
    def first_call():
        with torch.inference_mode():
            memory().fill_(1.0)
        return memory().mul_(2.0).sum()

    assert elsewhere(first_call) == 20


def test_memory_grows_with_the_blocks(monkeypatch):
    monkeypatch.setattr(module, "_local", threading.local())
    most = reserve()
    monkeypatch.setattr(module, "block_entries", lambda: most + 100)
    assert reserve() == most + 100
    assert buffer(LOSS, most + 101).fill_(1.0).sum() == most + 101


def test_buffers_do_not_overlap_and_have_the_size_that_was_asked_for():
    reserve()
    for entries in (7, 8, 9, 1, 7):
        views = [buffer(number, entries).fill_(number) for number in range(7)]
        assert [view.tolist() for view in views] == [[number] * entries for number in range(7)]
        for dtype in (torch.int8, torch.int16, torch.int32):
            view = buffer(LOSS, entries, dtype)
            assert (view.dtype, len(view)) == (dtype, entries)
            assert view.data_ptr() == views[LOSS].data_ptr()


def test_views_of_many_sizes_are_not_all_kept():
    reserve()
    for entries in range(1, 2 * MAX_VIEWS):
        assert len(buffer(LOSS, entries)) == entries
        assert len(module._local.views) <= MAX_VIEWS
