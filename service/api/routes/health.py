"""Liveness, readiness, and counters for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api.openapi import problems
from service.api.state import service_state
from service.core.schema import Health, ModelHealth, Readiness

router = APIRouter(prefix="/health", tags=["health"])
metrics_router = APIRouter(tags=["health"])

OPENMETRICS = "application/openmetrics-text"


@router.get("/live", summary="Whether the process is alive")
async def live() -> Health:
    """Answers as long as the process does. Restart it when this fails."""
    return Health(status="alive")


@router.get("/ready", summary="Whether requests can be answered", responses=problems(503))
async def ready(request: Request) -> Readiness:
    """Answers 200 once the models are loaded and have run; send no requests before.

    Where several are served, one that serves is enough; `problems` names files that do not serve
    as they are. Answers 503 again when the service is about to stop.
    """
    service = service_state(request)
    models = [
        ModelHealth(name=e.name, version=e.version, ready=e.ready, problem=e.problem)
        for e in service.check_ready()
    ]
    return Readiness(status="ready", models=models, problems=service.registry.problems())


class MetricsResponse(Response):
    """Text for Prometheus."""

    media_type = "text/plain"


@metrics_router.get(
    "/metrics",
    summary="Counters for Prometheus",
    response_class=MetricsResponse,
    responses={200: {"content": {OPENMETRICS: {"schema": {"type": "string"}}}}, **problems(500)},
)
def metrics(request: Request) -> Response:
    """Counters over all workers, as Prometheus' text or, where `Accept` asks, as OpenMetrics."""
    accept = request.headers.get("accept", "")
    body, content_type = service_state(request).metrics.render(accept)
    return Response(body, headers={"Content-Type": content_type})
