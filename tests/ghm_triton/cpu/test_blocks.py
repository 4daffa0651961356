"""Cutting a batch into blocks, and reading them."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from ghm_triton.cpu.blocks import (
    ENTRIES,
    Selection,
    Source,
    applies_to,
    block_entries,
    finite,
    scalar,
    spans,
)
from ghm_triton.losses.inputs import classification_inputs, regression_inputs


@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 1), (45, 1), (46, 1), (20, 7), (3, 44), (3, 45), (3, 46), (2, 200)]
)
@pytest.mark.usefixtures("small_blocks")
def test_every_entry_is_in_one_block_in_the_order_of_memory(shape):
    entries = torch.arange(shape[0] * shape[1]).view(shape)
    seen = []
    for span in spans(*shape):
        block = entries[span.rows, span.columns]
        assert block.shape == span.shape
        assert 0 < span.entries <= 45
        assert block.is_contiguous()
        assert torch.equal(block.reshape(-1), entries.view(-1)[span.flat])
        seen += block.reshape(-1).tolist()
    assert seen == list(range(entries.numel()))


def test_few_large_blocks_that_grow_with_a_second_thread():
    """A block too small would pay more for calls than for arithmetic."""
    threads = torch.get_num_threads()
    try:
        for count, factor in ((1, 1), (2, 2), (3, 2)):
            torch.set_num_threads(count)
            assert block_entries() == factor * ENTRIES
            rows = block_entries() // 80
            assert len(list(spans(12500, 80))) == -(-12500 // rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bool])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded", "row"])
@pytest.mark.usefixtures("small_blocks")
def test_a_source_of_any_strides_and_dtype(generator, dtype, layout):
    tensor = (torch.randn(20, 7, generator=generator) * 4).to(dtype)
    if layout == "transposed":
        tensor = tensor.t().contiguous().t()
    elif layout == "strided":
        tensor = tensor.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    elif layout == "expanded":
        tensor = tensor[:1].expand(20, 7)
    elif layout == "row":
        tensor = tensor[:, :1].expand(20, 7)
    source = Source(tensor)
    for span in spans(20, 7):
        expected = tensor[span.rows, span.columns].float().flatten()
        assert torch.equal(source.read(span), expected)
        assert source.read(span).dtype == torch.float32
    rows, columns = np.array([3, 19, 0]), np.array([6, 0, 6])
    assert torch.equal(source.pick(rows, columns), tensor[rows, columns].float())


@pytest.mark.parametrize("shape", [(20, 7), (20, 1), (1, 7), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_what_takes_part(generator, shape, dtype, ignores):
    weight = torch.randint(-1, 3, shape, generator=generator).to(dtype).expand(20, 7)
    index = torch.randint(-1, 8, (20,), generator=generator) if ignores else None
    selection = Selection(weight, index)
    expected = weight > 0 if index is None else (weight > 0) & (index >= 0)[:, None]
    for span in spans(20, 7):
        keep = selection.kept(span)
        assert keep.dtype == torch.float32
        assert torch.equal(keep.expand(span.shape) == 1, expected[span.rows, span.columns])
        assert torch.equal(keep.expand(span.shape) == 0, ~expected[span.rows, span.columns])
        for weighted in (False, True):
            values = torch.full((span.entries,), 3.0)
            selection.apply(values, span, keep, weighted=weighted)
            factor = weight.float() if weighted else 1.0
            product = torch.where(expected, 3.0 * factor, 0.0)[span.rows, span.columns]
            assert torch.equal(values, product.flatten())


def test_a_weight_of_each_row_is_looked_at_once_a_row():
    weight = torch.tensor([[1.0], [0.0]]).expand(2, 5)
    (span,) = spans(2, 5)
    assert Selection(weight).kept(span).shape == (2, 1)
    assert Selection(None).kept(span) is None


def test_a_nan_weight_takes_no_part_and_reaches_nothing():
    (span,) = spans(1, 3)
    selection = Selection(torch.tensor([[torch.nan, 2.0, torch.inf]]))
    keep = selection.kept(span)
    assert keep.tolist() == [[0.0, 1.0, 1.0]]
    values = torch.ones(3)
    selection.apply(values, span, keep, weighted=True)
    assert values.tolist() == [0.0, 2.0, torch.inf]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_finite(wrong):
    values = torch.randn(1000)
    assert finite(values)
    values[617] = wrong
    assert not finite(values)
    values[3] = -wrong
    assert not finite(values)
    assert finite(values[:0])


def test_a_scalar_is_made_once_and_usable_everywhere():
    with torch.inference_mode():
        number = scalar(0.123)
    assert scalar(0.123) is number
    assert not number.is_inference()
    assert (number.dtype, number.shape) == (torch.float32, ())


class TestWhereItApplies:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_to_what_cpus_train_with(self, dtype):
        logits = torch.nn.Parameter(torch.zeros(4, 3, dtype=dtype))
        weight = torch.ones(4, 1, dtype=torch.float64)
        for target in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.float64)):
            assert applies_to(classification_inputs(logits, target, weight, None))
        assert applies_to(regression_inputs(logits, torch.zeros(4, 3), weight, None))

    def test_not_to_double_precision_nor_to_other_devices(self):
        double, meta = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, device="meta")
        assert not applies_to(classification_inputs(double, double, None, None))
        assert not applies_to(regression_inputs(double, double, None, None))
        assert not applies_to(classification_inputs(meta, meta, None, None))

    def test_not_to_stand_ins(self):
        class Other(torch.Tensor):
            pass

        zeros = torch.zeros(4, 3)
        assert not applies_to(classification_inputs(zeros.as_subclass(Other), zeros, None, False))
        assert not applies_to(classification_inputs(zeros, zeros, zeros.as_subclass(Other), False))

    def test_not_within_transforms(self):
        answers = []

        def look(x):
            answers.append(applies_to(regression_inputs(x, torch.zeros(4, 3), None, False)))
            return x.sum()

        torch.func.grad(look)(torch.zeros(4, 3))
        torch.func.vmap(look)(torch.zeros(2, 4, 3))
        with forward_ad.dual_level():
            look(forward_ad.make_dual(torch.zeros(4, 3), torch.ones(4, 3)))
        assert answers == [False, False, False]

    def test_not_while_compiling(self):
        def look(x):
            return x + applies_to(regression_inputs(x, x, None, False))

        x = torch.zeros(4, 3)
        assert torch.compile(look, fullgraph=True, backend="eager")(x).sum() == 0
        assert look(x).sum() == 12
