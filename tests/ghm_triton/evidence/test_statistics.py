"""Counts of training and evaluation."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghm_triton import ClassStatistics
from ghm_triton.evidence import SCORE_BINS, as_float32, score_bin, score_edges


def observed(seed, images=3):
    generator = torch.Generator().manual_seed(seed)
    statistics = ClassStatistics(("cat", "dog", "eel"))
    statistics.add_labels(torch.randint(0, 50, (4,), generator=generator))
    for _ in range(images):
        statistics.observe_detections(
            torch.rand(20, generator=generator),
            torch.randint(0, 3, (20,), generator=generator),
            torch.rand(20, generator=generator) < 0.5,
            torch.randint(0, 3, (12,), generator=generator),
        )
    return statistics


def test_anchors_and_positives_add_up():
    statistics = ClassStatistics(("cat", "dog"))
    statistics.add_labels(torch.tensor([3, 0, 97]))
    statistics.add_labels(torch.tensor([1, 2, 7]))
    assert statistics.anchors == 110
    assert statistics.positives.tolist() == [4, 2]


def test_detections_fall_into_the_histograms_of_their_class():
    statistics = ClassStatistics(("cat", "dog"))
    statistics.observe_detections(
        torch.tensor([0.0, 0.5, 0.5, 1.0]),
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([True, True, False, True]),
        torch.tensor([1, 0, 0, 0]),
    )
    half = SCORE_BINS // 2
    assert np.argwhere(statistics.positive_scores).tolist() == [
        [0, 0],
        [0, SCORE_BINS - 1],
        [1, half],
    ]
    assert np.argwhere(statistics.negative_scores).tolist() == [[1, half]]
    assert statistics.ground_truths.tolist() == [3, 1]


def test_an_image_without_anything():
    statistics = ClassStatistics(("cat", "dog"))
    none = torch.zeros(0)
    statistics.observe_detections(none, none.long(), none.bool(), none.long())
    assert statistics == ClassStatistics(("cat", "dog"))


def test_a_score_on_an_edge_reaches_the_threshold_of_that_edge():
    """In float32, as detector, file and service compare them."""
    edges = score_edges()
    assert edges.dtype == np.float32
    assert score_bin(edges).tolist() == list(range(SCORE_BINS))
    below = np.nextafter(edges[1:], np.float32(0))
    assert score_bin(below).tolist() == list(range(SCORE_BINS - 1))
    assert edges.tolist() == [as_float32(k / SCORE_BINS) for k in range(SCORE_BINS)]


@given(st.floats(0, 1, width=32))
def test_the_bin_of_a_score_counts_the_edges_at_or_below_it(score):
    found = int(score_bin(score))
    assert found == sum(float(edge) <= score for edge in score_edges()) - 1


def test_merge_is_the_sum():
    both = ClassStatistics(("cat", "dog", "eel"))
    one, another = observed(1), observed(2)
    merged = one.merge(another)
    both.anchors = one.anchors + another.anchors
    for name in ("positives", "ground_truths", "positive_scores", "negative_scores"):
        setattr(both, name, getattr(one, name) + getattr(another, name))
    assert merged == both
    assert one == observed(1)  # neither is changed
    with pytest.raises(ValueError, match="classes differ"):
        one.merge(ClassStatistics(("cat",)))


def test_json_round_trip():
    statistics = observed(3)
    restored = ClassStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert restored == statistics
    assert restored.positives.dtype == np.int64
    restored.add_labels(torch.tensor([1, 1, 1, 1]))  # it can go on counting
    assert restored != statistics


def test_forgetting_the_held_out_keeps_training():
    statistics = observed(4)
    anchors, positives = statistics.anchors, statistics.positives.copy()
    statistics.forget_held_out()
    assert statistics.anchors == anchors
    assert np.array_equal(statistics.positives, positives)
    for name in ("ground_truths", "positive_scores", "negative_scores"):
        assert not getattr(statistics, name).any()


def test_two_sets_share_nothing():
    one, another = ClassStatistics(("cat",)), ClassStatistics(("cat",))
    one.add_labels(torch.tensor([1, 1]))
    assert another.anchors == 0
    assert not another.positives.any()


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("the statistics lack 'anchors'", {"anchors": ...}),
        ("the statistics lack 'positives'", {"positives": ...}),
        ("positives must be", {"positives": [1, 2]}),
        (r"positives must be \[3\], got \[0\]", {"positives": []}),
        ("positive_scores must be", {"positive_scores": [[1], [2], [3]]}),
        ("positive_scores must be an array of integers", {"positive_scores": [[1], [2, 3], [4]]}),
        ("ground_truths must hold integers", {"ground_truths": None}),
        ("ground_truths must hold integers", {"ground_truths": [1.5, 2, 3]}),
        ("ground_truths must hold integers of 64 bits", {"ground_truths": [2**63, 2, 3]}),
        ("ground_truths must not be negative, got -1", {"ground_truths": [-1, 2, 3]}),
        ("anchors must hold integers", {"anchors": None}),
        ("anchors must not be negative, got -1", {"anchors": -1}),
        ("unknown field 'surprise'", {"surprise": 1}),
    ],
)
def test_damaged_json(match, change):
    values = {**observed(5).to_dict(), **change}
    values = {key: value for key, value in values.items() if value is not ...}
    with pytest.raises(ValueError, match=match):
        ClassStatistics.from_dict(values)


@pytest.mark.parametrize(
    ("match", "scores", "labels", "ground_truths"),
    [
        (r"scores must lie in \[0, 1\]; got 1.5", [1.5], [0], []),
        (r"scores must lie in \[0, 1\]; got nan", [float("nan")], [0], []),
        (r"labels must lie in 0..1; got 2", [0.5], [2], []),
        (r"labels must lie in 0..1; got -1", [0.5], [-1], []),
        (r"ground_truth_labels must lie in 0..1; got 7", [0.5], [1], [1, 7]),
    ],
)
def test_bad_detections_change_nothing(match, scores, labels, ground_truths):
    statistics = ClassStatistics(("cat", "dog"))
    with pytest.raises(ValueError, match=match):
        statistics.observe_detections(
            torch.tensor(scores),
            torch.tensor(labels),
            torch.tensor([True]),
            torch.tensor(ground_truths, dtype=torch.int64),
        )
    assert statistics == ClassStatistics(("cat", "dog"))


def test_bad_label_counts():
    with pytest.raises(ValueError, match=r"counts must be \[3\], got \[2\]"):
        ClassStatistics(("cat", "dog")).add_labels(torch.tensor([1, 2]))


def test_tensors_of_every_kind_are_accepted_and_copied():
    positives = torch.tensor([3, 4], dtype=torch.uint8)
    statistics = ClassStatistics(("cat", "dog"), 10, positives)
    scores = torch.tensor([0.25, 0.5], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([0, 1], dtype=torch.int32)
    statistics.observe_detections(scores, labels, torch.tensor([1, 0]), labels[:1])
    statistics.add_labels(torch.tensor([1, 1, 1]))
    assert positives.tolist() == [3, 4]
    assert statistics.positives.tolist() == [4, 5]
    quarter, half = SCORE_BINS // 4, SCORE_BINS // 2
    assert np.argwhere(statistics.positive_scores).tolist() == [[0, quarter]]
    assert np.argwhere(statistics.negative_scores).tolist() == [[1, half]]
