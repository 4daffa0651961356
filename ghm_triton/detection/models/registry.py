"""The detectors by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector
from ghm_triton.detection.models.fcos import FCOSDetector
from ghm_triton.detection.models.heads import HeadLosses
from ghm_triton.detection.models.retinanet import RetinaNetDetector

DETECTORS: dict[str, type[RetinaNetDetector | FCOSDetector | FasterRCNNDetector]] = {
    "retinanet": RetinaNetDetector,
    "fcos": FCOSDetector,
    "faster-rcnn": FasterRCNNDetector,
}


def build_detector(config: DetectorConfig, losses: HeadLosses | None = None) -> Detector:
    """Build a detector from its description, with random weights drawn from torch's generator."""
    return DETECTORS[config.architecture](config, losses)


def channels_last(module: nn.Module) -> nn.Module:
    """Convert convolution weights to the memory format that is fastest on CPUs and tensor cores."""
    kwargs: dict[str, Any] = {"memory_format": torch.channels_last}
    return module.to(**kwargs)
