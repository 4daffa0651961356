import gc
import weakref

import pytest

from export.file import read_detector
from service.engine.session import ServedModel
from service.v2.schemas import ModelStatistics as Shown
from service.v2.statistics import ModelStatistics, statistics_of


def counts(statistics: ModelStatistics) -> dict[str, int]:
    return {name: part.count for name, part in statistics.parts.items() if part.count}


def test_success_and_failure_are_told_apart(model):
    statistics = ModelStatistics()
    assert Shown.model_validate(statistics.to_dict(model)).last_inference == 0
    with statistics.request(), statistics.part("compute_input"):
        pass
    assert counts(statistics) == {"success": 1, "compute_input": 1}
    with pytest.raises(ValueError, match="no"), statistics.request():
        raise ValueError("no")
    assert counts(statistics) == {"success": 1, "compute_input": 1, "fail": 1}
    shown = Shown.model_validate(statistics.to_dict(model))
    assert shown.execution_count == 1
    assert shown.last_inference > 1.7e12  # milliseconds since 1970, and not seconds
    success, part = shown.inference_stats.success, shown.inference_stats.compute_input
    assert success.ns >= part.ns > 0


def test_a_part_that_fails_does_not_count():
    statistics = ModelStatistics()
    with pytest.raises(ValueError, match="no"), statistics.part("compute_infer"):
        raise ValueError("no")
    assert counts(statistics) == {}


def test_counts_belong_to_a_model_and_go_with_it(detector):
    first = ServedModel(read_detector(detector), provider="cpu")
    second = ServedModel(read_detector(detector), provider="cpu")
    statistics_of(first).images = 5
    assert statistics_of(first).images == 5
    assert statistics_of(second).images == 0
    gone = weakref.ref(statistics_of(first))
    del first
    gc.collect()
    assert gone() is None
