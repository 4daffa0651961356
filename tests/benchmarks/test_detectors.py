"""The table of detectors."""

import re

import pytest
import torch

from benchmarks.detectors import COST, DETECTORS, LEARNT, Network, table
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector


def test_the_table_gives_means_over_seeds_and_the_newest_cost_of_each_network():
    ap = {"ap75": 0.5, "stage": LEARNT, "steps": 600}
    cost = {"detector": "fcos", "stage": COST, "network_ms": 1.5, "quiet_share": 0.011}
    tiny = {**cost, "backbone": "tiny", "image_size": [128, 96]}
    other = {**cost, "backbone": "resnet18", "image_size": [320, 320], "busy_share": -0.001}
    rows = [
        {"detector": "fcos", "seed": 0, "ap": 0.5, "ap50": 0.75, **ap},
        {"detector": "fcos", "seed": 1, "ap": 0.7, "ap50": 0.85, **ap},
        {"detector": "retinanet", "seed": 0, "ap": 0.6, "ap50": 0.8, **ap},
        {**tiny, "busy_share": 0.5},
        other,
        {**tiny, "busy_share": 0.025},
    ]
    text = re.sub(" +", " ", table(rows))
    learnt, costs = (part.splitlines()[2:] for part in text.split("\n\n"))
    assert learnt == [
        "| fcos | 600 | 2 | 0.600 | 0.800 | 0.500 |",
        "| retinanet | 600 | 1 | 0.600 | 0.800 | 0.500 |",
    ]
    assert costs == [
        "| fcos | resnet18, 320x320 | 1.50 | +1.1% | -0.1% |",
        "| fcos | tiny, 128x96 | 1.50 | +1.1% | +2.5% |",
    ]


@pytest.mark.parametrize("name", DETECTORS)
def test_the_network_alone_is_all_of_the_detector_but_its_choices(name):
    config = DetectorConfig(("a", "b"), (64, 96), channels=16, **DETECTORS[name][0])
    detector = build_detector(config).eval()
    seen = []
    for module in detector.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(lambda layer, *_: seen.append(layer))
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        detector.predict(images)
        whole = list(seen)
        network = Network(detector)
        seen.clear()
        network(images)
    assert seen == whole
