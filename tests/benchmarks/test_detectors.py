"""The table of detectors says what its rows say."""

import pytest
import torch

from benchmarks.detectors import COST, DETECTORS, LEARNT, Network, table
from ghm_triton.detection.config import DetectorConfig
from ghm_triton.detection.model import build_detector


def test_the_table_gives_means_over_seeds_and_the_newest_cost():
    ap = {"ap75": 0.5, "stage": LEARNT, "steps": 600}
    rows = [
        {"detector": "fcos", "seed": 0, "ap": 0.5, "ap50": 0.75, **ap},
        {"detector": "fcos", "seed": 1, "ap": 0.7, "ap50": 0.85, **ap},
        {"detector": "retinanet", "seed": 0, "ap": 0.6, "ap50": 0.8, **ap},
        {"detector": "fcos", "stage": COST, "busy_share": 0.5},
        {"detector": "fcos", "stage": COST, "busy_share": 0.025},
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| fcos | 600 | 2 | 0.600 | 0.800 | 0.500 | 2.5% |"
    assert lines[3] == "| retinanet | 600 | 1 | 0.600 | 0.800 | 0.500 |  |"


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
