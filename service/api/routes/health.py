"""Whether the process lives, and whether it can answer."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.state import service_state
from service.core.errors import ProblemError, documented
from service.core.schema import Health, ModelHealth, Readiness

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", summary="Whether the process lives")
async def live() -> Health:
    """Answers as long as the process does. Restart it when this fails."""
    return Health(status="alive")


@router.get("/ready", summary="Whether requests can be answered", responses=documented(503))
async def ready(request: Request) -> Readiness:
    """Answers 200 once models are loaded and have run; send no requests before.

    Where several are served, those that serve count; `problems` names files that do not serve as
    they are. Answers 503 again when the service is about to stop.
    """
    service = service_state(request)
    if service.draining:
        raise ProblemError(503, "not ready: the service is stopping", {"Retry-After": "1"})
    entries = service.registry.check_ready()
    models = [
        ModelHealth(name=e.name, version=e.version, ready=e.ready, problem=e.problem)
        for e in entries
    ]
    return Readiness(status="ready", models=models, problems=service.registry.problems())
