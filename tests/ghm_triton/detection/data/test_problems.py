import pickle

import pytest

from ghm_triton.detection.data.problems import (
    AnnotationProblem,
    DamagedAnnotationError,
    ProblemLog,
)


def log_of(count, policy):
    log = ProblemLog("voc:cells", policy)
    for i in range(count):
        log.report(f"file_{i}.xml", f"message {i}")
    return log


def test_skip_hands_the_problems_back():
    problems = log_of(2, "skip").settle()
    assert problems == [
        AnnotationProblem("file_0.xml", "message 0"),
        AnnotationProblem("file_1.xml", "message 1"),
    ]


def test_refuse_without_problems_is_fine():
    assert log_of(0, "refuse").settle() == []


def test_refuse_names_the_first_ten_and_the_total():
    with pytest.raises(DamagedAnnotationError) as caught:
        log_of(12, "refuse").settle()
    text = str(caught.value)
    assert "voc:cells: 12 problems" in text
    for i in range(10):
        assert f"file_{i}.xml: message {i}\n" in text
    assert "file_10.xml" not in text
    assert text.endswith("and 2 more")
    assert len(caught.value.problems) == 12


def test_exactly_ten_are_all_there_is():
    with pytest.raises(DamagedAnnotationError) as caught:
        log_of(10, "refuse").settle()
    assert "more" not in str(caught.value)


def test_unknown_policy():
    with pytest.raises(ValueError, match="ignore"):
        ProblemLog("voc:cells", "ignore")


def test_the_error_survives_a_worker_process():
    error = DamagedAnnotationError("voc:cells", [AnnotationProblem("a.xml", "is bad")])
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(copy) == str(error)
    assert copy.problems == error.problems
