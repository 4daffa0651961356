import gc
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.file import read_detector
from service.core.detections import Detections
from service.core.worker_files import WorkerFiles
from service.engine.session import ServedModel
from service.observability.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def read(metrics: Metrics) -> dict[str, float]:
    """Every sample, as `name{a=1,b=2}`."""
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {
        one.name
        + "{"
        + ",".join(f"{k}={one.labels[k]}" for k in sorted(one.labels))
        + "}": one.value
        for family in families
        for one in family.samples
    }


def found(*labels: int, score: float = 0.9) -> Detections:
    size = len(labels)
    scores = np.full(size, score, np.float32)
    return Detections(np.zeros((size, 4), np.float32), scores, np.array(labels, np.int64))


@pytest.fixture
def fresh(detector):
    """Another model object from the same file."""

    def make(**changes) -> ServedModel:
        return ServedModel(read_detector(detector), provider="cpu", **changes)

    return make


def test_every_observation_is_counted(metrics):
    metrics.request("/v1/detect", "POST", 200, 0.004)
    metrics.stage("decode", 0.3)
    metrics.rejected("queue_full")
    metrics.batch(3)
    metrics.queue(5, 2)
    metrics.reload_failed("pets")
    request = "method=POST,route=/v1/detect,status=200"
    expected = {
        f"ghm_request_duration_seconds_count{{{request}}}": 1,
        f"ghm_request_duration_seconds_sum{{{request}}}": 0.004,
        f"ghm_request_duration_seconds_bucket{{le=0.0025,{request}}}": 0,
        f"ghm_request_duration_seconds_bucket{{le=0.005,{request}}}": 1,
        "ghm_stage_duration_seconds_bucket{le=0.25,stage=decode}": 0,
        "ghm_stage_duration_seconds_sum{stage=decode}": 0.3,
        "ghm_rejected_requests_total{reason=queue_full}": 1,
        "ghm_batch_size_images_bucket{le=2.0}": 0,
        "ghm_batch_size_images_bucket{le=4.0}": 1,
        "ghm_queue_depth_images{}": 5,
        "ghm_running_images{}": 2,
        "ghm_model_reload_failures_total{model=pets}": 1,
        "ghm_build_info{version=0.1.0}": 1,
    }
    values = read(metrics)
    assert {name: values[name] for name in expected} == expected
    assert values["process_resident_memory_bytes{}"] > 10e6


def test_detections_by_class_from_zero(metrics, model):
    metrics.model_loaded(model)
    values = read(metrics)
    name = "ghm_detections_total{class=%s,model=colours,version=1}"
    assert [values[name % colour] for colour in ("red", "green", "blue")] == [0, 0, 0]
    metrics.detections(model, [found(0, 2, 2), found(), found(2)])
    values = read(metrics)
    assert [values[name % colour] for colour in ("red", "green", "blue")] == [1, 0, 3]
    assert values["ghm_images_total{model=colours,version=1}"] == 3
    metrics.detections(model, [])
    assert read(metrics)["ghm_images_total{model=colours,version=1}"] == 3


def test_a_model_by_its_digest_and_policy(metrics, model):
    metrics.model_loaded(model)
    values = read(metrics)
    labels = f"model=colours,policy=f1,sha256={model.sha256},version=1"
    assert values["ghm_model_info{" + labels + "}"] == 1
    loaded = values["ghm_model_loaded_timestamp_seconds{model=colours,version=1}"]
    assert loaded > 1.7e9  # seconds since 1970


def infos(metrics: Metrics) -> list[str]:
    return [name for name in read(metrics) if name.startswith("ghm_model_info")]


def test_a_replaced_model_is_gone(metrics, fresh, judged):
    old, new = fresh(), fresh()
    metrics.model_loaded(old)
    metrics.model_loaded(new)
    assert len(infos(metrics)) == 1  # also while the old one still answers a request
    metrics.detections(old, [found(0)] * 3)
    assert metrics.drift(new)[1].sum() == 0
    metrics.model_loaded(judged)  # of the same name, from another file
    assert [judged.sha256 in info for info in infos(metrics)] == [True]


def test_versions_of_a_model_are_side_by_side(metrics, fresh):
    models = [fresh(version=version) for version in ("1", "2")]
    for model in models:
        metrics.model_loaded(model)
    metrics.detections(models[1], [found(0)])
    assert len(infos(metrics)) == 2
    values = read(metrics)
    assert values["ghm_detections_total{class=red,model=colours,version=1}"] == 0
    assert values["ghm_detections_total{class=red,model=colours,version=2}"] == 1
    del model, models
    gc.collect()
    assert infos(metrics) == []


def test_a_model_that_never_served_has_no_drift(metrics, fresh):
    model = fresh()
    metrics.detections(model, [found(0)])  # counted all the same
    with pytest.raises(ValueError, match="'colours' has not begun to serve"):
        metrics.drift(model)


@pytest.fixture
def judged(write_detector, card):
    """A model with 1,000 held-out detections of each class."""
    scores = [[0] * 100 + [10] * 100] * 3
    held_out = {"positive_scores": scores, "negative_scores": [[0] * 200] * 3}
    statistics = replace(card.statistics, **held_out)
    return ServedModel(read_detector(write_detector(statistics=statistics)), provider="cpu")


def test_drift_shows_once_there_is_enough(metrics, judged):
    metrics.model_loaded(judged)
    assert not [name for name in read(metrics) if name.startswith("ghm_drift")]
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores = np.sort(rng.uniform(0.7, 1, 3).astype(np.float32))[::-1]
        one = Detections(np.zeros((3, 4), np.float32), scores, rng.permutation(3))
        metrics.detections(judged, [one])
    values = read(metrics)
    # Class 2's threshold is 0.7, so nothing has changed there; red's is 0.5, and all are above 0.7.
    assert values["ghm_drift_psi{class=blue,model=colours,version=1}"] < 0.1
    assert values["ghm_drift_psi{class=red,model=colours,version=1}"] > 0.25
    assert values["ghm_drift_class_mix_psi{model=colours,version=1}"] < 0.1


def test_requests_with_thresholds_of_their_own_are_counted_and_not_compared(metrics, judged):
    metrics.model_loaded(judged)
    metrics.detections(judged, [found(0, 1)], as_shipped=False)
    assert read(metrics)["ghm_detections_total{class=red,model=colours,version=1}"] == 1
    assert metrics.drift(judged)[1].sum() == 0
    metrics.detections(judged, [found(0, 1)])
    assert metrics.drift(judged)[1].sum() == 4  # a class's own bin and its part of the mix


def test_prometheus_text_and_openmetrics(metrics):
    metrics.rejected("deadline")
    text, kind = metrics.render("")
    assert kind.startswith("text/plain; version=0.0.4")
    assert b"# TYPE ghm_rejected_requests_total counter" in text
    text, kind = metrics.render("application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert b"# TYPE ghm_rejected_requests counter" in text
    assert text.endswith(b"# EOF\n")
    assert b"_created" not in text


def test_every_name_keeps_prometheus_conventions(metrics, judged):
    metrics.model_loaded(judged)
    families = list(text_string_to_metric_families(metrics.render()[0].decode()))
    own = [one for one in families if one.name.startswith("ghm_")]
    assert len(own) >= 11
    for family in own:
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_images"))
        assert not family.name.endswith(("_ms", "_milliseconds", "_count"))


def test_workers_live_counts_are_summed(judged, tmp_path):
    files = WorkerFiles(tmp_path)
    metrics = Metrics(files)
    metrics.model_loaded(judged)
    metrics.detections(judged, [found(0, 1)])
    (own,) = tmp_path.glob("live-*.f64")
    other = own.with_name(own.name.rpartition("-")[0] + "-1.f64")
    other.write_bytes(own.read_bytes())
    monitor, live = metrics.drift(judged)
    assert monitor.live.sum() == 4
    assert live.sum() == 8


def test_one_file_under_two_names_has_counts_for_each(fresh, tmp_path):
    metrics = Metrics(WorkerFiles(tmp_path))
    models = [fresh(version=version) for version in ("1", "2")]
    for model in models:
        metrics.model_loaded(model)
    metrics.detections(models[0], [found(0, 1)])
    assert [metrics.drift(model)[1].sum() > 0 for model in models] == [True, False]
