"""Initial foreground probability of a detector: chosen, or counted over the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ghm_triton.atomic import write_atomically
from ghm_triton.detection.data import DetectionDataset
from ghm_triton.detection.data.loader import TrainingView
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.models.rpn import CleanProposalNetwork
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.evidence import ClassStatistics
from ghm_triton.imbalance.sampling_free import Assigner, count_priors, optimal_prior

COUNTS = "priors.json"
MOST_IMAGES = 1000  # they give the share of positives to a few per cent, in seconds

_counted: dict[str, ClassStatistics] = {}  # in this process, by the key of what they depend on


def start_at_prior(
    options: TrainOptions,
    config: DetectorConfig,
    dataset: DetectionDataset,
    out: Path,
    *,
    resume: bool = False,
) -> DetectorConfig:
    """The configuration with the prior that `options.init` names.

    Counts are written to `priors.json`. The `optimal` prior of a two-stage detector is that of its
    proposals, see `start_proposals`: the share of positive regions depends on the proposals.

    Args:
        options: Options of the run.
        config: The detector.
        dataset: The training split.
        out: Folder of the run.
        resume: Read the counts of the run that is resumed, if they are there.

    Raises:
        ValueError: There is nothing positive to count.
    """
    if options.init != "optimal" or config.architecture == "faster-rcnn":
        chosen = options.chosen_prior()
        return config if chosen is None else replace(config, prior=chosen)
    key = _key(options.data, config, dataset)
    statistics = _read(out / COUNTS, key) if resume else None
    if statistics is None:
        statistics = _count_once(key, lambda: count_data_priors(config, dataset))
    _counted[key] = statistics
    return replace(config, prior=_note_optimum(out, key, statistics))


def start_proposals(
    options: TrainOptions, detector: Detector, dataset: DetectionDataset, out: Path
) -> None:
    """Set the objectness bias of a two-stage detector's proposals to their optimal prior.

    That is the share of positives among the anchors that the proposal network is trained on:
    sampled ones, all, or clean ones, whose network starts there whatever `options.init` is. Counts
    are written to `priors.json`.

    Args:
        options: Options of the run.
        detector: The detector; one without proposals is left alone.
        dataset: The training split.
        out: Folder of the run.

    Raises:
        ValueError: `options.init` is `optimal`, and there is nothing positive to count.
    """
    if not isinstance(detector, FasterRCNNDetector):
        return
    rpn, required = detector.rpn, options.init == "optimal"
    if not required and not isinstance(rpn, CleanProposalNetwork):
        return
    key = _key(options.data, detector.config, dataset, sampled=rpn.samples)
    targets = _targets(detector.config, dataset)
    statistics = _count_once(key, lambda: count_priors(rpn, targets, ("object",)))
    if required or 0 < int(statistics.positives.sum()) < statistics.anchors:
        rpn.start_at(_note_optimum(out, key, statistics))


def count_data_priors(config: DetectorConfig, dataset: DetectionDataset) -> ClassStatistics:
    """Count the labels that a detector's assigner gives to a data set, without its network.

    Mirrored images are not counted separately, and at most `MOST_IMAGES`, spread over the data.

    Args:
        config: The detector; its prior and its width do not matter.
        dataset: The training split.

    Raises:
        ValueError: The detector has no assigner.
    """
    detector = build_detector(config)
    if not isinstance(detector, Assigner):
        raise ValueError(f"{config.architecture} has no assigner that could be asked for labels")
    return count_priors(detector, _targets(config, dataset), config.class_names)


def _count_once(key: str, count: Callable[[], ClassStatistics]) -> ClassStatistics:
    if key not in _counted:
        _counted[key] = count()
    return _counted[key]


def _note_optimum(out: Path, key: str, statistics: ClassStatistics) -> float:
    """The optimal prior, written to `priors.json` with its counts."""
    positives, classes = int(statistics.positives.sum()), len(statistics.class_names)
    prior = optimal_prior(positives, statistics.anchors, classes)
    content = {"key": key, "prior": prior, "statistics": statistics.to_dict()}
    out.mkdir(parents=True, exist_ok=True)
    # Atomically, since several processes of one run write the same file.
    write_atomically(out / COUNTS, (json.dumps(content) + "\n").encode())
    return prior


def _read(path: Path, key: str) -> ClassStatistics | None:
    """The counts in a file, if they belong to this data set and detector."""
    try:
        content = json.loads(path.read_text())
        return ClassStatistics.from_dict(content["statistics"]) if content["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _targets(
    config: DetectorConfig, dataset: DetectionDataset
) -> Iterator[list[dict[str, Tensor]]]:
    view = TrainingView(dataset, config, (0.0, 0.0))
    count = min(len(dataset), MOST_IMAGES)
    for position in range(count):
        yield [view[position * len(dataset) // count, 0][1]]


def _key(data: str, config: DetectorConfig, dataset: DetectionDataset, **how: bool) -> str:
    """A digest of everything that the counts depend on."""
    detector = {**config.to_dict(), "prior": None, "channels": None, "head_convs": None}
    images = [data, dataset.split, sorted(dataset.sources())]
    content = json.dumps([detector, images, *([how] if how else [])], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
