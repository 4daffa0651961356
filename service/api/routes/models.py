"""What is served: names, digests, thresholds, and the whole card; and reading a file again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.state import service_state
from service.core.errors import ProblemError, documented
from service.core.schema import ModelDetail, ModelList, ModelSummary
from service.engine.repository import Entry

router = APIRouter(prefix="/v1/models", tags=["models"])

Version = Annotated[
    str | None, Query(description="Which version; the newest where not given", examples=["1"])
]


@router.get("", summary="List the models", responses=documented(500, 503))
async def list_models(request: Request) -> ModelList:
    """Each version of each model, with its classes and their thresholds."""
    registry = service_state(request).registry
    loaded = [entry for entry in registry.entries() if entry.model]
    if not loaded:
        registry.loaded()  # says why not
    return ModelList(models=[_summary(entry) for entry in loaded])


@router.get("/{name}", summary="Show a model's card", responses=documented(404, 500, 503))
async def show_model(request: Request, name: str, version: Version = None) -> ModelDetail:
    """All that the file says of itself.

    Thresholds and the evidence behind each, what training counted, how images are prepared, and
    what the weights come from.
    """
    entry = service_state(request).registry.loaded(name, version)
    model = entry.served
    return ModelDetail(
        name=model.name,
        version=model.version,
        sha256=model.sha256,
        loaded_at=entry.loaded_at,
        problem=entry.problem,
        providers=model.providers,
        threshold_policy=model.card.threshold_policy,
        card=model.card,
    )


@router.post(
    "/{name}/reload",
    summary="Read a model's file again",
    responses=documented(404, 409, 500),
)
async def reload_model(request: Request, name: str) -> ModelList:
    """Replace a model by what its file holds now, every version of it.

    Requests that have begun end with the model they began with. A file that cannot be served
    changes nothing: the answer is 409 and says why. Other workers
    follow within `GHM_RELOAD_SECONDS`.
    """
    entries = await service_state(request).registry.reload(name)
    problems = [f"{entry.path.name}: {entry.problem}" for entry in entries if entry.problem]
    if problems:
        raise ProblemError(409, "; ".join(problems))
    return ModelList(models=[_summary(entry) for entry in entries])


def _summary(entry: Entry) -> ModelSummary:
    model = entry.served
    return ModelSummary(
        name=model.name,
        version=model.version,
        sha256=model.sha256,
        loaded_at=entry.loaded_at,
        problem=entry.problem,
        class_names=model.card.class_names,
        thresholds={one.name: one.threshold for one in model.card.thresholds},
        threshold_policy=model.card.threshold_policy,
    )
