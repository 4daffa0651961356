"""`GET /metrics`: counters for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api.openapi import problems
from service.api.state import service_state

router = APIRouter(tags=["health"])

OPENMETRICS = "application/openmetrics-text"


class MetricsResponse(Response):
    """Text for Prometheus."""

    media_type = "text/plain"


@router.get(
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
