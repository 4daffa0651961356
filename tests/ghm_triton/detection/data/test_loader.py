import pytest
import torch

from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import StepSampler, TrainingView, collate


def test_batches_do_not_depend_on_where_training_started():
    whole = list(StepSampler(10, 4, seed=3, start=0, stop=8))
    assert list(StepSampler(10, 4, seed=3, start=5, stop=8)) == whole[5:]


def test_every_sample_comes_once_an_epoch():
    draws = [draw for batch in StepSampler(12, 4, seed=0, start=0, stop=6) for draw in batch]
    first, second = ([i for i, _ in draws[k : k + 12]] for k in (0, 12))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert len({seed for _, seed in draws}) == len(draws)


def test_ranks_share_a_batch_without_overlap():
    whole = list(StepSampler(20, 6, seed=1, start=0, stop=3))
    ranks = [list(StepSampler(20, 6, 1, 0, 3, rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert sorted(first + second) == sorted(batch)


@pytest.mark.parametrize(
    ("length", "batch", "world", "message"),
    [(0, 4, 1, "empty"), (9, 1, 2, "batch_size 1 is less than the 2 processes")],
)
def test_what_cannot_be_split_is_refused(length, batch, world, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(length, batch, 0, 0, 1, 0, world)


def test_a_view_letterboxes_and_mirrors_boxes_with_the_image(config):
    dataset = open_dataset("digits:images=4,size=128", "train")
    plain = TrainingView(dataset, config, (0.0, 0.0))[(0, 7)]
    mirrored = TrainingView(dataset, config, (1.0, 1.0))[(0, 7)]
    assert torch.equal(mirrored[0].flip(-1).flip(-2), plain[0])
    width = height = 96
    x1, y1, x2, y2 = plain[1]["boxes"].unbind(-1)
    expected = torch.stack([width - x2, height - y2, width - x1, height - y1], -1)
    assert torch.equal(mirrored[1]["boxes"], expected)
    # 128 to 96 pixels: boxes shrink with the image.
    assert torch.allclose(plain[1]["boxes"], dataset[0].boxes * 0.75)
    images, targets = collate([plain, mirrored])
    assert images.shape == (2, 3, 96, 96)
    assert len(targets) == 2
