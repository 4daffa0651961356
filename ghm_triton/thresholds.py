"""From statistics to one threshold a class, by a named policy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal, Self

import torch
from torch import Tensor

from ghm_triton.statistics import SCORE_BINS, ClassStatistics, score_edges
from ghm_triton.tables import threshold_table

Source = Literal["policy", "prior", "fallback"]
POLICIES = ("prior", "f1", "precision=P", "recall=R", "fixed=T")
NEVER_SEEN = 0.5


class ThresholdWarning(UserWarning):
    """A class had no evidence for its threshold."""


@dataclass(frozen=True)
class ClassThreshold:
    """The threshold of one class and the evidence behind it.

    Attributes:
        name: The class.
        threshold: Score in [0, 1], a float32.
        source: `policy`; `prior`, when the policy's answer was below the class's prior
            probability and was lifted to it, or when there was none; or `fallback`, when there
            was no evidence.
        support: Positive anchors in training.
        ground_truths: Held-out boxes.
        precision: Held-out precision at the threshold; None when nothing reaches it.
        recall: Held-out recall at the threshold; None without held-out boxes.
    """

    name: str
    threshold: float
    source: Source
    support: int
    ground_truths: int
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class ClassThresholds:
    """One threshold a class; a detection stands iff `score >= threshold`.

    Example:
        >>> statistics = ClassStatistics(("cat", "dog"), 1000, torch.tensor([30, 10]))
        >>> chosen = ClassThresholds.from_statistics(statistics, policy="prior")
        >>> [round(entry.threshold, 3) for entry in chosen]
        [0.03, 0.01]
    """

    policy: str
    entries: tuple[ClassThreshold, ...]

    def __iter__(self) -> Iterator[ClassThreshold]:
        return iter(self.entries)

    def as_tensor(self) -> Tensor:
        """float32 `[C]`."""
        return torch.tensor([entry.threshold for entry in self.entries], dtype=torch.float32)

    @classmethod
    def from_statistics(cls, statistics: ClassStatistics, policy: str = "f1") -> Self:
        """Choose a threshold for every class.

        Policies:
            `prior`: `theta_j = (N_f / N) * (N_j / sum_k N_k)`, the class's probability at an
                anchor, so that a standing detection is 'more likely than chance'
                (arXiv 1909.04868).
            `f1`: the lowest score that maximises F1 of the class on held-out images.
            `precision=P`: the lowest score from which held-out precision is at least `P`; the most
                precise score where none is.
            `recall=R`: the highest score that keeps held-out recall of at least `R`; the prior
                where none does.
            `fixed=T`: `T` for every class.

        The scores that `f1`, `precision` and `recall` choose from are the edges of the score
        histograms, `k / SCORE_BINS` from `k = 1`. `f1` and `precision` are never below the prior.
        A class without evidence (never a positive in training; or, for the held-out policies, no
        held-out detection matched) gets a fallback and a `ThresholdWarning`: the median of the
        classes that have evidence, never below its prior, and at least `NEVER_SEEN` when training
        never saw it.

        Raises:
            ValueError: The policy is not one of these, its number lies outside [0, 1], or it needs
                anchors and training counted none.
        """
        choose, target = _parse(policy)
        needs_prior = choose is not _fixed
        prior = class_prior(statistics) if needs_prior else torch.zeros(len(statistics.positives))
        chosen = [choose(statistics, j, target, prior) for j in range(len(prior))]
        known = [value for value, source in chosen if source != "fallback"]
        usual = median(known) if known else NEVER_SEEN
        entries = []
        for j, (value, source) in enumerate(chosen):
            if source == "fallback":
                value = _fallback(statistics, j, max(usual, float(prior[j])), policy)
            entries.append(_with_evidence(statistics, j, value, source))
        return cls(policy, tuple(entries))

    def table(self) -> str:
        """The thresholds as a table for a terminal."""
        return threshold_table(self.policy, self.entries)


Chooser = Callable[[ClassStatistics, int, float, Tensor], tuple[float, Source]]


def class_prior(statistics: ClassStatistics) -> Tensor:
    """`theta_j = (N_f / N) * (N_j / sum_k N_k)` of every class, float64 `[C]`.

    Equal to `N_j / N`: the share of the anchors counted in training that were of class `j`.

    Raises:
        ValueError: No anchors were counted.
    """
    if statistics.anchors <= 0:
        raise ValueError(f"no anchors were counted in training (anchors={statistics.anchors})")
    return statistics.positives.double() / statistics.anchors


def precision_recall(statistics: ClassStatistics, label: int) -> tuple[Tensor, Tensor]:
    """Held-out precision and recall of a class at the threshold `k / SCORE_BINS`, `k = 0..`.

    Returns:
        Two float64 `[SCORE_BINS]`; precision is NaN where nothing scores that high, recall is NaN
        without held-out boxes.
    """
    hits, misses = _at_least(statistics, label)
    return hits / (hits + misses), hits / statistics.ground_truths[label].double()


def _at_least(s: ClassStatistics, j: int) -> tuple[Tensor, Tensor]:
    # Matched and unmatched detections in bin k or above.
    hits, misses = s.positive_scores[j], s.negative_scores[j]
    return hits.flip(0).cumsum(0).flip(0).double(), misses.flip(0).cumsum(0).flip(0).double()


def _parse(policy: str) -> tuple[Chooser, float]:
    name, equals, text = policy.partition("=")
    plain: dict[str, Chooser] = {"prior": _prior, "f1": _f1}
    valued: dict[str, Chooser] = {"precision": _precision, "recall": _recall, "fixed": _fixed}
    if not equals and name in plain:
        return plain[name], 0.0
    if equals and name in valued:
        try:
            target = float(text)
        except ValueError:
            target = float("nan")
        if not 0.0 <= target <= 1.0:
            raise ValueError(f"policy {policy!r}: {text!r} is not a number in [0, 1]")
        return valued[name], target
    raise ValueError(
        f"unknown policy {policy!r}; choose from {', '.join(POLICIES)} (P, R, T in [0, 1])"
    )


def _prior(s: ClassStatistics, j: int, target: float, prior: Tensor) -> tuple[float, Source]:
    del target
    return float(prior[j]), "policy" if s.positives[j] else "fallback"


def _fixed(s: ClassStatistics, j: int, target: float, prior: Tensor) -> tuple[float, Source]:
    del s, j, prior
    return target, "policy"


def _f1(s: ClassStatistics, j: int, target: float, prior: Tensor) -> tuple[float, Source]:
    del target
    if not _has_evidence(s, j):
        return 0.0, "fallback"
    hits, misses = _at_least(s, j)
    f1 = 2 * hits / (hits + misses + s.ground_truths[j])
    return _lift(_score(int(f1.argmax())), prior[j])


def _precision(s: ClassStatistics, j: int, target: float, prior: Tensor) -> tuple[float, Source]:
    if not _has_evidence(s, j):
        return 0.0, "fallback"
    precision = precision_recall(s, j)[0].nan_to_num(-1.0)
    # 'from which on': one lucky bin below a bad stretch is no operating point.
    good = (precision >= target) | (precision < 0)
    start = int(good.flip(0).int().cumprod(0).sum())
    reached = SCORE_BINS - start
    if reached == SCORE_BINS or precision[reached] < 0:
        reached = int(precision.argmax())
    return _lift(_score(reached), prior[j])


def _recall(s: ClassStatistics, j: int, target: float, prior: Tensor) -> tuple[float, Source]:
    if not _has_evidence(s, j):
        return 0.0, "fallback"
    enough = torch.nonzero(precision_recall(s, j)[1] >= target)
    if len(enough) == 0:
        return float(prior[j]), "prior"
    return _score(int(enough[-1])), "policy"


def _has_evidence(s: ClassStatistics, j: int) -> bool:
    return bool(s.positives[j] > 0 and s.positive_scores[j].sum() > 0)


def _score(index: int) -> float:
    # Held-out detections below the first edge are not recorded: no evidence reaches down there.
    return max(index, 1) / SCORE_BINS


def _lift(value: float, prior: Tensor) -> tuple[float, Source]:
    return (value, "policy") if value >= float(prior) else (float(prior), "prior")


def _fallback(s: ClassStatistics, j: int, usual: float, policy: str) -> float:
    unseen = int(s.positives[j]) == 0
    value = max(usual, NEVER_SEEN) if unseen else usual
    why = "was never a positive in training" if unseen else "has no matched held-out detection"
    warnings.warn(
        f"class {s.class_names[j]!r} {why}: policy {policy!r} falls back to {value:.4f}",
        ThresholdWarning,
        stacklevel=3,
    )
    return value


def _with_evidence(s: ClassStatistics, j: int, value: float, source: Source) -> ClassThreshold:
    threshold = float(torch.tensor(value, dtype=torch.float32))
    # A threshold between two bin edges is credited with the bins wholly above it; past the last
    # edge there is none.
    hits, misses = (torch.cat([counts, counts.new_zeros(1)]) for counts in _at_least(s, j))
    index = int((score_edges() < threshold).sum())
    return ClassThreshold(
        name=s.class_names[j],
        threshold=threshold,
        source=source,
        support=int(s.positives[j]),
        ground_truths=int(s.ground_truths[j]),
        precision=_known(hits[index] / (hits[index] + misses[index])),
        recall=_known(hits[index] / s.ground_truths[j]),
    )


def _known(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number
