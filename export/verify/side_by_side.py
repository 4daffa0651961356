"""The file in its runtimes and the checkpoint in torch, asked the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.card import IOU_INPUT, THRESHOLDS_INPUT
from export.file import DetectorFile
from export.verify.compare import Comparison, Detections, Proposals, Rules, Tolerance, compare
from export.verify.runtimes import Runtime, UnrunnableError
from ghm_triton.detection import evaluate
from ghm_triton.detection.data import Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import SCORE_FLOOR, as_float32

Feeds = dict[str, npt.NDArray[np.float32]]
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], int]
Found = list[tuple[Sample, evaluate.Detections]]

CHECKPOINT = "checkpoint"
LAST_BITS = 1e-6


@dataclass(frozen=True, eq=False)
class Setting:
    """One way of asking.

    Attributes:
        name: For the report.
        feeds: What overrides the file's defaults.
        rules: What both sides answer under.
    """

    name: str
    feeds: Feeds
    rules: Rules


@dataclass(frozen=True, eq=False)
class Findings:
    """What some images showed.

    Attributes:
        runs: The comparison of each runtime, setting and batch size.
        found: What the checkpoint, and each runtime that is fast enough for many images, detected
            with thresholds so low that mAP can be measured; in image pixels.
        faults: Why a runtime could not run, by its name.
    """

    runs: dict[tuple[str, str, int], Comparison]
    found: dict[str, Found]
    faults: dict[str, str]


class SideBySide:
    """Both detectors, loaded.

    Args:
        file: The file.
        checkpoint: The checkpoint, of the same classes and input size; run by torch on the CPU.
        tolerance: How far matched detections may differ.
        runtimes: What runs the file.
        slow_images: Images that slow runtimes get, of all that are ever compared.

    Attributes:
        runtimes: Those that run it.
        refusals: Why the others do not load it.
    """

    def __init__(
        self,
        file: DetectorFile,
        checkpoint: Checkpoint,
        tolerance: Tolerance,
        runtimes: Sequence[type[Runtime]],
        slow_images: int,
    ) -> None:
        self.card = file.card
        self.deployed = DeployedDetector(checkpoint.detector()).eval()
        self.letterbox = Letterbox(checkpoint.config)
        self.tolerance = tolerance
        self.slow_images_left = slow_images
        self.runtimes: list[Runtime] = []
        self.refusals: list[str] = []
        for runtime in runtimes:
            try:
                self.runtimes.append(runtime(file))
            except UnrunnableError as fault:
                self.refusals.append(str(fault))

    @torch.inference_mode()
    def compare(self, samples: Sequence[Sample], batch_sizes: Sequence[int]) -> Findings:
        """Compare on some images, for every runtime, setting and batch size.

        A runtime that fails is named in the findings, and not asked again.
        """
        prepared = [self.letterbox(sample.image) for sample in samples]
        inputs = torch.stack([image for image, _ in prepared])
        scales = [scale for _, scale in prepared]
        parts = torch.split(inputs, max(batch_sizes))
        predicted = [self.deployed.detector.predict(part) for part in parts]
        predictions = Predictions(*(torch.cat(output) for output in zip(*predicted, strict=True)))
        settings = list(self._settings(predictions.scores))
        expected = [self._expected(predictions, setting.rules) for setting in settings]
        low = self._low()
        findings = Findings({}, {}, {})
        findings.found[CHECKPOINT] = _in_image_pixels(
            samples, scales, self._expected(predictions, low.rules)
        )
        proposals, images = _proposals(predictions), self._as_the_file_takes_them(inputs)
        for runtime in list(self.runtimes):
            rows = slice(self.slow_images_left if runtime.slow else None)
            try:
                for setting, right in zip(settings, expected, strict=True):
                    for size in batch_sizes:
                        answers = _answers(runtime, images[rows], setting.feeds, size)
                        key = (runtime.name, setting.name, size)
                        findings.runs[key] = self._compare_images(
                            samples[rows], right[rows], answers, proposals[rows], setting.rules
                        )
                if not runtime.slow:
                    shown = _answers(runtime, images, low.feeds, max(batch_sizes))
                    broken = (broken_rules(outputs, low.rules) for outputs in shown)
                    detections = [
                        _nothing() if faulty else _standing(outputs)
                        for outputs, faulty in zip(shown, broken, strict=True)
                    ]
                    findings.found[runtime.name] = _in_image_pixels(samples, scales, detections)
            except UnrunnableError as fault:
                findings.faults[runtime.name] = str(fault)
                self.runtimes.remove(runtime)
        self.slow_images_left = max(0, self.slow_images_left - len(samples))
        return findings

    def _as_the_file_takes_them(self, inputs: Tensor) -> npt.NDArray[Any]:
        if self.card.input == "float32":
            prepared: npt.NDArray[np.float32] = inputs.numpy()
            return prepared
        # The same images before they were normalised, letterboxed as the service sends them.
        grey = inputs.numpy().transpose(0, 2, 3, 1) * self.letterbox.std + self.letterbox.mean
        whole: npt.NDArray[np.uint8] = np.rint(grey * np.float32(255)).astype(np.uint8)
        return whole

    def _settings(self, scores: Tensor) -> Iterator[Setting]:
        """The file's defaults; thresholds that show every class; and another NMS on top."""
        own = np.array(self.card.class_thresholds, dtype=np.float32)
        iou = self.card.iou_threshold
        yield Setting("the file's own thresholds", {}, self._rules(own, iou))
        shown = self._thresholds_that_show(scores)
        feeds: Feeds = {THRESHOLDS_INPUT: shown}
        yield Setting("every class shown", feeds, self._rules(shown, iou))
        other = as_float32(0.3 if iou > 0.4 else 0.6)
        feeds = {THRESHOLDS_INPUT: shown, IOU_INPUT: np.array([other], dtype=np.float32)}
        yield Setting(f"every class, IoU {other:.1f}", feeds, self._rules(shown, other))

    def _rules(self, class_thresholds: npt.NDArray[np.float32], iou: float) -> Rules:
        card = self.card
        return Rules(card.class_names, class_thresholds, iou, card.max_detections)

    def _thresholds_that_show(self, scores: Tensor) -> npt.NDArray[np.float32]:
        """Thresholds that let as many places of each class pass as together half fill the answers.

        Each lies half-way between two scores, so that rounding seldom decides.
        """
        room = self.card.max_detections * len(scores) // (2 * scores.shape[2])
        flat = scores.flatten(0, 1)
        passing = min(max(1, room), len(flat) - 1)
        best = flat.topk(passing + 1, dim=0).values
        middle: npt.NDArray[np.float32] = best[-2:].mean(dim=0).numpy()
        return middle

    def _expected(self, predictions: Predictions, rules: Rules) -> list[Detections]:
        thresholds = torch.from_numpy(rules.class_thresholds)
        iou = torch.tensor([rules.iou_threshold])
        answer = self.deployed.select(predictions, thresholds, iou)
        boxes, scores, labels, counts = (part.numpy() for part in answer)
        return [
            Detections(boxes[i, :count], scores[i, :count], labels[i, :count])
            for i, count in enumerate(counts.tolist())
        ]

    def _low(self) -> Setting:
        """What mAP is measured with, as `ghm eval` does: nearly every score counts."""
        floor = np.full(len(self.card.class_names), SCORE_FLOOR, dtype=np.float32)
        return Setting(
            "low", {THRESHOLDS_INPUT: floor}, self._rules(floor, self.card.iou_threshold)
        )

    def _compare_images(
        self,
        samples: Sequence[Sample],
        expected: Sequence[Detections],
        answers: Sequence[Outputs],
        proposals: Sequence[Proposals],
        rules: Rules,
    ) -> Comparison:
        result = Comparison(np.zeros(len(rules.class_names), dtype=np.int64))
        for sample, ours, theirs, proposed in zip(
            samples, expected, answers, proposals, strict=True
        ):
            one = self._compare_image(ours, theirs, proposed, rules)
            one.mismatches = [f"{sample.source}: {text}" for text in one.mismatches]
            result.add(one)
        return result

    def _compare_image(
        self, expected: Detections, outputs: Outputs, proposals: Proposals, rules: Rules
    ) -> Comparison:
        broken = broken_rules(outputs, rules)
        if broken:
            nothing = np.zeros(len(rules.class_names), dtype=np.int64)
            return Comparison(nothing, mismatches=broken)
        return compare(expected, _standing(outputs), proposals, rules, self.tolerance)


def _answers(
    runtime: Runtime, images: npt.NDArray[Any], overrides: Feeds, size: int
) -> list[Outputs]:
    """The file's answer for each image, in batches of exactly `size`."""
    answers: list[Outputs] = []
    for start in range(0, len(images), size):
        rows = list(range(start, min(start + size, len(images))))
        batch = images[list(islice(cycle(rows), size))]
        boxes, scores, labels, counts = runtime.run(batch, overrides)
        answers += [(boxes[i], scores[i], labels[i], int(counts[i])) for i in range(len(rows))]
    return answers


def _standing(outputs: Outputs) -> Detections:
    boxes, scores, labels, count = outputs
    return Detections(boxes[:count], scores[:count], labels[:count])


def _nothing() -> Detections:
    none = np.zeros(0, dtype=np.float32)
    return Detections(none.reshape(0, 4), none, none.astype(np.int64))


def _in_image_pixels(
    samples: Sequence[Sample],
    scales: Sequence[tuple[float, float]],
    detections: Sequence[Detections],
) -> Found:
    found = []
    for sample, scale, one in zip(samples, scales, detections, strict=True):
        boxes, scores, labels = map(torch.from_numpy, (one.boxes, one.scores, one.labels))
        own = evaluate.in_image_pixels(boxes, scale, sample.image.size)
        found.append((sample, evaluate.Detections(own, scores, labels)))
    return found


def _proposals(predictions: Predictions) -> list[Proposals]:
    """What the checkpoint had to choose from, image by image; a box of one class scores 0 else."""
    boxes, scores = predictions.boxes, predictions.scores
    if boxes.shape[2] > 1:
        scores = scores.unsqueeze(3) * torch.eye(scores.shape[2])
    pairs = zip(boxes.flatten(1, 2), scores.reshape(len(scores), -1, scores.shape[2]), strict=True)
    return [Proposals(box.numpy(), score.numpy()) for box, score in pairs]


def broken_rules(outputs: Outputs, rules: Rules) -> list[str]:
    """What the file's contract promises of any answer, and this one breaks."""
    boxes, scores, labels, count = outputs
    if not 0 <= count <= len(scores):
        return [f"num_detections is {count} of {len(scores)}"]
    broken = []
    if not ((labels[:count] >= 0) & (labels[:count] < len(rules.class_names))).all():
        return [f"a label is none of 0..{len(rules.class_names) - 1}"]
    if (labels[count:] != -1).any() or scores[count:].any() or boxes[count:].any():
        broken.append("the padding is not 0, 0 and -1")
    # Ranked by logit: a runtime's sigmoid need not be monotone in its last bits.
    if (np.diff(scores[:count]) > LAST_BITS).any():
        broken.append("the scores do not fall")
    if not (scores[:count] >= rules.class_thresholds[labels[:count]]).all():
        broken.append("a score lies below its class's threshold")
    return broken
