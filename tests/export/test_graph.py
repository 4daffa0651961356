from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.card import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT
from export.graph import IR_VERSION, MAX_BATCH, OPSET, build_graph
from export.runtimes import open_session
from export.verify.compare import (
    Detections,
    Proposals,
    Setting,
    Tolerance,
    compare,
    split_batch,
)
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.models.registry import build_detector

# Two float32 runtimes: scores agree to 1e-6 and boxes to 1e-4 px in practice, ten times that here.
CLOSE = Tolerance(box=1e-3, score=1e-5)


def clouds(batch: int, config: DetectorConfig, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *config.image_size, generator=generator)


def split(outputs: Any) -> list[Detections]:
    return [Detections.of(one) for one in split_batch([np.asarray(part) for part in outputs])]


def assert_equal(
    file: onnxruntime.InferenceSession,
    deployed: DeployedDetector,
    images: torch.Tensor,
    thresholds: np.ndarray,
    iou: float,
    feeds: dict[str, np.ndarray],
) -> list[Detections]:
    with torch.inference_mode():
        expected = split(deployed(images, torch.tensor(thresholds), torch.tensor([iou])))
    found = split(file.run(list(OUTPUTS), {INPUT: images.numpy(), **feeds}))
    config = deployed.config
    setting = Setting(config.class_names, thresholds, iou, config.max_detections)
    none = Proposals(np.zeros((0, 4), np.float32), np.zeros((0, len(thresholds)), np.float32))
    for ours, theirs in zip(expected, found, strict=True):
        result = compare(ours, theirs, none, setting, CLOSE)
        assert result.mismatches == []
        assert result.borderline == 0
        assert result.matched.sum() == len(theirs)
    return found


@pytest.fixture(scope="module")
def file(detector_path):
    return open_session(detector_path.read_bytes())


@pytest.fixture(scope="module")
def defaults(detector_path):
    model = onnx.load(detector_path)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return values[THRESHOLDS_INPUT], float(values[IOU_INPUT][0])


@pytest.fixture(scope="module")
def deployed(checkpoint):
    return DeployedDetector(checkpoint.detector()).eval()


def test_inputs_and_outputs_are_those_of_the_contract(file):
    def described(values: Any) -> list[tuple]:
        return [(value.name, value.type, value.shape) for value in values]

    assert described(file.get_inputs()) == [(INPUT, "tensor(float)", ["batch", 3, 64, 96])]
    assert described(file.get_overridable_initializers()) == [
        (THRESHOLDS_INPUT, "tensor(float)", [3]),
        (IOU_INPUT, "tensor(float)", [1]),
    ]
    assert described(file.get_outputs()) == [
        ("boxes", "tensor(float)", ["batch", 150, 4]),
        ("scores", "tensor(float)", ["batch", 150]),
        ("labels", "tensor(int64)", ["batch", 150]),
        ("num_detections", "tensor(int64)", ["batch"]),
    ]


def test_versions_are_pinned_and_nothing_of_the_exporter_is_left(detector_path):
    model, graph = (loaded := onnx.load(detector_path, load_external_data=False)), loaded.graph
    assert model.ir_version == IR_VERSION == 10
    assert [(x.domain, x.version) for x in model.opset_import] == [("", OPSET)] == [("", 18)]
    assert not model.functions
    assert not any(tensor.external_data for tensor in graph.initializer)
    assert (model.producer_name, graph.name) == ("ghm-triton", "detector")
    assert [entry.key for entry in model.metadata_props] == ["ghm.card", "ghm.sha256"]
    parts = [graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    assert not [part for part in parts if part.doc_string or part.metadata_props]


@pytest.mark.parametrize("batch", [1, MAX_BATCH])
def test_one_file_takes_any_batch(file, deployed, defaults, config, batch):
    found = assert_equal(file, deployed, clouds(batch, config, batch), *defaults, {})
    assert {int(x) for one in found for x in one.labels} == {0, 1, 2}


THRESHOLDS = {
    "each class its own": [0.2, 0.9, 0.6],
    "all 0": [0.0, 0.0, 0.0],
    "all 1": [1.0, 1.0, 1.0],
    "one class switched off": [0.3, 2.0, 0.3],
}


@pytest.mark.parametrize("thresholds", THRESHOLDS.values(), ids=THRESHOLDS)
def test_thresholds_are_overridden_by_a_call(file, deployed, defaults, config, thresholds):
    given = np.array(thresholds, dtype=np.float32)
    feeds = {THRESHOLDS_INPUT: given}
    found = assert_equal(file, deployed, clouds(3, config), given, defaults[1], feeds)
    for one in found:
        assert (one.scores >= given[one.labels]).all()
    shown = {int(label) for one in found for label in one.labels}
    assert shown == {label for label in range(3) if thresholds[label] < 1}


@pytest.mark.parametrize("iou", [0.0, 0.2, 0.75, 1.0])
def test_iou_is_overridden_by_a_call(file, deployed, defaults, config, iou):
    feeds = {IOU_INPUT: np.array([iou], dtype=np.float32)}
    images = clouds(3, config)
    found = assert_equal(file, deployed, images, defaults[0], float(feeds[IOU_INPUT][0]), feeds)
    usual = split(file.run(list(OUTPUTS), {INPUT: images.numpy()}))
    assert [len(one) for one in found] != [len(one) for one in usual]
    if iou == 1.0:  # with thresholds of 0, nothing is left out but for want of room
        feeds[THRESHOLDS_INPUT] = np.zeros(3, dtype=np.float32)
        *_, counts = file.run(list(OUTPUTS), {INPUT: images.numpy(), **feeds})
        assert counts.tolist() == [config.max_detections] * 3


def test_an_image_without_detections_is_all_padding(file, config):
    feeds = {THRESHOLDS_INPUT: np.full(3, 1.0, dtype=np.float32)}
    boxes, scores, labels, counts = file.run(
        list(OUTPUTS), {INPUT: clouds(3, config).numpy(), **feeds}
    )
    assert counts.tolist() == [0, 0, 0]
    assert (labels == -1).all()
    for padding in (boxes, scores):
        assert not padding.any()
        assert not np.signbit(padding).any()


def test_empty_and_full_images_share_a_batch(file, deployed, defaults, config):
    images = clouds(3, config)
    with torch.inference_mode():
        best = deployed.detector.raw(images)[0].sigmoid().flatten(1).amax(dim=1).sort()
    between = float(best.values[:2].mean())  # the quietest image shows nothing, the others do
    given = np.full(3, between, dtype=np.float32)
    feeds = {THRESHOLDS_INPUT: given}
    found = assert_equal(file, deployed, images, given, defaults[1], feeds)
    assert [len(one) > 0 for one in found] == [i != int(best.indices[0]) for i in range(3)]


@pytest.mark.slow
def test_a_resnet_exports_even_if_it_was_left_training():
    config = DetectorConfig(("cat", "dog"), (64, 64), backbone="resnet18", head_convs=1, prior=0.2)
    torch.manual_seed(0)
    detector = build_detector(config).train()
    thresholds = [0.25, 0.5]
    model = build_graph(detector, thresholds, 0.4)
    given = np.array(thresholds, dtype=np.float32)
    iou = float(np.float32(0.4))
    images = clouds(3, config)
    deployed = DeployedDetector(detector)
    found = assert_equal(open_session(model.SerializeToString()), deployed, images, given, iou, {})
    assert all(len(one) > 10 for one in found)


def test_a_threshold_a_class(checkpoint):
    with pytest.raises(ValueError, match="2 thresholds for 3 classes"):
        build_graph(checkpoint.detector(), [0.5, 0.5], 0.5)
