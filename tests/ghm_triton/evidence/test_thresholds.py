"""Each policy against brute force over the raw scores."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghm_triton import ClassStatistics, ClassThresholds, ThresholdWarning
from ghm_triton.evidence import POLICIES, SCORE_BINS, class_prior

EDGES = np.array([k / SCORE_BINS for k in range(1, SCORE_BINS)]).astype(np.float32)


class Held:
    """Raw held-out scores of a few classes, and the statistics made from them."""

    def __init__(self, positives, scores, matched, ground_truths, anchors=10_000):
        self.prior = np.array(positives) / anchors
        self.scores = [np.array(s, dtype=np.float32) for s in scores]
        self.matched = [np.array(m, dtype=bool) for m in matched]
        self.ground_truths = ground_truths
        self.statistics = ClassStatistics(tuple(f"class{j}" for j in range(len(positives))))
        self.statistics.add_labels(torch.tensor([*positives, anchors - sum(positives)]))
        for j, (s, m, boxes) in enumerate(
            zip(self.scores, self.matched, ground_truths, strict=True)
        ):
            self.statistics.observe_detections(
                torch.from_numpy(s),
                torch.full((len(s),), j),
                torch.from_numpy(m),
                torch.full((boxes,), j),
            )

    def at(self, j, threshold):
        """True and false positives among the detections that reach a threshold."""
        stands = self.scores[j] >= np.float32(threshold)
        return int((stands & self.matched[j]).sum()), int((stands & ~self.matched[j]).sum())

    def precision(self, j, threshold):
        hits, misses = self.at(j, threshold)
        return hits / (hits + misses) if hits + misses else None

    def f1(self, j, threshold):
        hits, misses = self.at(j, threshold)
        return 2 * hits / (hits + misses + self.ground_truths[j])


def drawn(seed, classes=3, detections=60):
    """Scores that separate the matched detections from the others imperfectly."""
    rng = np.random.default_rng(seed)
    matched = [rng.random(detections) < 0.4 for _ in range(classes)]
    scores = [np.clip(rng.normal(0.35 + 0.3 * m, 0.2), 0.005, 1) for m in matched]
    ground_truths = [int(m.sum()) + int(rng.integers(0, 9)) for m in matched]
    return Held(rng.integers(1, 400, classes).tolist(), scores, matched, ground_truths)


@pytest.fixture
def quiet():
    """Turn a fallback into an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def choose(held, policy):
    return ClassThresholds.from_statistics(held.statistics, policy)


def test_prior_is_the_papers_formula(quiet):
    held = Held([30, 10, 60], [[]] * 3, [[]] * 3, [0] * 3, anchors=1000)
    chosen = choose(held, "prior")
    # (N_f / N) (N_j / sum N): a tenth of the anchors are positive, and of these ...
    assert chosen.as_array().tolist() == pytest.approx([0.03, 0.01, 0.06])
    assert [entry.source for entry in chosen] == ["policy"] * 3
    assert [entry.support for entry in chosen] == [30, 10, 60]
    assert class_prior(held.statistics).tolist() == pytest.approx([0.1 * 0.3, 0.1 * 0.1, 0.1 * 0.6])


@pytest.mark.parametrize("seed", range(8))
def test_f1_is_the_lowest_score_of_the_best(quiet, seed):
    held = drawn(seed)
    for j, entry in enumerate(choose(held, "f1")):
        best = max(held.f1(j, edge) for edge in EDGES)
        expected = next(edge for edge in EDGES if held.f1(j, edge) == best)
        assert entry.threshold == max(expected, np.float32(held.prior[j]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 1.0])
def test_precision_is_the_lowest_score_from_which_it_holds(quiet, seed, target):
    held = drawn(seed)
    for j, entry in enumerate(choose(held, f"precision={target}")):
        precisions = [held.precision(j, edge) for edge in EDGES]
        known = [k for k, value in enumerate(precisions) if value is not None]
        expected = None
        for k in known:
            if all(precisions[i] >= target for i in known if i >= k):
                expected = EDGES[k]
                break
        if expected is None:
            most = max(precisions[k] for k in known)
            expected = EDGES[next(k for k in known if precisions[k] == most)]
        assert entry.threshold == max(expected, np.float32(held.prior[j]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.8, 1.0])
def test_recall_is_the_highest_score_that_keeps_it(quiet, seed, target):
    held = drawn(seed)
    for j, entry in enumerate(choose(held, f"recall={target}")):
        keeps = [edge for edge in EDGES if held.at(j, edge)[0] / held.ground_truths[j] >= target]
        assert entry.threshold == (max(keeps) if keeps else np.float32(held.prior[j]))
        assert entry.source == ("policy" if keeps else "prior")


def test_fixed_needs_no_evidence(quiet):
    chosen = ClassThresholds.from_statistics(ClassStatistics(("cat", "dog")), "fixed=0.3")
    assert chosen.as_array().tolist() == pytest.approx([0.3, 0.3])
    assert [(e.source, e.precision, e.recall) for e in chosen] == [("policy", None, None)] * 2


@pytest.mark.parametrize("policy", ["f1", "precision=0.8", "recall=0.5", "fixed=0.42", "prior"])
def test_the_evidence_is_that_at_the_threshold(quiet, policy):
    """On an edge exactly; between two edges, of the scores above the next one."""
    held = drawn(99)
    for j, entry in enumerate(choose(held, policy)):
        edge = next(edge for edge in EDGES if edge >= np.float32(entry.threshold))
        hits, misses = held.at(j, edge)
        assert entry.precision == pytest.approx(hits / (hits + misses), rel=1e-12)
        assert entry.recall == pytest.approx(hits / held.ground_truths[j], rel=1e-12)
        assert entry.ground_truths == held.ground_truths[j]


def test_nothing_is_claimed_above_the_last_edge(quiet):
    held = Held([10], [[1.0, 0.999]], [[True, True]], [2])
    (entry,) = choose(held, "fixed=1.0")
    assert (entry.precision, entry.recall) == (None, 0.0)
    (entry,) = choose(held, "fixed=0.995")
    assert (entry.precision, entry.recall) == (1.0, 1.0)


@pytest.mark.parametrize("policy", ["f1", "precision=0.5"])
def test_an_operating_point_is_never_below_the_prior(quiet, policy):
    # Everything above 0.2 is right, but half of the anchors are of this class.
    held = Held([5000], [[0.25, 0.3, 0.9]], [[True, True, True]], [3])
    (entry,) = choose(held, policy)
    assert (entry.threshold, entry.source) == (0.5, "prior")
    (entry,) = choose(held, "recall=1.0")
    assert (entry.threshold, entry.source) == (0.25, "policy")


def test_a_lucky_bin_below_a_bad_stretch_is_no_operating_point(quiet):
    # Precision at 0.3 is 0.8, at 0.6 it is 2/3, at 0.8 it is 1.
    scores = [0.9, 0.85, 0.61, 0.31, 0.32]
    held = Held([10], [scores], [[True, True, False, True, True]], [5])
    assert held.precision(0, 0.3) == 0.8
    (entry,) = choose(held, "precision=0.8")
    assert entry.threshold == np.float32(0.615)  # the first edge above the false one


@pytest.mark.parametrize("policy", ["f1", "precision=0.9", "recall=0.0"])
def test_a_faultless_class_does_not_let_everything_through(quiet, policy):
    """Detections below the first edge are not recorded, so no policy chooses a score below it."""
    held = Held([1], [[0.8, 0.9]], [[True, True]], [2])
    (entry,) = choose(held, policy)
    assert entry.threshold == (EDGES[-1] if policy == "recall=0.0" else EDGES[0])
    held = Held([1], [[0.001]], [[True]], [1])
    (entry,) = choose(held, "recall=1.0")
    assert entry.threshold == EDGES[0]


class TestFallback:
    def test_a_class_without_hits_takes_the_median_of_those_with(self):
        held = Held(
            [10, 10, 10, 10],
            [[0.2], [0.4], [0.9], [0.5]],
            [[True], [True], [True], [False]],
            [1, 1, 1, 1],
        )
        with pytest.warns(ThresholdWarning, match="'class3' has no matched held-out") as caught:
            *_, entry = choose(held, "recall=1.0")
        assert (entry.threshold, entry.source) == (np.float32(0.4), "fallback")
        assert caught[0].filename == __file__  # it points at whoever asked

    def test_the_median_of_two_is_between_them(self):
        held = Held([10] * 3, [[0.2], [0.4], []], [[True], [True], []], [1, 1, 1])
        with pytest.warns(ThresholdWarning):
            *_, entry = choose(held, "recall=1.0")
        assert entry.threshold == pytest.approx(0.3)

    def test_never_below_its_own_prior(self):
        held = Held([10, 6000], [[0.2], []], [[True], []], [1, 1])
        with pytest.warns(ThresholdWarning):
            *_, entry = choose(held, "f1")
        assert (entry.threshold, entry.source) == (np.float32(0.6), "fallback")

    @pytest.mark.parametrize("policy", ["prior", "f1", "precision=0.9", "recall=0.9"])
    def test_a_class_never_seen_in_training_is_at_least_a_half(self, policy):
        held = Held([10, 0], [[0.2], [0.3]], [[True], [True]], [1, 1])
        with pytest.warns(ThresholdWarning, match="'class1' was never a positive in training"):
            *_, entry = choose(held, policy)
        assert (entry.threshold, entry.source) == (0.5, "fallback")

    def test_without_any_evidence_at_all(self):
        held = Held([10, 10], [[], []], [[], []], [0, 0])
        with pytest.warns(ThresholdWarning):
            chosen = choose(held, "f1")
        assert chosen.as_array().tolist() == [0.5, 0.5]
        assert [(e.precision, e.recall) for e in chosen] == [(None, None)] * 2


@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["f1", "precision=0.7", "recall=0.6"]))
@settings(max_examples=40, deadline=None)
def test_every_threshold_is_a_float32_probability_not_below_the_prior(seed, policy):
    held = drawn(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        for entry, prior in zip(choose(held, policy), held.prior, strict=True):
            assert 0 <= entry.threshold <= 1
            assert entry.threshold == np.float32(entry.threshold)  # what the file stores
            assert policy.startswith("recall") or entry.threshold >= np.float32(prior)
            assert entry.precision is None or 0 <= entry.precision <= 1
            assert entry.recall is None or 0 <= entry.recall <= 1


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        ("best", "unknown policy 'best'; choose from prior, f1, precision=P"),
        ("f1=0.5", "unknown policy 'f1=0.5'"),
        ("precision", "unknown policy 'precision'"),
        ("", "unknown policy ''"),
        ("precision=", r"'' is not a number in \[0, 1\]"),
        ("precision=ninety", r"'ninety' is not a number in \[0, 1\]"),
        ("recall=1.5", r"'1.5' is not a number in \[0, 1\]"),
        ("fixed=-0.1", r"'-0.1' is not a number in \[0, 1\]"),
        ("fixed=nan", r"'nan' is not a number in \[0, 1\]"),
    ],
)
def test_bad_policies(policy, match):
    with pytest.raises(ValueError, match=match):
        ClassThresholds.from_statistics(drawn(0).statistics, policy)


def test_a_policy_that_needs_anchors_refuses_statistics_without():
    with pytest.raises(ValueError, match=r"no anchors were counted in training \(anchors=0\)"):
        ClassThresholds.from_statistics(ClassStatistics(("cat",)), "f1")


def test_the_table_shows_every_class_and_its_evidence(quiet):
    chosen = choose(drawn(1), "f1")
    table = chosen.table()
    assert "f1" in table.splitlines()[0]
    for entry in chosen:
        (line,) = [line for line in table.splitlines() if line.startswith(entry.name)]
        assert f"{entry.threshold:.4f}" in line
        assert f"{100 * entry.precision:.1f} %" in line
        assert f" {entry.support} " in line


def test_the_policies_are_listed_one_by_one():
    assert list(POLICIES) == ["prior", "f1", "precision=P", "recall=R", "fixed=T"]
