"""Whether the process lives, and whether it can answer."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.problems import documented
from service.schemas import Health
from service.state import service_state

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", summary="Whether the process lives")
async def live() -> Health:
    """Answers as long as the process does. Restart it when this fails."""
    return Health(status="alive")


@router.get("/ready", summary="Whether requests can be answered", responses=documented(503))
async def ready(request: Request) -> Health:
    """Answers 200 once the model is loaded and has run; send no requests before."""
    service_state(request).ready_model()
    return Health(status="ready")
