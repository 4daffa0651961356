"""What every detector promises, whatever it is."""

import dataclasses
import json

import pytest
import torch

from ghm_triton.detection.models.config import ARCHITECTURES, DetectorConfig
from ghm_triton.detection.models.registry import DETECTORS, build_detector
from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.hooks import METRICS
from ghm_triton.detection.training.loop import train

# The losses that each is trained with here, and those that no other of them is.
KINDS = {
    "retinanet": ({}, {}),
    "fcos": ({}, {"reg_loss": "giou"}),
    "faster-rcnn": ({"region_samples": 32}, {}),
    "softmax": (
        {"architecture": "faster-rcnn", "classifier": "softmax", "region_samples": 32},
        {"cls_loss": "ce", "reg_loss": "sl1"},
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(kind: str, config: DetectorConfig) -> DetectorConfig:
    return dataclasses.replace(config, **{"architecture": kind, **KINDS[kind][0]})


@pytest.fixture
def options(kind: str, options: TrainOptions) -> TrainOptions:
    return dataclasses.replace(options, **KINDS[kind][1])


def test_every_architecture_has_its_detector():
    assert tuple(DETECTORS) == ARCHITECTURES


def test_predictions_have_their_shapes_and_ranks_follow_scores(config):
    detector = build_detector(config).eval()
    with torch.inference_mode():
        boxes, scores, ranks = detector.predict(torch.randn(2, 3, 96, 96))
    places = scores.shape[1]
    assert scores.shape == ranks.shape == (2, places, 10)
    assert boxes.shape[:2] == (2, places)
    assert boxes.shape[2:] in [(1, 4), (10, 4)]
    assert bool(((boxes >= 0) & (boxes <= 96)).all())
    order = ranks.flatten().argsort(descending=True)
    # A score rounds to 1e-7; the rank is finer, never contrary.
    assert bool((scores.flatten()[order].diff() <= 1e-6).all())


def test_images_of_another_size_are_refused(config):
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(96, 96\)"):
        build_detector(config).predict(torch.zeros(1, 3, 64, 64))


NEW = pytest.mark.parametrize("kind", ["fcos", "faster-rcnn", "softmax"], indirect=True)


@NEW  # RetinaNet has its own in test_train.py
def test_a_few_steps_lower_the_loss_and_count_what_was_learnt(kind, config, options, tmp_path):
    options = dataclasses.replace(options, steps=30, batch_size=8)
    train(options, config, tmp_path, device="cpu", progress=False)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    first, last = lines[0], lines[-5:]
    # A guided classification is as large as the boxes' loss.
    name = "unguided_classification" if "unguided_classification" in first else "classification"
    assert sum(x[name] for x in last) / 5 < 0.7 * first[name]
    if kind == "fcos":  # whose boxes start as points
        assert sum(x["bbox_regression"] for x in last) / 5 < 0.7 * first["bbox_regression"]
    statistics = Checkpoint.load(tmp_path / CHECKPOINT).statistics
    assert statistics.positives.sum() > 0
    if config.architecture == "faster-rcnn":
        # Every image gives its share: small images have enough regions.
        assert statistics.anchors == 30 * 8 * 32
        assert statistics.positives.sum() <= 30 * 8 * 8
    assert int(statistics.ground_truths.sum()) > 0


@NEW
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(config, options, tmp_path):
    """Faster R-CNN draws regions by chance: the draws, too, are a function of seed and step."""
    options = dataclasses.replace(options, steps=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    quietly = {"device": "cpu", "progress": False}
    train(options, config, whole, **quietly)
    train(options, config, broken, stop_after=3, **quietly)
    train(options, config, broken, resume=True, **quietly)
    assert (whole / METRICS).read_text() == (broken / METRICS).read_text()
    saved = [Checkpoint.load(out / CHECKPOINT) for out in (whole, broken)]
    assert saved[0].statistics.to_dict() == saved[1].statistics.to_dict()


def test_mixed_precision_trains(config, options, tmp_path):
    options = dataclasses.replace(options, amp="bf16", steps=2)
    train(options, config, tmp_path, device="cpu", progress=False)
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2
    assert not any(
        "loss" in key for key in Checkpoint.load(tmp_path / CHECKPOINT).detector().state_dict()
    )
