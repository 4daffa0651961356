import pytest
import torch

from ghm_triton.imbalance.ohem import OHEM, cross_entropy_of_samples, hard_examples


def by_sorting(losses, keep, valid):
    """The definition, image by image."""
    kept = torch.zeros_like(valid)
    for row in range(len(losses)):
        own = [i for i in range(losses.shape[1]) if bool(valid[row, i])]
        own.sort(key=lambda i: -float(losses[row, i]))
        kept[row, own[:keep]] = True
    return kept


@pytest.mark.parametrize("keep", [1, 5, 15, 40, 100])
def test_the_largest_losses_of_every_image_are_kept(keep):
    generator = torch.Generator().manual_seed(keep)
    losses = torch.rand(4, 40, generator=generator) - 0.5
    valid = torch.rand(4, 40, generator=generator) < 0.5
    valid[2] = False  # nothing to keep
    assert torch.equal(hard_examples(losses, keep, valid), by_sorting(losses, keep, valid))
    everything = torch.ones_like(valid)
    assert torch.equal(hard_examples(losses, keep), by_sorting(losses, keep, everything))


def test_there_is_no_ratio_of_foreground_to_background():
    foreground = torch.tensor([[True, True, True, False, False, False]])
    for losses in (foreground.float(), (~foreground).float()):
        kept = hard_examples(losses, 3)
        assert torch.equal(kept, losses.bool())


def test_no_gradient_flows_through_the_choice():
    losses = torch.rand(1, 9, requires_grad=True)
    kept = hard_examples(losses, 4)
    assert not kept.requires_grad
    losses[kept].sum().backward()
    assert torch.equal(losses.grad, kept.float())


def test_a_loss_that_is_nan_is_not_hidden():
    losses = torch.tensor([[5.0, float("nan"), 7.0]])
    assert hard_examples(losses, 1).tolist() == [[False, True, False]]


def test_what_a_harder_sample_overlaps_is_left_out():
    # The second overlaps the first by 0.8, the third by 0.6 of the union; the last is elsewhere.
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 6], [50, 50, 60, 60]]])
    losses = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert hard_examples(losses, 3, boxes=boxes).tolist() == [[True, False, True, True]]
    strict = hard_examples(losses, 3, boxes=boxes, iou_threshold=0.5)
    assert strict.tolist() == [[True, False, False, True]]
    # One that may not be kept suppresses nothing.
    valid = torch.tensor([[False, True, True, True]])
    kept = hard_examples(losses, 3, valid, boxes=boxes, iou_threshold=0.7)
    assert kept.tolist() == [[False, True, False, True]]


def test_images_do_not_suppress_each_other():
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[0, 0, 10, 10]]])
    assert hard_examples(torch.tensor([[2.0], [1.0]]), 1, boxes=boxes).all()


def test_the_module_adds_both_losses():
    classification = torch.tensor([[3.0, 0.0, 2.0, 1.0]])
    localization = torch.tensor([[0.0, 4.0, 0.0, 1.5]])
    assert OHEM(2)(classification).tolist() == [[True, False, True, False]]
    assert OHEM(2)(classification, localization).tolist() == [[True, True, False, False]]
    valid = torch.tensor([[True, False, True, True]])
    assert OHEM(2)(classification, localization, valid).tolist() == [[True, False, False, True]]


def test_the_module_leaves_out_what_overlaps():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]])
    losses = torch.tensor([[3.0, 2.0, 1.0]])
    assert OHEM(2, iou_threshold=0.7)(losses, boxes=boxes).tolist() == [[True, False, True]]
    with pytest.raises(ValueError, match=r"iou_threshold=0.7 needs boxes"):
        OHEM(2, iou_threshold=0.7)(losses)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_how_many_to_keep_is_a_positive_integer(keep):
    with pytest.raises(ValueError, match=f"keep must be an integer of at least 1, got {keep}"):
        OHEM(keep)


def test_shapes_and_ranges_are_checked():
    losses = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"valid must be \[2, 3\].*\[3\]"):
        hard_examples(losses, 1, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boxes must be \[2, 3, 4\], got \[3, 4\]"):
        hard_examples(losses, 1, boxes=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"iou_threshold must lie in \[0, 1\], got 7"):
        hard_examples(losses, 1, boxes=torch.zeros(2, 3, 4), iou_threshold=7)
    with pytest.raises(ValueError, match="localization must be"):
        OHEM(1)(losses, torch.zeros(2, 4))


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
