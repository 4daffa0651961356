"""Reading blocks of logits and targets: the terms of every entry against float64."""

import numpy as np
import pytest
import torch

from ghm_triton._inputs import ClassificationInputs
from ghm_triton.reference.blockwise.blocks import spans
from ghm_triton.reference.blockwise.targets import reader

SHAPES = [(20, 7), (50, 1), (3, 100)]
pytestmark = pytest.mark.usefixtures("small_blocks")


def classification(logits, target, weight=None):
    """Inputs in the very rows and columns given, and without a look at their values."""
    index, dense = (None, target) if target.shape == logits.shape else (target, None)
    weight = None if weight is None else weight.expand(logits.shape)
    return ClassificationInputs(logits, index, dense, weight, logits.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_terms(paper, generator, shape, kind):
    logits = torch.randn(shape, generator=generator) * 4
    target = torch.rand(shape, generator=generator)
    if kind == "index":
        target = torch.randint(-1, shape[1] + 1, shape[:1], generator=generator)
    weight = torch.randint(0, 2, shape, generator=generator).float()
    blocks = reader(classification(logits, target, weight))

    dense = paper.as_numpy(target)
    valid = weight.numpy() > 0
    if kind == "index":
        valid = valid & (dense >= 0)[:, None]
        dense = paper.one_hot(dense, shape[1])
    losses, slopes = paper.bce_parts(paper.as_numpy(logits), dense)
    lost = np.broadcast_to(paper.cancellation(logits, target), shape)
    positives = 0.0
    for span in spans(*shape):
        here = span.rows, span.columns
        values, slope, spare = torch.full((3, span.entries), torch.nan)
        assert blocks.read(span, values)
        positives += blocks.positives(span)
        slope = blocks.slope(values, slope)
        paper.assert_close(slope.abs(), np.abs(slopes[here]).ravel(), lost[here].ravel())
        if blocks.flips is not None:
            places, signs = blocks.flips
            turned = slope.clone()
            turned[places] *= signs
            paper.assert_close(turned, slopes[here].ravel())
        found = blocks.losses(values, slope, spare)
        paper.assert_close(found, losses[here].ravel(), lost[here].ravel())
    assert positives == pytest.approx(float((dense * valid).sum()), rel=1e-6)  # eps of float32


@pytest.mark.parametrize("kind", ["index", "soft"])
def test_small_and_large_losses_keep_their_digits(paper, kind):
    """As plain cross entropy does: 1e-9 is not 0, and the loss at `g = 1` is not infinite."""
    logits = torch.tensor([-20.0, 20.0, -69.0, 69.0, -80.5, 80.5, 1e4, -1e4, 30.0, 8.5, -8.5, 0.0])
    hard = torch.tensor([0.0, 1.0] * 6)
    for target in (hard, 1 - hard):
        given = target[:, None] if kind == "soft" else 1 - target.long()
        blocks = reader(classification(logits[:, None], given))
        (span,) = spans(12, 1)
        values, slope, spare = torch.empty(3, 12)
        blocks.read(span, values)
        found = blocks.losses(values, blocks.slope(values, slope), spare)
        truth, _ = paper.bce_parts(paper.as_numpy(logits), paper.as_numpy(target))
        paper.assert_close(found, truth)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["logits", "target"])
def test_what_is_not_sound_is_found_unless_it_is_ignored(generator, poison, where):
    logits = torch.randn(20, 7, generator=generator)
    target = torch.rand(20, 7, generator=generator)
    (logits if where == "logits" else target)[11, 3] = poison
    for weight, sound in ((torch.ones(20, 7), False), (torch.ones(20, 7), True), (None, False)):
        if sound:
            weight[11, 3] = 0
        blocks = reader(classification(logits, target, weight))
        for span in spans(20, 7):
            values = torch.empty(span.entries)
            bad = span.rows.start <= 11 < span.rows.stop
            assert blocks.read(span, values) == (sound or not bad)
            if sound:
                assert values.isfinite().all()
                assert np.isfinite(blocks.positives(span))
                assert blocks.slope(values, values).abs().max() <= 1


@pytest.mark.parametrize("target", [-1e-7, 1.0000001])
def test_a_target_just_out_of_range_is_not_sound(target):
    inputs = classification(torch.zeros(1, 1), torch.tensor([[target]]))
    (span,) = spans(1, 1)
    assert not reader(inputs).read(span, torch.empty(1))


@pytest.mark.parametrize("classes", [3, 100])
def test_a_block_is_inputs_of_its_own(generator, classes):
    index = torch.tensor([0, 1, 2, classes - 1, classes, classes + 1, -1, 45, 44])
    index = index[index <= classes + 1]
    logits = torch.randn(len(index), classes, generator=generator)
    blocks = reader(classification(logits, index))
    for span in spans(*logits.shape):
        part = blocks.cut(span)
        assert torch.equal(part.logits, logits[span.rows, span.columns])
        width = part.logits.shape[1]
        whole = torch.nn.functional.one_hot(index.clamp(0), classes + 46)[:, :classes]
        whole = (whole * (index >= 0)[:, None])[span.rows, span.columns]
        own = torch.nn.functional.one_hot(part.index.clamp(0), classes + 46)[:, :width]
        assert torch.equal(own * (part.index >= 0)[:, None], whole)
        assert torch.equal(part.index > width, index[span.rows] > classes)
        assert torch.equal(part.index < 0, index[span.rows] < 0)


def test_neither_kind_of_target():
    inputs = classification(torch.zeros(1, 1), torch.zeros(1, 1))
    object.__setattr__(inputs, "target", None)
    with pytest.raises(TypeError, match="neither class indices nor dense targets"):
        reader(inputs)
