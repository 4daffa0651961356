"""Prometheus metrics of the service.

Names and units follow Prometheus' conventions: `ghm_`, base units, `_total` for counters. Labels
have few values: routes are templates, models and classes are those of the cards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from time import time
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.core.detections import Detections, DetectorModel
from service.core.worker_files import WorkerFiles
from service.observability import logs, traces
from service.observability.drift import Counts, Monitor, live_shape

# Creation times would add half as many series again.
disable_created_metrics()  # type: ignore[no-untyped-call]

# In seconds, from a health check to a large image on a slow machine.
_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    30.0,
)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)

M = TypeVar("M", Counter, Histogram)


class Metrics:
    """Metrics of one process, and of all workers together when they are read.

    Args:
        files: Folder that workers share; None reads it from the environment.
    """

    def __init__(self, files: WorkerFiles | None = None) -> None:
        self._files = files or WorkerFiles.of_environment()
        self._registry = CollectorRegistry()
        self._series_of: dict[tuple[object, ...], object] = {}
        # The values of workers are read from their files.
        options: dict[str, Any] = {"registry": None if self._files else self._registry}
        self._requests = Histogram(
            "ghm_request_duration_seconds",
            "Time from a request's headers to the end of its answer.",
            ("route", "method", "status"),
            buckets=_SECONDS,
            **options,
        )
        self._stages = Histogram(
            "ghm_stage_duration_seconds",
            "Time of one stage of a request: read, decode, queue, inference, encode.",
            ("stage",),
            buckets=_SECONDS,
            **options,
        )
        self._rejected = Counter(
            "ghm_rejected_requests_total", "Requests refused, by reason.", ("reason",), **options
        )
        self._batches = Histogram(
            "ghm_batch_size_images", "Images per inference.", buckets=_BATCHES, **options
        )
        self._images = Counter(
            "ghm_images_total", "Images answered.", ("model", "version"), **options
        )
        self._detections = Counter(
            "ghm_detections_total", "Detections returned.", ("model", "version", "class"), **options
        )
        self._failures = Counter(
            "ghm_model_reload_failures_total",
            "Files that could not be loaded.",
            ("model",),
            **options,
        )
        options["multiprocess_mode"] = "livesum"
        self._waiting = Gauge("ghm_queue_depth_images", "Images admitted and waiting.", **options)
        self._running = Gauge("ghm_running_images", "Images in an inference.", **options)
        self._models = _Models(self._files)
        self._registry.register(self._models)
        if self._files:
            self._registry.register(self._files)
        else:
            ProcessCollector(registry=self._registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that has been answered.

        Args:
            route: Template of its route, never its path.
            method: HTTP method.
            status: Status of the answer.
            seconds: Time since its headers arrived.
        """
        self._series(self._requests, route, method, str(status)).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Record a stage of a request that has just ended.

        Args:
            stage: `read`, `decode`, `queue`, `inference` or `encode`.
            seconds: Its duration.
        """
        self._series(self._stages, stage).observe(seconds)
        traces.stage(stage, seconds)

    def _series(self, metric: M, *labels: str) -> M:
        """Return `metric.labels(*labels)`, without its lock and checks after the first time."""
        key = (metric, *labels)
        series = self._series_of.get(key)
        if series is None:
            series = self._series_of[key] = metric.labels(*labels)
        return cast(M, series)

    def rejected(self, reason: str) -> None:
        """Count a refused request: `queue_full`, `deadline`, `too_large` and so on."""
        self._rejected.labels(reason).inc()

    def batch(self, size: int) -> None:
        """Count an inference of so many images."""
        self._batches.observe(size)

    def queue(self, waiting: int, running: int) -> None:
        """Set the number of images that wait, and that are in an inference."""
        self._waiting.set(waiting)
        self._running.set(running)

    def detections(
        self, model: DetectorModel, detections: Sequence[Detections], *, as_shipped: bool = True
    ) -> None:
        """Count the detections of a request that has been answered.

        Args:
            model: The model that made them.
            detections: One entry per image.
            as_shipped: Whether the file's own thresholds and IoU were in force for every class.
                Others change the distribution of scores, so they do not count for drift.
        """
        labels = np.concatenate([np.zeros(0, np.int64), *(one.labels for one in detections)])
        logs.note(model=model.name, images=len(detections), detections=len(labels))
        self._series(self._images, model.name, model.version).inc(len(detections))
        for name, number in zip(model.card.class_names, np.bincount(labels).tolist(), strict=False):
            if number:
                self._series(self._detections, model.name, model.version, name).inc(number)
        monitor = self._models.monitor(model)
        if as_shipped and monitor and len(labels):
            monitor.observe(np.concatenate([one.scores for one in detections]), labels)

    def model_loaded(self, model: DetectorModel) -> None:
        """Add a model that is now served, in place of any other of this name and version."""
        self._models.add(model)
        for name in model.card.class_names:  # from 0, so that the first increase shows
            self._detections.labels(model.name, model.version, name)
        self._images.labels(model.name, model.version)

    def reload_failed(self, name: str) -> None:
        """Count a file that could not be loaded."""
        self._failures.labels(name).inc()

    def drift(self, model: DetectorModel) -> tuple[Monitor, Counts]:
        """Return the monitor of a served model, and the live counts of all workers."""
        monitor = self._models.monitor(model)
        if monitor is None:
            raise ValueError(f"model {model.name!r} has not begun to serve")
        return monitor, self._models.live(model, monitor)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text, and its content type.

        Args:
            accept: The `Accept` header, which may ask for OpenMetrics in place of Prometheus' text.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Models(Collector):
    """Metrics of the models themselves: their identity and drift.

    Holds weak references, so that replaced and removed models disappear.
    """

    def __init__(self, files: WorkerFiles | None) -> None:
        self._files = files
        self._served: WeakKeyDictionary[DetectorModel, tuple[Monitor, float]] = WeakKeyDictionary()

    def add(self, model: DetectorModel) -> None:
        live = self._files.own_counts(_key(model), live_shape(model.card)) if self._files else None
        self._served[model] = (Monitor(model.card, live), time())

    def monitor(self, model: DetectorModel) -> Monitor | None:
        """Return the monitor of this very model; None if it has never been served."""
        served = self._served.get(model)
        return served[0] if served else None

    def live(self, model: DetectorModel, monitor: Monitor) -> Counts:
        if self._files is None:
            return monitor.live
        return self._files.all_counts(_key(model), live_shape(model.card))

    def collect(self) -> Iterator[Metric]:
        of_model = ("model", "version")
        build = GaugeMetricFamily("ghm_build_info", "This package.", labels=("version",))
        build.add_metric((version("ghm-triton"),), 1)
        info = GaugeMetricFamily(
            "ghm_model_info", "The models served.", labels=(*of_model, "sha256", "policy")
        )
        loaded = GaugeMetricFamily(
            "ghm_model_loaded_timestamp_seconds",
            "Time at which a model came into use.",
            labels=of_model,
        )
        psi = GaugeMetricFamily(
            "ghm_drift_psi",
            "Population stability index of a class's live scores against held-out ones.",
            labels=(*of_model, "class"),
        )
        mix = GaugeMetricFamily(
            "ghm_drift_class_mix_psi",
            "Population stability index of how live detections spread over classes.",
            labels=of_model,
        )
        # A model that still answers a request gives way to its successor.
        newest = {(model.name, model.version): model for model in list(self._served)}
        for key, model in newest.items():
            monitor, since = self._served[model]
            info.add_metric((*key, model.sha256, model.card.threshold_policy), 1)
            loaded.add_metric(key, since)
            live = self.live(model, monitor)
            for one in monitor.classes(live):
                if one.scores.psi is not None:
                    psi.add_metric((*key, one.name), one.scores.psi)
            value = monitor.mix(live).psi
            if value is not None:
                mix.add_metric(key, value)
        yield from (build, info, loaded, psi, mix)


def _key(model: DetectorModel) -> str:
    """Return the name of a model's live counts in the folder that workers share."""
    name = f"{model.name}/{model.version}/{model.sha256}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]
