import torch
from PIL import Image

from ghm_triton.detection.checkpoint import Checkpoint
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.plots import (
    gradient_norms,
    plot_gradient_norms,
    plot_thresholds,
)
from ghm_triton.thresholds import ClassThresholds


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


def test_plots_are_pictures(trained, tmp_path):
    statistics = Checkpoint.load(trained).statistics
    thresholds = ClassThresholds.from_statistics(statistics, "fixed=0.3")
    plot_thresholds(statistics, thresholds, tmp_path / "deep" / "thresholds.png")
    plot_gradient_norms(torch.rand(500) ** 3, 0.25, tmp_path / "norms.png")
    for name in ("deep/thresholds.png", "norms.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
