import dataclasses

import pytest
import torch
from PIL import Image

from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import TrainingView
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.plots import (
    gradient_norms,
    gradient_norms_by_target,
    plot_gradient_norms,
    plot_thresholds,
)
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassThresholds


def test_gradient_norms_are_those_of_the_entries_that_count(trained):
    saved = Checkpoint.load(trained)
    detector = saved.detector()
    dataset = open_dataset(saved.training["data"], "train")
    norms = gradient_norms(detector, dataset, images=3)
    boxes = [{"boxes": dataset[i].boxes, "labels": dataset[i].labels} for i in range(3)]
    counted = int((detector.labels(boxes) >= 0).sum()) * 10
    assert norms.shape == (counted,)
    assert float(norms.min()) >= 0
    assert float(norms.max()) <= 1
    # Nearly all entries are background, which an untrained detector with prior 0.01 gets right.
    assert float(norms.median()) < 0.2


@pytest.mark.parametrize("architecture", ["retinanet", "fcos"])
def test_gradient_norms_of_positives_and_negatives(architecture, config):
    """By the definition, entry by entry, for every dense detector."""
    torch.manual_seed(0)
    detector = build_detector(dataclasses.replace(config, architecture=architecture))
    dataset = open_dataset("digits:images=10,size=96", "train")  # more than one batch of 8
    positives, negatives = gradient_norms_by_target(detector, dataset, images=9)
    expected = ([], [])
    for i in range(9):
        image, target = TrainingView(dataset, detector.config, (0.0, 0.0))[i, 0]
        with torch.no_grad():
            scores = torch.sigmoid(detector.outputs(image[None])["cls_logits"])[0]
        labels = detector.labels([target])[0]
        for label, row in zip(labels.tolist(), scores.tolist(), strict=True):
            for j, score in enumerate(row if label >= 0 else []):
                expected[j != label].append(abs(score - (j == label)))
    for norms, wanted in zip((positives, negatives), expected, strict=True):
        assert len(wanted) > 0
        # Images in a batch or alone: sums of a convolution in another order, in float32.
        assert torch.allclose(norms.sort()[0], torch.tensor(wanted).sort()[0], rtol=0, atol=1e-5)


def test_gradient_norms_are_refused_of_a_detector_without_dense_sigmoids(config):
    detector = build_detector(dataclasses.replace(config, architecture="faster-rcnn"))
    dataset = open_dataset("digits:images=1,size=96", "train")
    with pytest.raises(ValueError, match="not of faster-rcnn"):
        gradient_norms(detector, dataset)


def test_plots_are_pictures(trained, tmp_path):
    statistics = Checkpoint.load(trained).statistics
    thresholds = ClassThresholds.from_statistics(statistics, "fixed=0.3")
    plot_thresholds(statistics, thresholds, tmp_path / "deep" / "thresholds.png")
    plot_gradient_norms(torch.rand(500) ** 3, 0.25, tmp_path / "norms.png")
    for name in ("deep/thresholds.png", "norms.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
