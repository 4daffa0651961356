import numpy as np
import pytest
import torch
from PIL import Image

from ghm_triton.detection.data import Sample, open_dataset
from ghm_triton.detection.evaluate import (
    Detections,
    detect,
    in_image_pixels,
    match,
    mean_average_precision,
    observe,
    torch_predictor,
)
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import SCORE_BINS, ClassStatistics

NAMES = ("cat", "dog")


def sample(boxes, labels, ignore=None, number=0):
    labels = torch.tensor(labels, dtype=torch.int64)
    hidden = torch.zeros(len(labels), dtype=torch.bool) if ignore is None else torch.tensor(ignore)
    image = Image.new("RGB", (100, 80))
    return Sample(image, torch.tensor(boxes).view(-1, 4), labels, hidden, number, f"{number}.png")


def found(boxes, scores, labels):
    return Detections(
        torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(labels).long()
    )


A, B = [10.0, 10, 30, 30], [50.0, 20, 90, 60]


def test_perfect_detections_score_one():
    truth = sample([A, B], [0, 1])
    result = mean_average_precision(NAMES, [(truth, found([A, B], [0.9, 0.8], [0, 1]))])
    assert (result.ap, result.ap50, result.ap75) == pytest.approx((1, 1, 1))


def test_a_missed_class_halves_the_mean():
    truth = sample([A, B], [0, 1])
    result = mean_average_precision(NAMES, [(truth, found([A], [0.9], [0]))])
    assert result.per_class == {"cat": (1.0, 1.0), "dog": (0.0, 0.0)}
    assert result.ap50 == 0.5


def test_average_precision_by_hand():
    """Right, wrong, right over two objects: precision 1 up to recall 0.5, then 2/3."""
    truth = [sample([A], [0], number=0), sample([A], [0], number=1)]
    first = found([A, B], [0.9, 0.8], [0, 0])
    second = found([A], [0.7], [0])
    result = mean_average_precision(("cat",), list(zip(truth, [first, second], strict=True)))
    expected = (51 * 1 + 50 * 2 / 3) / 101  # COCO's 101 recall points
    assert result.ap50 == pytest.approx(expected, abs=1e-9)


def test_nothing_found_is_zero_and_a_class_without_objects_is_nan():
    result = mean_average_precision(NAMES, [(sample([A], [0]), found([], [], []))])
    assert result.per_class["cat"] == (0.0, 0.0)
    assert result.per_class["dog"][0] != result.per_class["dog"][0]


def test_a_detection_on_an_ignored_object_counts_neither_way():
    truth = sample([A, B], [0, 0], ignore=[False, True])
    detections = found([A, B], [0.8, 0.9], [0, 0])
    assert mean_average_precision(("cat",), [(truth, detections)]).ap50 == pytest.approx(1.0)
    statistics = observe(ClassStatistics(("cat",), anchors=1), [(truth, detections)])
    assert int(statistics.positive_scores.sum()) == 1
    assert int(statistics.negative_scores.sum()) == 0
    assert statistics.ground_truths.tolist() == [1]


def test_each_object_is_matched_once_best_score_first_and_only_by_its_class():
    detections = found([A, A, A, B], [0.6, 0.9, 0.95, 0.5], [0, 0, 1, 1])
    matched = match(detections, torch.tensor([A, B]), torch.tensor([0, 1]))
    assert matched.tolist() == [False, True, False, True]


def test_a_match_needs_half_the_union():
    just = [10.0, 10, 30, 20]  # half of A
    less = [10.0, 10, 30, 19.9]
    truth, label = torch.tensor([A]), torch.tensor([0])
    assert match(found([just], [0.9], [0]), truth, label).tolist() == [True]
    assert match(found([less], [0.9], [0]), truth, label).tolist() == [False]


def test_observed_scores_land_in_their_bins():
    truth = sample([A], [1])
    detections = found([A, B], [0.731, 0.2], [1, 1])
    statistics = observe(ClassStatistics(NAMES, anchors=1), [(truth, detections)])
    assert np.argwhere(statistics.positive_scores).tolist() == [[1, int(0.731 * SCORE_BINS)]]
    assert np.argwhere(statistics.negative_scores).tolist() == [[1, int(0.2 * SCORE_BINS)]]


def test_observing_twice_counts_once():
    results = [(sample([A], [1]), found([A], [0.7], [1]))]
    statistics = observe(ClassStatistics(NAMES, anchors=1), results)
    once = statistics.to_dict()
    assert observe(statistics, results).to_dict() == once


def test_boxes_come_back_to_the_image_and_stay_inside_it():
    boxes = torch.tensor([[0.0, 0.0, 50.0, 40.0], [-3.0, 10.0, 70.0, 90.0]])
    back = in_image_pixels(boxes, (0.5, 0.5), (100, 80))
    assert back.tolist() == [[0, 0, 100, 80], [0, 20, 100, 80]]


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_every_image_is_detected_in_order_whatever_the_batch(trained, batch_size):
    saved = Checkpoint.load(trained)
    dataset = open_dataset(saved.training["data"], "test")
    predict = torch_predictor(DeployedDetector(saved.detector()), torch.full((10,), 0.005))
    results = list(detect(predict, saved.config, dataset, batch_size))
    single = list(detect(predict, saved.config, dataset, 1))
    assert [s.image_id for s, _ in results] == list(range(len(dataset)))
    assert sum(len(d.scores) for _, d in results) > 0
    for (_, ours), (_, alone) in zip(results, single, strict=True):
        # Convolutions of another batch size may sum in another order: a few float32 roundings.
        assert torch.allclose(ours.scores, alone.scores, atol=1e-5)
