"""What is served: names, digests, thresholds, and the whole card."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.problems import ProblemError, documented, short
from service.schemas import ModelDetail, ModelList, ModelSummary
from service.state import service_state

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List the models", responses=documented(500, 503))
async def list_models(request: Request) -> ModelList:
    """Each model with its classes and their thresholds."""
    model = service_state(request).loaded_model()
    summary = ModelSummary(
        name=model.card.name,
        sha256=model.sha256,
        class_names=model.card.class_names,
        thresholds={entry.name: entry.threshold for entry in model.card.thresholds},
        threshold_policy=model.card.threshold_policy,
    )
    return ModelList(models=[summary])


@router.get("/{name}", summary="Show a model's card", responses=documented(404, 500, 503))
async def show_model(request: Request, name: str) -> ModelDetail:
    """All that the file says of itself.

    Thresholds and the evidence behind each, what training counted, how images are prepared, and
    what the weights come from.
    """
    model = service_state(request).loaded_model()
    if name != model.card.name:
        raise ProblemError(404, f"no model {short(name)}; there is {model.card.name!r}")
    return ModelDetail(
        name=model.card.name,
        sha256=model.sha256,
        providers=model.providers,
        threshold_policy=model.card.threshold_policy,
        card=model.card,
    )
