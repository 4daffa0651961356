"""Class statistics, and the class thresholds derived from them: numpy and pydantic, never torch."""

from ghm_triton.evidence.statistics import (
    SCORE_BINS,
    SCORE_FLOOR,
    ClassStatistics,
    Count,
    Probability,
    as_float32,
    score_bin,
    score_edges,
)
from ghm_triton.evidence.thresholds import (
    POLICIES,
    ClassThreshold,
    ClassThresholds,
    ThresholdWarning,
    class_prior,
)

__all__ = [
    "POLICIES",
    "SCORE_BINS",
    "SCORE_FLOOR",
    "ClassStatistics",
    "ClassThreshold",
    "ClassThresholds",
    "Count",
    "Probability",
    "ThresholdWarning",
    "as_float32",
    "class_prior",
    "score_bin",
    "score_edges",
]
