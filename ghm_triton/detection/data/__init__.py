"""Data sets of images with boxes: built-in digits, Pascal VOC folders and COCO JSON."""

from ghm_triton.detection.data.problems import (
    AnnotationProblem,
    DamagedAnnotationError,
    OnDamage,
)
from ghm_triton.detection.data.registry import DATASETS, open_dataset
from ghm_triton.detection.data.sample import DetectionDataset, Sample

__all__ = [
    "DATASETS",
    "AnnotationProblem",
    "DamagedAnnotationError",
    "DetectionDataset",
    "OnDamage",
    "Sample",
    "open_dataset",
]
