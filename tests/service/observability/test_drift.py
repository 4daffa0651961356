"""Drift against the formula by hand, and against samples whose drift is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ghm_triton.evidence import ClassStatistics, as_float32
from service.observability.drift import (
    CHANCE,
    CLASS_WINDOW,
    LEAST,
    MIX_WINDOW,
    MOST_BINS,
    Comparison,
    Monitor,
    bins_that_chance_allows,
    live_shape,
    stability_index,
)

BINS = 200


def histogram(scores) -> list[int]:
    """As training counts: equal bins, the last closed."""
    return np.histogram(scores, bins=BINS, range=(0, 1))[0].tolist()


def sample(seed: int, size: int, power: float = 2.0) -> np.ndarray:
    """Scores as a detector's: many high ones. A higher power shifts them up."""
    return (np.random.default_rng(seed).random(size) ** (1 / power)).astype(np.float32)


@pytest.fixture
def shifted(card):
    """The card with other held-out scores and thresholds."""

    def make(positive, negative=None, thresholds=(0.5, 0.6, 0.7)):
        negative = negative if negative is not None else [[0] * len(row) for row in positive]
        counts = {"positive_scores": positive, "negative_scores": negative}
        statistics = replace(card.statistics, **counts)
        judged = [
            replace(one, threshold=as_float32(threshold))
            for one, threshold in zip(card.thresholds, thresholds, strict=True)
        ]
        return card.model_copy(update={"statistics": statistics, "thresholds": judged})

    return make


@pytest.fixture
def trained(shifted):
    """1,000 held-out detections a class, right and wrong."""
    rows = [histogram(sample(seed, 600)) for seed in (1, 2, 3)]
    wrong = [histogram(sample(seed, 400)) for seed in (4, 5, 6)]
    return shifted(rows, wrong)


def seen(monitor, label: int, scores: np.ndarray, batch: int = 10) -> None:
    """Answers as they come, a few detections at a time, those at the threshold and above."""
    threshold = np.float32(monitor.thresholds[label])
    scores = scores[scores >= threshold]
    for start in range(0, len(scores), batch):
        part = scores[start : start + batch]
        monitor.observe(part, np.full(len(part), label))


def test_the_index_is_its_formula():
    held_out, live = np.array([10, 20, 30]), np.array([30.0, 20.0, 10.0])
    p = [10.5 / 61.5, 20.5 / 61.5, 30.5 / 61.5]
    q = list(reversed(p))
    by_hand = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert stability_index(held_out, live) == pytest.approx(by_hand, rel=1e-12)  # float64 sums
    assert by_hand == pytest.approx(2 * 20 / 61.5 * math.log(30.5 / 10.5), rel=1e-12)
    assert stability_index(np.array([5, 5]), np.array([5.0, 5.0])) == 0
    assert math.isfinite(stability_index(np.array([0, 100]), np.array([100.0, 0.0])))


def test_as_many_bins_as_chance_allows():
    assert bins_that_chance_allows(0) == bins_that_chance_allows(10) == 1
    assert bins_that_chance_allows(10**9) == MOST_BINS
    for held_out in range(14, 5000, 7):
        bins = bins_that_chance_allows(held_out)
        assert (bins - 1) * (1 / held_out + 1 / LEAST) <= CHANCE
        if bins < MOST_BINS:
            assert bins * (1 / held_out + 1 / LEAST) > CHANCE


def test_bins_begin_at_the_threshold_and_hold_about_as_many_each(trained):
    monitor = Monitor(trained)
    fines = trained.statistics.positive_scores + trained.statistics.negative_scores
    for c, threshold in enumerate(trained.class_thresholds):
        fine, first = fines[c], round(threshold * BINS)
        edges, counts = monitor.edges[c], monitor.held_out[c]
        assert edges[0] == np.float32(threshold)
        assert edges[-1] == 1
        assert (np.diff(edges) > 0).all()
        assert len(counts) == len(edges) - 1 >= 5
        assert counts.sum() == monitor.held_out_mix[c] == fine[first:].sum()
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            assert fine[round(low * BINS) : round(high * BINS)].sum() == count
        # A bin may miss its share by a fine bin at each end.
        assert np.abs(counts - counts.mean()).max() <= 2 * fine[first:].max()


def test_a_threshold_inside_a_fine_bin_leaves_the_rest_of_that_bin_out(shifted):
    monitor = Monitor(shifted([[10] * BINS] * 3, thresholds=(0.5012, 0.6, 0.7)))
    assert monitor.starts[0] == np.float32(101 / BINS)
    assert monitor.held_out_mix[0] == 99 * 10
    monitor.observe(np.array([0.503, 0.505], np.float32), np.array([0, 0]))
    assert monitor.mix().live == [1, 0, 0]
    assert sum(monitor.classes()[0].scores.live) == 1


def test_a_score_on_an_edge_belongs_to_the_bin_above_it(trained):
    monitor = Monitor(trained)
    edges = monitor.edges[0]
    monitor.observe(edges[:-1].copy(), np.zeros(len(edges) - 1, np.int64))
    live = np.array(monitor.classes()[0].scores.live)
    assert (live > 0.9).all()  # one each, the fading apart
    monitor.observe(np.array([1.0], np.float32), np.array([0]))
    assert monitor.classes()[0].scores.live[-1] > 1.9  # the last bin holds its upper edge


@pytest.mark.parametrize("seed", range(10))
def test_scores_of_the_same_kind_are_stable(trained, seed):
    monitor = Monitor(trained)
    for label in range(3):
        seen(monitor, label, sample(100 + 3 * seed + label, 2000))
    for one in monitor.classes():
        # chi2(9) * (1/R + 1/L) with R about 750 and L about 800 is above 0.1 once in 10^6.
        assert one.scores.word == "stable", one
        assert one.scores.psi_by_chance < CHANCE


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        # The index of the distributions themselves: 0.17 and 1.83.
        (sample(7, 4000, 4.3), "moderate"),
        (sample(7, 4000, 12.0), "major"),
        ((0.5 + 0.5 * sample(0, 2000, 1 / 3)).astype(np.float32), "major"),  # at the threshold
    ],
)
def test_scores_of_another_kind_are_not(trained, scores, word):
    monitor = Monitor(trained)
    seen(monitor, 0, scores)
    assert monitor.classes()[0].scores.word == word
    assert monitor.classes()[1].scores.word == "unknown"


def test_no_value_before_there_are_enough(trained):
    monitor = Monitor(trained)
    scores = np.full(LEAST - 1, 0.9, np.float32)
    seen(monitor, 0, scores, batch=LEAST - 1)  # at once, so that none fades
    assert monitor.classes()[0].scores.psi is None
    assert monitor.classes()[0].scores.word == "unknown"
    for _ in range(3):
        seen(monitor, 0, scores)
    assert monitor.classes()[0].scores.psi is not None


def test_a_class_without_evidence_takes_part_in_the_mix_only(shifted):
    few = [histogram(sample(1, 1000)), [0] * BINS, histogram([0.9] * 5)]
    monitor = Monitor(shifted(few))
    for label in range(3):
        seen(monitor, label, np.full(500, 0.95, np.float32))
    classes = monitor.classes()
    assert [len(one.edges) > 0 for one in classes] == [True, False, False]
    assert [one.scores.psi is not None for one in classes] == [True, False, False]
    assert all(count > 400 for count in monitor.mix().live)


def test_the_mix_of_classes(trained):
    even, odd = Monitor(trained), Monitor(trained)
    rng = np.random.default_rng(0)
    shares = even.held_out_mix / even.held_out_mix.sum()
    for _ in range(100):
        labels = rng.choice(3, 10, p=shares)
        even.observe(np.full(10, 0.99, np.float32), labels)
        odd.observe(np.full(10, 0.99, np.float32), np.minimum(labels, 1))
    assert even.mix().word == "stable"
    assert odd.mix().word == "major"
    assert even.mix().held_out == even.held_out_mix.tolist()


def test_many_classes_need_more_detections_for_their_mix(shifted, card):
    names = [f"class {i}" for i in range(80)]
    judged = [replace(card.thresholds[0], name=name) for name in names]
    scores = {"positive_scores": [[0, 400]] * 80, "negative_scores": [[0, 0]] * 80}
    flat = ClassStatistics(names, 1, [1] * 80, [1] * 80, **scores)
    monitor = Monitor(
        card.model_copy(update={"class_names": names, "thresholds": judged, "statistics": flat})
    )
    labels = np.arange(80)
    for _ in range(15):
        monitor.observe(np.full(80, 0.9, np.float32), labels)
    assert monitor.mix().psi is None
    assert monitor.mix().psi_by_chance > CHANCE
    for _ in range(10):
        monitor.observe(np.full(80, 0.9, np.float32), labels)
    assert monitor.mix().word == "stable"


def test_the_past_fades(trained):
    monitor = Monitor(trained)
    seen(monitor, 0, sample(8, 4000, 12.0))
    assert monitor.classes()[0].scores.word == "major"
    seen(monitor, 0, sample(9, 6 * CLASS_WINDOW))  # exp(-4) of it is left
    assert monitor.classes()[0].scores.word == "stable"
    # A batch's own members do not fade against each other: a batch of 10 adds 4.5 at most.
    assert sum(monitor.classes()[0].scores.live) == pytest.approx(CLASS_WINDOW, rel=0.01)


def test_a_class_fades_by_its_own_detections_and_the_mix_by_all(trained):
    monitor = Monitor(trained)
    seen(monitor, 0, sample(1, 1000))
    before, mix_before = monitor.classes()[0].scores.live, monitor.mix().live[0]
    seen(monitor, 1, sample(2, 1000))
    assert monitor.classes()[0].scores.live == before
    assert monitor.mix().live[0] < mix_before
    monitor = Monitor(trained)
    for _ in range(2):
        monitor.observe(np.full(100, 0.9, np.float32), np.zeros(100, np.int64))
    expected = 100 * (1 - 1 / MIX_WINDOW) ** 100 + 100
    assert monitor.mix().live[0] == pytest.approx(expected, rel=1e-12)  # float64


def test_scores_below_the_threshold_do_not_count(trained):
    monitor = Monitor(trained)
    monitor.observe(np.zeros(0, np.float32), np.zeros(0, np.int64))
    monitor.observe(np.array([0.1, 0.59, 0.61], np.float32), np.array([0, 1, 1]))
    assert monitor.mix().live == [0, 1, 0]


def test_workers_counts_add_up(trained):
    one, other = Monitor(trained), Monitor(trained)
    seen(one, 0, sample(1, 150))
    seen(other, 0, sample(2, 150))
    assert one.classes()[0].scores.psi is None
    both = one.classes(one.live + other.live)[0].scores
    assert both.psi is not None
    assert sum(both.live) == pytest.approx(one.live[0, :-1].sum() + other.live[0, :-1].sum())
    mixed = one.mix(one.live + other.live).live
    assert mixed == (one.live[:, -1] + other.live[:, -1]).tolist()


def test_a_held_out_class_that_never_passes_has_no_bins(shifted):
    monitor = Monitor(shifted([[10] * BINS] * 3, thresholds=(1.0, 0.5, 0.5)))
    assert len(monitor.edges[0]) == 0
    monitor.observe(np.array([1.0], np.float32), np.array([0]))
    assert monitor.mix().live == [0, 0, 0]


def test_live_counts_of_another_shape_are_refused(trained):
    with pytest.raises(ValueError, match=r"live must be \[3, 11\], got \[2, 2\]"):
        Monitor(trained, np.zeros((2, 2)))
    assert live_shape(trained) == (3, MOST_BINS + 1)


@pytest.mark.parametrize(
    ("psi", "word"),
    [(None, "unknown"), (0, "stable"), (0.0999, "stable"), (0.1, "moderate"), (0.25, "major")],
)
def test_words(psi, word):
    assert Comparison([], [], psi, None).word == word
