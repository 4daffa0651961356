"""The file in onnxruntime and the checkpoint in torch, asked the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from export.compare import Comparison, Detections, Proposals, Rules, Tolerance, compare
from export.contract import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT, as_float32
from export.file import DetectorFile
from ghm_triton.detection.checkpoint import Checkpoint
from ghm_triton.detection.data import Sample
from ghm_triton.detection.detector import Predictions
from ghm_triton.detection.postprocess import DeployedDetector
from ghm_triton.detection.transforms import Letterbox

Feeds = dict[str, npt.NDArray[np.float32]]
Outputs = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], int]


LAST_BITS = 1e-6


class UnrunnableError(RuntimeError):
    """onnxruntime cannot load or run the file."""


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


class SideBySide:
    """Both detectors, loaded.

    Args:
        file: The file; run by onnxruntime on the CPU.
        checkpoint: The checkpoint, of the same classes and input size; run by torch on the CPU.
        tolerance: How far matched detections may differ.

    Raises:
        UnrunnableError: onnxruntime refuses the file.
    """

    def __init__(self, file: DetectorFile, checkpoint: Checkpoint, tolerance: Tolerance) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that the thresholds can be overridden: they shall
        providers = ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(file.content, options, providers=providers)
        except Exception as error:  # its errors share no class of their own
            raise UnrunnableError(f"onnxruntime refuses the file: {error}") from error
        self.card = file.card
        self.deployed = DeployedDetector(checkpoint.detector()).eval()
        self.letterbox = Letterbox(checkpoint.config)
        self.tolerance = tolerance

    @torch.inference_mode()
    def compare(
        self, samples: Sequence[Sample], batch_sizes: Sequence[int]
    ) -> dict[tuple[str, int], Comparison]:
        """Compare on some images, for every setting and batch size.

        Raises:
            UnrunnableError: The file does not run.
        """
        inputs = torch.stack([self.letterbox(sample.image)[0] for sample in samples])
        parts = torch.split(inputs, max(batch_sizes))
        predicted = [self.deployed.detector.predict(part) for part in parts]
        predictions = Predictions(*(torch.cat(output) for output in zip(*predicted, strict=True)))
        proposals = _proposals(predictions)
        results = {}
        for setting in self._settings(predictions.scores):
            expected = self._expected(predictions, setting.rules)
            for size in batch_sizes:
                result = Comparison(np.zeros(len(self.card.class_names), dtype=np.int64))
                found = self._found(inputs.numpy(), setting.feeds, size)
                for sample, ours, theirs, proposed in zip(
                    samples, expected, found, proposals, strict=True
                ):
                    one = self._compare_image(ours, theirs, proposed, setting.rules)
                    one.mismatches = [f"{sample.source}: {text}" for text in one.mismatches]
                    result.add(one)
                results[setting.name, size] = result
        return results

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

    def _found(self, inputs: npt.NDArray[np.float32], feeds: Feeds, size: int) -> Iterator[Outputs]:
        """The file's answer for each image, in batches of exactly `size`."""
        for start in range(0, len(inputs), size):
            rows = list(range(start, min(start + size, len(inputs))))
            batch = inputs[list(islice(cycle(rows), size))]
            try:
                answer = self.session.run(list(OUTPUTS), {INPUT: batch, **feeds})
            except Exception as error:
                raise UnrunnableError(f"the file fails on a batch of {size}: {error}") from error
            for i in range(len(rows)):
                boxes, scores, labels, counts = (output[i] for output in answer)
                yield boxes, scores, labels, int(counts)

    def _compare_image(
        self, expected: Detections, outputs: Outputs, proposals: Proposals, rules: Rules
    ) -> Comparison:
        broken = broken_rules(outputs, rules)
        if broken:
            nothing = np.zeros(len(rules.class_names), dtype=np.int64)
            return Comparison(nothing, mismatches=broken)
        boxes, scores, labels, count = outputs
        found = Detections(boxes[:count], scores[:count], labels[:count])
        return compare(expected, found, proposals, rules, self.tolerance)


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
