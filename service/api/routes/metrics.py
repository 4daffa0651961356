"""What the service counts, and how far it has drifted."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.api.state import service_state
from service.core.errors import documented
from service.core.schema import ClassDriftAnswer, DriftAnswer, HistogramPair
from service.observability.drift import ClassDrift, Comparison

metrics_router = APIRouter(tags=["health"])
drift_router = APIRouter(prefix="/v1/models", tags=["models"])


OPENMETRICS = "application/openmetrics-text"


class MetricsResponse(Response):
    """Text for Prometheus."""

    media_type = "text/plain"


@metrics_router.get(
    "/metrics",
    summary="Counters for Prometheus",
    response_class=MetricsResponse,
    responses={200: {"content": {OPENMETRICS: {"schema": {"type": "string"}}}}, **documented(500)},
)
def metrics(request: Request) -> Response:
    """All that is counted, over all workers, as Prometheus' text or, if asked for, OpenMetrics."""
    accept = request.headers.get("accept", "")
    body, content_type = service_state(request).metrics.render(accept)
    return Response(body, headers={"Content-Type": content_type})


@drift_router.get(
    "/{name}/drift", summary="Compare today with training", responses=documented(404, 500, 503)
)
def drift(
    request: Request,
    name: str,
    version: Annotated[
        str | None, Query(description="Which version; the newest where not given", examples=["1"])
    ] = None,
) -> DriftAnswer:
    """How far the detections of late have moved from those on held-out images.

    For each class its scores, and how detections spread over classes, each as two histograms and
    their population stability index: below 0.1 `stable`, below 0.25 `moderate`, else `major`, and
    `unknown` while there are too few detections to tell. Only requests at the file's own
    thresholds and IoU count, and only scores at or above the threshold are compared. Older
    detections fade: a class is judged by about its last 1,000, the mix by about the last 10,000.
    """
    service = service_state(request)
    entry = service.registry.loaded(name, version)
    monitor, live = service.metrics.drift(entry.served)
    return DriftAnswer(
        model=entry.served.name,
        version=entry.served.version,
        sha256=entry.served.sha256,
        class_names=entry.served.card.class_names,
        mix=_pair(monitor.mix(live)),
        classes=[_class(one) for one in monitor.classes(live)],
    )


def _pair(found: Comparison) -> HistogramPair:
    return HistogramPair(
        drift=found.word,
        psi=found.psi,
        psi_by_chance=found.psi_by_chance,
        held_out=found.held_out,
        live=[round(count, 3) for count in found.live],
    )


def _class(one: ClassDrift) -> ClassDriftAnswer:
    return ClassDriftAnswer.model_validate(
        {
            "class": one.name,
            "threshold": one.threshold,
            "edges": one.edges,
            "scores": _pair(one.scores),
        }
    )
