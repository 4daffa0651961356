"""One threshold per class, derived from class statistics by a named policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as validated

from ghm_triton.evidence.statistics import ClassStatistics, Count, Floats, Probability, as_float32
from ghm_triton.tables import percent, table

Source = Literal["policy", "prior", "fallback", "manual"]
POLICIES = ("prior", "f1", "precision=P", "recall=R", "fixed=T")
NEVER_SEEN = 0.5


class ThresholdWarning(UserWarning):
    """A class has no evidence for its threshold."""


@validated(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ClassThreshold:
    """The threshold of one class and the evidence behind it.

    Attributes:
        name: The class.
        threshold: Score in [0, 1] that a detection must reach, a float32.
        source: `policy` if the policy's own evidence set it; `prior` if the policy's answer was
            below the class's prior probability and was raised to it, or if it had none; `fallback`
            if there was no evidence for the class; `manual` if it was set by hand.
        support: Positive anchors of the class in training.
        ground_truths: Boxes of the class in the held-out images.
        precision: Held-out precision at the threshold; None if no detection reaches it.
        recall: Held-out recall at the threshold; None without held-out boxes.

    Raises:
        ValueError: A value is out of range, or `threshold` is not a float32.
    """

    name: Annotated[str, Field(min_length=1)]
    threshold: Probability
    source: Source
    support: Count
    ground_truths: Count
    precision: Probability | None = None
    recall: Probability | None = None

    @field_validator("threshold")
    @classmethod
    def _is_float32(cls, threshold: float) -> float:
        if as_float32(threshold) != threshold:
            raise ValueError(f"threshold {threshold!r} is not a float32; the graph cannot hold it")
        return threshold


@dataclass(frozen=True)
class ClassThresholds:
    """One threshold per class; a detection is reported if and only if `score >= threshold`.

    Attributes:
        policy: The policy that chose them.
        entries: The thresholds in label order.

    Example:
        >>> statistics = ClassStatistics(("cat", "dog"), 1000, [30, 10])
        >>> chosen = ClassThresholds.from_statistics(statistics, policy="prior")
        >>> [round(entry.threshold, 3) for entry in chosen]
        [0.03, 0.01]
    """

    policy: str
    entries: tuple[ClassThreshold, ...]

    def __iter__(self) -> Iterator[ClassThreshold]:
        return iter(self.entries)

    def as_array(self) -> npt.NDArray[np.float32]:
        """Return the thresholds, float32 `[C]`."""
        return np.array([entry.threshold for entry in self.entries], dtype=np.float32)

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics, policy: str = "f1") -> Self:
        r"""Choose a threshold for every class.

        Policies:
            `prior`: $\theta_j = (N_f / N) (N_j / \sum_k N_k)$, the probability of the class at an
                anchor, so that a reported detection is more likely than chance (arXiv 1909.04868).
            `f1`: the lowest score that maximises F1 of the class on held-out images.
            `precision=P`: the lowest score from which held-out precision is at least `P`; the
                score of the highest precision if there is none.
            `recall=R`: the highest score with a held-out recall of at least `R`; the prior if
                there is none.
            `fixed=T`: `T` for every class.

        `f1`, `precision` and `recall` choose from the edges of the score histograms,
        `k / SCORE_BINS` from `k = 1`. `f1` and `precision` are never below the prior. A class
        without evidence (no positive in training or, for the held-out policies, no matched
        held-out detection) gets a fallback and a `ThresholdWarning`: the median of the classes
        that have evidence, not below its prior, and at least `NEVER_SEEN` if training had no
        positive of it.

        Args:
            statistics: Counts of training and of held-out images.
            policy: One of the above.

        Raises:
            ValueError: The policy is unknown, its number is not in [0, 1], or it needs anchors and
                training counted none.
        """
        name, target = _parse(policy)
        classes = len(statistics.class_names)
        priors = np.zeros(classes) if name == "fixed" else class_prior(statistics)
        chosen = [_choose(name, target, statistics, j, float(priors[j])) for j in range(classes)]
        with_evidence = [value for value, source in chosen if source != "fallback"]
        usual = median(with_evidence) if with_evidence else NEVER_SEEN
        entries = []
        for j, (value, source) in enumerate(chosen):
            if source == "fallback":
                value = max(usual, float(priors[j]))
                seen = int(statistics.positives[j]) > 0
                value = value if seen else max(value, NEVER_SEEN)
                why = (
                    "has no matched held-out detection"
                    if seen
                    else "was never a positive in training"
                )
                warnings.warn(
                    f"class {statistics.class_names[j]!r} {why}:"
                    f" policy {policy!r} falls back to {value:.4f}",
                    ThresholdWarning,
                    stacklevel=2,
                )
            threshold = as_float32(value)
            precision, recall = statistics.precision_recall_at(j, threshold)
            entry = ClassThreshold(
                name=statistics.class_names[j],
                threshold=threshold,
                source=source,
                support=int(statistics.positives[j]),
                ground_truths=int(statistics.ground_truths[j]),
                precision=precision,
                recall=recall,
            )
            entries.append(entry)
        return cls(policy, tuple(entries))

    def table(self) -> str:
        """Format the thresholds and the evidence behind them for a terminal."""
        head = ("class", "threshold", "from", "positives", "held-out", "precision", "recall")
        rows = [
            (e.name, f"{e.threshold:.4f}", e.source, e.support, e.ground_truths, *shares)
            for e in self.entries
            for shares in [(percent(e.precision), percent(e.recall))]
        ]
        by_hand = any(entry.source == "manual" for entry in self.entries)
        title = f"thresholds by policy {self.policy!r}{', or by hand (manual)' if by_hand else ''}"
        return f"{title}\n{table(head, rows, left=(0, 2))}"


def class_prior(statistics: ClassStatistics) -> Floats:
    r"""Return the probability of each class at an anchor, float64 `[C]`.

    $\theta_j = (N_f / N) (N_j / \sum_k N_k) = N_j / N$: the share of the anchors counted in
    training that were assigned to class `j`.

    Raises:
        ValueError: No anchors were counted.
    """
    if statistics.anchors <= 0:
        raise ValueError(f"no anchors were counted in training (anchors={statistics.anchors})")
    return np.asarray(statistics.positives / statistics.anchors)


def _parse(policy: str) -> tuple[str, float]:
    """Split `precision=0.9` into its name and number; `prior` and `f1` have none, here 0."""
    name, equals, text = policy.partition("=")
    if f"{name}{equals}" not in {listed.rstrip("PRT") for listed in POLICIES}:
        raise ValueError(
            f"unknown policy {policy!r}; choose from {', '.join(POLICIES)} (P, R, T in [0, 1])"
        )
    try:
        target = float(text) if equals else 0.0
    except ValueError:
        target = float("nan")
    if not 0.0 <= target <= 1.0:
        raise ValueError(f"policy {policy!r}: {text!r} is not a number in [0, 1]")
    return name, target


def _choose(
    name: str, target: float, s: ClassStatistics, j: int, prior: float
) -> tuple[float, Source]:
    """Choose the score of class `j`; 0 and `fallback` without evidence."""
    if name == "fixed":
        return target, "policy"
    if name == "prior":
        return (prior, "policy") if s.positives[j] > 0 else (0.0, "fallback")
    if s.positives[j] == 0 or not s.positive_scores[j].any():
        return 0.0, "fallback"
    hits, misses = s.reaching(j)
    precision, recall = (curve[:-1] for curve in s.precision_recall(j))
    if name == "recall":
        enough = np.flatnonzero(recall >= target)
        if not enough.size:
            return prior, "prior"
        index = int(enough[-1])
    elif name == "f1":
        f1 = 2 * hits / np.maximum(hits + misses + s.ground_truths[j], 1)
        index = int(f1[:-1].argmax())
    else:
        # All higher edges must reach the target too: one lucky bin below a bad stretch does not
        # count.
        known = int(np.isfinite(precision).sum())
        enough = np.flatnonzero(precision[:known] < target)
        index = int(enough[-1]) + 1 if enough.size else 0
        if index == known:
            index = int(precision[:known].argmax())
    # Held-out detections below the first edge are not recorded, so no evidence reaches below it.
    value = max(index, 1) / len(recall)
    return (value, "policy") if value >= prior or name == "recall" else (prior, "prior")
