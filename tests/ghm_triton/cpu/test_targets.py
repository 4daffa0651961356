"""Reading blocks of logits and targets: the terms of every entry against float64."""

import numpy as np
import pytest
import torch

from ghm_triton.cpu.blocks import spans
from ghm_triton.cpu.targets import reader
from ghm_triton.reference.interface import ClassificationInputs

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
        buffer, other, out = torch.full((3, span.entries), torch.nan)
        assert blocks.read(span)
        positives += blocks.positives(span)
        slope = blocks.slope(out=buffer)
        norm = blocks.norm(slope, out=other)
        paper.assert_close(norm, np.abs(slopes[here]).ravel(), lost[here].ravel())
        turned = slope.clone()
        blocks.flip(turned)
        paper.assert_close(turned, slopes[here].ravel(), lost[here].ravel())
        found = blocks.losses(slope, out=out)
        assert found is out
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
        slope, out = torch.empty(2, 12)
        assert blocks.read(span)
        found = blocks.losses(blocks.slope(out=slope), out=out)
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
            bad = span.rows.start <= 11 < span.rows.stop
            assert blocks.read(span) == (sound or not bad)
            assert blocks.read(span, counted=True) == (sound or not bad or weight is None)
            if sound:
                slope, out = torch.empty(2, span.entries)
                assert np.isfinite(blocks.positives(span))
                assert blocks.slope(out=slope).abs().max() <= 1
                assert blocks.losses(slope, out=out).isfinite().all()


@pytest.mark.parametrize("target", [-1e-7, 1.0000001, torch.nan, -torch.nan, torch.inf])
def test_a_target_just_out_of_range_is_not_sound(target):
    inputs = classification(torch.zeros(1, 1), torch.tensor([[target]]))
    (span,) = spans(1, 1)
    assert not reader(inputs).read(span)


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


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_an_ignored_logit_of_the_foreground_may_be_anything(poison):
    logits = torch.tensor([[poison, 1.0], [2.0, poison]])
    weight = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    blocks = reader(classification(logits, torch.tensor([0, 1]), weight))
    (span,) = spans(2, 2)
    slope, out = torch.empty(2, 4)
    assert blocks.read(span)
    assert blocks.positives(span) == 0.0
    assert blocks.slope(out=slope).isfinite().all()
    assert blocks.losses(slope, out=out).isfinite().all()


@pytest.mark.parametrize(("largest", "sound"), [(6, True), (7, True), (8, False)])
@pytest.mark.parametrize("smallest", [0, -1, -(2**62)])
def test_class_indices_in_range(largest, sound, smallest):
    index = torch.tensor([smallest, 3, largest])
    blocks = reader(classification(torch.zeros(3, 7), index))
    (span,) = spans(3, 7)
    assert blocks.read(span) == sound
    assert (blocks.keep is None) or smallest < 0 or not sound


def test_neither_kind_of_target():
    inputs = classification(torch.zeros(1, 1), torch.zeros(1, 1))
    object.__setattr__(inputs, "target", None)
    with pytest.raises(TypeError, match="neither class indices nor dense targets"):
        reader(inputs)
