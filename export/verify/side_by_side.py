"""A file in its runtimes and its checkpoint in torch, run on the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.card import IOU_INPUT, THRESHOLDS_INPUT
from export.file import DetectorFile
from export.runtimes import Runtime, UnrunnableError
from export.verify.compare import (
    Comparison,
    Detections,
    Floats,
    Outputs,
    Proposals,
    Setting,
    Tolerance,
    compare,
    contract_violations,
    split_batch,
)
from ghm_triton.detection import evaluate
from ghm_triton.detection.data import Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import SCORE_FLOOR, as_float32

CHECKPOINT = "checkpoint"
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


class SideBySide:
    """A file and its checkpoint, both loaded.

    Args:
        file: The file.
        checkpoint: The checkpoint, of the same classes and input size; run by torch on the CPU.
        runtimes: The runtimes of the file.
        tolerance: How far matched detections may differ.
        slow_images: Number of images that slow runtimes run, of all images compared.

    Attributes:
        runtimes: The runtimes that have not failed.
        problems: A description of each failure of a runtime.
        runs: The comparison of each runtime, setting and batch size.
        detected: All detections above `SCORE_FLOOR` in image pixels, to measure mAP: of the
            checkpoint, and of the file in each runtime that is not slow.
    """

    def __init__(
        self,
        file: DetectorFile,
        checkpoint: Checkpoint,
        runtimes: Sequence[type[Runtime]],
        tolerance: Tolerance | None = None,
        slow_images: int = 2,
    ) -> None:
        self.problems: list[str] = []
        self.runs: dict[tuple[str, str, int], Comparison] = {}
        self.card = file.card
        self.deployed = DeployedDetector(checkpoint.detector()).eval()
        self.letterbox = Letterbox(checkpoint.config)
        self.tolerance = tolerance or Tolerance()
        self.slow_images_left = slow_images
        self.detected: dict[str, list[tuple[Sample, evaluate.Detections]]] = {CHECKPOINT: []}
        self.runtimes: list[Runtime] = []
        for runtime in runtimes:
            try:
                self.runtimes.append(runtime(file))
            except UnrunnableError as error:
                self.problems.append(str(error))

    @torch.inference_mode()
    def compare(self, samples: Sequence[Sample], batch_sizes: Sequence[int]) -> None:
        """Compare on some images, with every runtime, setting and batch size.

        A runtime that fails is reported as a problem and removed.
        """
        prepared = [self.letterbox(sample.image) for sample in samples]
        inputs = torch.stack([image for image, _ in prepared])
        scales = [scale for _, scale in prepared]
        parts = torch.split(inputs, max(batch_sizes))
        predicted = [self.deployed.detector.predict(part) for part in parts]
        predictions = Predictions(*(torch.cat(output) for output in zip(*predicted, strict=True)))
        proposals, images = _proposals(predictions), self._as_the_file_takes_them(inputs)
        settings = list(self._settings(predictions.scores))
        expected = [self._expected(predictions, setting) for setting in settings]
        floor = np.full(len(self.card.class_names), SCORE_FLOOR, dtype=np.float32)
        low = self._setting("mAP", floor, None, THRESHOLDS_INPUT)
        self._keep(CHECKPOINT, samples, scales, self._expected(predictions, low))
        for runtime in list(self.runtimes):
            rows = slice(self.slow_images_left if runtime.slow else None)
            try:
                for setting, right in zip(settings, expected, strict=True):
                    for size in batch_sizes:
                        outputs = _run(runtime, images[rows], setting, size)
                        run = self.runs.setdefault(
                            (runtime.name, setting.name, size), self._nothing_matched()
                        )
                        for sample, ours, theirs, proposed in zip(
                            samples[rows], right[rows], outputs, proposals[rows], strict=True
                        ):
                            one = self._compare_image(ours, theirs, proposed, setting)
                            one.mismatches = [f"{sample.source}: {m}" for m in one.mismatches]
                            run.add(one)
                if not runtime.slow:
                    shown = _run(runtime, images, low, max(batch_sizes))
                    valid = [not contract_violations(outputs, low) for outputs in shown]
                    found = [
                        Detections.of(outputs) if good else NOTHING
                        for outputs, good in zip(shown, valid, strict=True)
                    ]
                    self._keep(runtime.name, samples, scales, found)
            except UnrunnableError as error:
                self.problems.append(str(error))
                self.runs = {key: run for key, run in self.runs.items() if key[0] != runtime.name}
                self.detected.pop(runtime.name, None)
                self.runtimes.remove(runtime)
        self.slow_images_left = max(0, self.slow_images_left - len(samples))

    def _as_the_file_takes_them(self, inputs: Tensor) -> npt.NDArray[Any]:
        if self.card.input == "float32":
            prepared: Floats = inputs.numpy()
            return prepared
        # The same images before they were normalised, letterboxed as the service sends them.
        grey = inputs.numpy().transpose(0, 2, 3, 1) * self.letterbox.std + self.letterbox.mean
        whole: npt.NDArray[np.uint8] = np.rint(grey * np.float32(255)).astype(np.uint8)
        return whole

    def _settings(self, scores: Tensor) -> Iterator[Setting]:
        """The file's defaults; thresholds that every class reaches; another IoU threshold too."""
        defaults = np.array(self.card.class_thresholds, dtype=np.float32)
        yield self._setting("the file's own thresholds", defaults, None)
        shown = self._thresholds_that_show(scores)
        yield self._setting("every class shown", shown, None, THRESHOLDS_INPUT)
        iou = as_float32(0.3 if self.card.iou_threshold > 0.4 else 0.6)
        name = f"every class, IoU {iou:.1f}"
        yield self._setting(name, shown, iou, THRESHOLDS_INPUT, IOU_INPUT)

    def _setting(
        self, name: str, thresholds: Floats, iou: float | None, *overridden: str
    ) -> Setting:
        card = self.card
        iou = card.iou_threshold if iou is None else iou
        return Setting(card.class_names, thresholds, iou, card.max_detections, name, overridden)

    def _thresholds_that_show(self, scores: Tensor) -> Floats:
        """Thresholds at which each class takes an equal share of half of all detections.

        Each is half-way between two scores, so that rounding seldom decides.
        """
        room = self.card.max_detections * len(scores) // (2 * scores.shape[2])
        flat = scores.flatten(0, 1)
        passing = min(max(1, room), len(flat) - 1)
        best = flat.topk(passing + 1, dim=0).values
        middle: Floats = best[-2:].mean(dim=0).numpy()
        return middle

    def _expected(self, predictions: Predictions, setting: Setting) -> list[Detections]:
        thresholds = torch.from_numpy(setting.class_thresholds)
        iou = torch.tensor([setting.iou_threshold])
        outputs = self.deployed.select(predictions, thresholds, iou)
        return [Detections.of(one) for one in split_batch([part.numpy() for part in outputs])]

    def _compare_image(
        self, expected: Detections, outputs: Outputs, proposals: Proposals, setting: Setting
    ) -> Comparison:
        if violations := contract_violations(outputs, setting):
            return replace(self._nothing_matched(), mismatches=violations)
        return compare(expected, Detections.of(outputs), proposals, setting, self.tolerance)

    def _nothing_matched(self) -> Comparison:
        return Comparison(np.zeros(len(self.card.class_names), dtype=np.int64))

    def _keep(
        self,
        side: str,
        samples: Sequence[Sample],
        scales: Sequence[tuple[float, float]],
        detections: Sequence[Detections],
    ) -> None:
        kept = self.detected.setdefault(side, [])
        for sample, scale, one in zip(samples, scales, detections, strict=True):
            boxes, scores, labels = map(torch.from_numpy, (one.boxes, one.scores, one.labels))
            boxes = evaluate.in_image_pixels(boxes, scale, sample.image.size)
            kept.append((sample, evaluate.Detections(boxes, scores, labels)))


def _run(runtime: Runtime, images: npt.NDArray[Any], setting: Setting, size: int) -> list[Outputs]:
    """The file's outputs for each image, in batches of exactly `size`; the last is filled up."""
    outputs: list[Outputs] = []
    for start in range(0, len(images), size):
        rows = list(range(start, min(start + size, len(images))))
        batch = images[list(islice(cycle(rows), size))]
        outputs += split_batch(runtime.run(batch, setting.overrides))[: len(rows)]
    return outputs


def _proposals(predictions: Predictions) -> list[Proposals]:
    """Proposals of each image; a box of one class scores 0 in the others."""
    boxes, scores = predictions.boxes, predictions.scores
    if boxes.shape[2] > 1:
        scores = scores.unsqueeze(3) * torch.eye(scores.shape[2])
    pairs = zip(boxes.flatten(1, 2), scores.reshape(len(scores), -1, scores.shape[2]), strict=True)
    return [Proposals(box.numpy(), score.numpy()) for box, score in pairs]
