from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from export.card import CARD_KEY, DetectorCard, Preprocessing, TrainingCard
from export.detector import export_detector
from export.quantize.tradeoff import detect_all
from ghm_triton.detection.data import DetectionDataset, Sample
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import Detector, build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.evidence import SCORE_BINS, ClassStatistics, ClassThreshold, as_float32

CLASSES = ("red", "green", "blue")


def spread_detector(config: DetectorConfig, seed: int = 0) -> Detector:
    """Random weights, scaled until scores fill (0, 1) and boxes overlap: NMS has work to do."""
    torch.manual_seed(seed)
    detector = build_detector(config).eval()
    for layer in detector.modules():
        if isinstance(layer, nn.BatchNorm2d):  # statistics that no batch of ours would have
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    with torch.no_grad():
        logits, deltas = detector.raw(torch.randn(4, 3, *config.image_size))
        classes, boxes = detector.head.classification_head, detector.head.regression_head
        classes.cls_logits.weight *= 2.0 / logits.std()
        nn.init.constant_(classes.cls_logits.bias, -2.5)
        boxes.bbox_reg.weight *= 0.3 / deltas.std()
        nn.init.uniform_(boxes.bbox_reg.bias, -0.1, 0.1)
    return detector


def counted_statistics(classes: tuple[str, ...], seed: int = 0) -> ClassStatistics:
    """Held-out scores of detectors that are better for each later class."""
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(20, 200, (len(classes),), generator=generator)
    statistics = ClassStatistics(classes, 5000, positives)
    for label in range(len(classes)):
        scores = torch.rand(400, generator=generator)
        matched = scores**2 > torch.rand(400, generator=generator) * 0.6 / (label + 1)
        labels = torch.full((400,), label)
        statistics.observe_detections(scores, labels, matched, labels[: int(matched.sum()) + 20])
    assert statistics.positive_scores.shape == (len(classes), SCORE_BINS)
    return statistics


def save_checkpoint(path: Path, config: DetectorConfig, seed: int = 0) -> Path:
    options = TrainOptions(data="voc:/somewhere/private/cells", seed=seed).settled("retinanet")
    training = options.to_dict() | {"step": 1000, "versions": {"torch": "2.15.0"}}
    statistics = counted_statistics(config.class_names)
    model = spread_detector(config, seed).state_dict()
    Checkpoint(config, model, statistics, training).save(path)
    return path


@pytest.fixture(scope="session")
def config():
    return DetectorConfig(
        CLASSES,
        (64, 96),
        channels=16,
        mean=(0.4, 0.5, 0.6),
        iou_threshold=0.3,
        candidates=400,
        max_detections=150,
    )


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory, config):
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint.pt", config)


@pytest.fixture(scope="session")
def checkpoint(checkpoint_path):
    return Checkpoint.load(checkpoint_path)


@pytest.fixture(scope="session")
def detector_path(tmp_path_factory, checkpoint_path):
    path = tmp_path_factory.mktemp("export") / "detector.onnx"
    export_detector(checkpoint_path, path)
    return path


@pytest.fixture(scope="session")
def samples():
    """Coloured clouds of many shapes; no ground truth, which no export needs."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(11):
        clouds = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        size = (int(generator.integers(40, 200)), int(generator.integers(40, 200)))
        image = Image.fromarray(clouds).resize(size, Image.Resampling.BICUBIC)
        none = torch.zeros(0)
        boxes, ignore = none.reshape(0, 4), none.bool()
        made.append(Sample(image, boxes, none.long(), ignore, i, f"cloud_{i}.png"))
    return made


class Listed(DetectionDataset):
    """Samples in a list."""

    def __init__(self, samples: Sequence[Sample], classes: tuple[str, ...], split: str) -> None:
        super().__init__("clouds", split, classes)
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def sources(self) -> set[str]:
        return {sample.source for sample in self.samples}


@pytest.fixture(scope="session")
def clouds(samples, detector_path, config):
    """The samples, labelled with every other of the best detections: neither all nor none."""
    blank = Listed(samples, config.class_names, "test")
    made = []
    for sample, found in detect_all(detector_path.read_bytes(), config, blank):
        boxes, labels = found.boxes[:12:2], found.labels[:12:2]
        ignore = torch.zeros(len(labels), dtype=torch.bool)
        made.append(replace(sample, boxes=boxes, labels=labels, ignore=ignore))
    return Listed(made, config.class_names, "test")


Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def tampered(detector_path, tmp_path):
    """A copy of the exported file with something changed in it."""

    def change(how: Change) -> Path:
        model = onnx.load(detector_path)
        how(model)
        path = tmp_path / "tampered.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return change


@pytest.fixture
def small_card():
    """Of two classes; what it says of training is the least that a card may say."""
    return DetectorCard(
        name="pets",
        architecture="none",
        backbone="none",
        class_names=["dog", "cat"],
        threshold_policy="fixed=0.5",
        thresholds=[
            ClassThreshold(name=name, threshold=0.5, source="policy", support=1, ground_truths=1)
            for name in ("dog", "cat")
        ],
        iou_threshold=as_float32(0.6),
        candidates=10,
        max_detections=2,
        preprocessing=Preprocessing(height=8, width=16, mean=(0, 0, 0), std=(1, 1, 1)),
        statistics=ClassStatistics(
            ("dog", "cat"),
            anchors=1,
            positives=[1, 1],
            ground_truths=[1, 1],
            positive_scores=[[1], [1]],
            negative_scores=[[1], [1]],
        ),
        training=TrainingCard(
            data="none", losses={}, seed=0, steps=0, versions={}, checkpoint_sha256="0" * 64
        ),
    )


@pytest.fixture
def small_model(small_card):
    """A detector that finds half a cat everywhere, with its card and without a seal; it runs."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 18]>
        g (float[batch, 3, 8, 16] images, float[2] class_thresholds, float[1] iou_threshold)
        => (float[batch, M, 4] boxes, float[batch, M] scores, int64[batch, M] labels,
            int64[batch] num_detections)
        <int64[3] axes = {1, 2, 3}, float[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
         int64[1] start = {0}, int64[1] end = {1}, int64[1, 1] label = {1},
         int64[1, 1] padding = {-1}, int64[3] four = {1, 1, 4},
         float[2] class_thresholds = {0.5, 0.5}, float[1] iou_threshold = {0.6}>
        {
            grey = ReduceMean <keepdims = 0> (images, axes)
            nothing = Mul (grey, zero)
            half = Sigmoid (nothing)
            scores = Unsqueeze (half, one)
            threshold = Slice (class_thresholds, start, end)
            stands = GreaterOrEqual (scores, threshold)
            labels = Where (stands, label, padding)
            whole = Cast <to = 7> (stands)
            num_detections = ReduceSum <keepdims = 0> (whole, one)
            corner = Unsqueeze (scores, two)
            boxes = Expand (corner, four)
        }""")
    for tensor in model.graph.initializer:  # as exporters write them
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    helper.set_model_props(model, {CARD_KEY: small_card.to_json()})
    return model
