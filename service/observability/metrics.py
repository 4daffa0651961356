"""What the service counts, for Prometheus.

Names and units follow its conventions: `ghm_`, base units, `_total` for counters. Labels take
values from short lists only: routes by their templates, models and classes by their cards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from time import time
from typing import TypeVar, cast
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
from service.observability import logs
from service.observability import traces as telemetry
from service.observability.drift import Counts, Monitor, live_shape

# When each series began: half as many series again, and nobody reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

# From a check of health to a large image on a slow machine, in seconds.
_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    30.0,
)
M = TypeVar("M", Counter, Histogram)

_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one process, and of all workers together when they are read.

    Args:
        files: What workers share; from the environment where None.
    """

    def __init__(self, files: WorkerFiles | None = None) -> None:
        self._files = files or WorkerFiles.of_environment()
        self._registry = CollectorRegistry()
        registry = None if self._files else self._registry  # workers' are read from their files
        self._known: dict[tuple[object, ...], object] = {}
        self._requests = Histogram(
            "ghm_request_duration_seconds",
            "Time from a request's headers to the end of its answer.",
            ("route", "method", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "ghm_stage_duration_seconds",
            "Time of one stage of a request: read, decode, queue, inference, encode.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._rejected = Counter(
            "ghm_rejected_requests_total",
            "Requests that were refused, by reason.",
            ("reason",),
            registry=registry,
        )
        self._batches = Histogram(
            "ghm_batch_size_images",
            "Images of one inference.",
            buckets=_BATCHES,
            registry=registry,
        )
        self._waiting = Gauge(
            "ghm_queue_depth_images",
            "Images that were let in and wait.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._running = Gauge(
            "ghm_running_images",
            "Images in an inference right now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._images = Counter(
            "ghm_images_total", "Images answered.", ("model", "version"), registry=registry
        )
        self._detections = Counter(
            "ghm_detections_total",
            "Detections answered.",
            ("model", "version", "class"),
            registry=registry,
        )
        self._failures = Counter(
            "ghm_model_reload_failures_total",
            "Files that could not be loaded.",
            ("model",),
            registry=registry,
        )
        self._models = _Models(self._files)
        self._registry.register(self._models)
        if self._files:
            self._registry.register(_Workers(self._files))
        else:
            ProcessCollector(registry=self._registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has been answered.

        Args:
            route: The template of its route, never its path.
            method: One of HTTP's.
            status: Of the answer.
            seconds: Since its headers came.
        """
        self._series(self._requests, route, method, str(status)).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """A stage of a request has just ended.

        Args:
            stage: `read`, `decode`, `queue`, `inference` or `encode`.
            seconds: How long it took.
        """
        self._series(self._stages, stage).observe(seconds)
        telemetry.stage(stage, seconds)

    def _series(self, metric: M, *labels: str) -> M:
        """One series of a metric: what `labels` returns, without its lock and its checks."""
        key = (metric, *labels)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = metric.labels(*labels)
        return cast(M, found)

    def rejected(self, reason: str) -> None:
        """A request has been refused: `queue_full`, `deadline`, `too_large` and the like."""
        self._rejected.labels(reason).inc()

    def batch(self, size: int) -> None:
        """An inference of so many images has run."""
        self._batches.observe(size)

    def queue(self, waiting: int, running: int) -> None:
        """So many images wait, and so many are in an inference."""
        self._waiting.set(waiting)
        self._running.set(running)

    def detections(
        self, model: DetectorModel, found: Sequence[Detections], *, as_shipped: bool = True
    ) -> None:
        """A request has been answered with these detections, an entry an image.

        Args:
            model: Who found them.
            found: An entry an image.
            as_shipped: Whether the file's own thresholds and IoU were in force, for every class.
                Others bend the distribution of scores, so they are counted but not compared.
        """
        labels = np.concatenate([one.labels for one in found]) if found else np.zeros(0, np.int64)
        logs.note(model=model.name, images=len(found), detections=len(labels))
        self._series(self._images, model.name, model.version).inc(len(found))
        for name, number in zip(model.card.class_names, np.bincount(labels).tolist(), strict=False):
            if number:
                self._series(self._detections, model.name, model.version, name).inc(number)
        monitor = self._models.monitor(model)
        if as_shipped and monitor and len(labels):
            monitor.observe(np.concatenate([one.scores for one in found]), labels)

    def model_loaded(self, model: DetectorModel) -> None:
        """A model has begun to serve, in place of its predecessor of the same name and version."""
        self._models.add(model)
        for name in model.card.class_names:  # from 0, so that a first increase shows
            self._detections.labels(model.name, model.version, name)
        self._images.labels(model.name, model.version)

    def reload_failed(self, name: str) -> None:
        """A file could not be loaded; the old model, where there is one, goes on."""
        self._failures.labels(name).inc()

    def drift(self, model: DetectorModel) -> tuple[Monitor, Counts]:
        """The monitor of a model that serves, and the live counts of all workers."""
        monitor = self._models.monitor(model)
        if monitor is None:
            raise ValueError(f"model {model.name!r} has not begun to serve")
        return monitor, self._models.live(model, monitor)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All of it, and its content type.

        Args:
            accept: The `Accept` header: OpenMetrics for those who ask, else Prometheus' text.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Workers(Collector):
    """The sums over all workers."""

    def __init__(self, files: WorkerFiles) -> None:
        self._files = files

    def collect(self) -> Iterator[Metric]:
        yield from self._files.collect()


class _Models(Collector):
    """What is known of the models themselves: which they are, and how far they have drifted.

    Remembers models only as long as somebody else holds them: what was replaced or removed is
    gone from here too.
    """

    def __init__(self, files: WorkerFiles | None) -> None:
        self._files = files
        self._served: WeakKeyDictionary[DetectorModel, tuple[Monitor, float]] = WeakKeyDictionary()

    def add(self, model: DetectorModel) -> None:
        live = self._files.own_counts(_key(model), live_shape(model.card)) if self._files else None
        self._served[model] = (Monitor(model.card, live), time())

    def monitor(self, model: DetectorModel) -> Monitor | None:
        """The monitor of exactly this model; None for one that never began to serve."""
        served = self._served.get(model)
        return served[0] if served else None

    def live(self, model: DetectorModel, monitor: Monitor) -> Counts:
        if self._files is None:
            return monitor.live
        return self._files.all_counts(_key(model), live_shape(model.card))

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("ghm_build_info", "This package.", labels=("version",))
        build.add_metric((version("ghm-triton"),), 1)
        info = GaugeMetricFamily(
            "ghm_model_info",
            "The models that serve.",
            labels=("model", "version", "sha256", "policy"),
        )
        loaded = GaugeMetricFamily(
            "ghm_model_loaded_timestamp_seconds",
            "When a model began to serve.",
            labels=("model", "version"),
        )
        psi = GaugeMetricFamily(
            "ghm_drift_psi",
            "Population stability index of a class's live scores against held-out ones.",
            labels=("model", "version", "class"),
        )
        mix = GaugeMetricFamily(
            "ghm_drift_class_mix_psi",
            "Population stability index of how live detections spread over classes.",
            labels=("model", "version"),
        )
        # A predecessor that still answers somebody gives way to the model that came after it.
        newest = {(model.name, model.version): model for model in list(self._served)}
        for (name, number), model in newest.items():
            monitor, since = self._served[model]
            info.add_metric((name, number, model.sha256, model.card.threshold_policy), 1)
            loaded.add_metric((name, number), since)
            live = self.live(model, monitor)
            for one in monitor.classes(live):
                if one.scores.psi is not None:
                    psi.add_metric((name, number, one.name), one.scores.psi)
            value = monitor.mix(live).psi
            if value is not None:
                mix.add_metric((name, number), value)
        yield from (build, info, loaded, psi, mix)


def _key(model: DetectorModel) -> str:
    """Names a model's live counts in the folder that workers share."""
    name = f"{model.name}/{model.version}/{model.sha256}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]
