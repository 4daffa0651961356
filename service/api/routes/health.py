"""Liveness and readiness."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.api.openapi import problems
from service.api.state import service_state
from service.core.schema import Health, ModelHealth, Readiness

router = APIRouter(prefix="/health", tags=["health"])


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
