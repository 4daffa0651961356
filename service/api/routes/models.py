"""The models: names, thresholds, cards, drift from training, and reloading."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from service.api.openapi import problems
from service.api.state import MODEL, service_state
from service.core.schema import (
    ClassDriftAnswer,
    DriftAnswer,
    HistogramPair,
    ModelDetail,
    ModelList,
    ModelSummary,
)
from service.engine.repository import Entry
from service.observability.drift import Comparison

router = APIRouter(prefix="/v1/models", tags=["models"])

Version = Annotated[
    str | None, Query(description="The version; the newest where left out", examples=["1"])
]


@router.get("", summary="List the models", responses=problems(500, 503))
async def list_models(request: Request) -> ModelList:
    """Each version of each model, with its classes and their thresholds."""
    registry = service_state(request).registry
    loaded = [entry for entry in registry.entries() if entry.model]
    if not loaded:
        registry.loaded()  # raises a 503 with the reason
    return ModelList(models=[_summary(entry) for entry in loaded])


@router.post(
    f"/{MODEL}/reload", summary="Read a model's file again", responses=problems(403, 404, 409, 500)
)
async def reload_model(request: Request, name: str) -> ModelList:
    """Replace every version of a model by what its file holds now.

    Requests that have begun end with the model they began with. A file that cannot be served
    changes nothing: the answer is 409 with the reason. Other workers follow within
    `GHM_RELOAD_SECONDS`.
    """
    entries = await service_state(request).reload(name)
    return ModelList(models=[_summary(entry) for entry in entries])


def _summary(entry: Entry) -> ModelSummary:
    card = entry.served.card
    thresholds = {one.name: one.threshold for one in card.thresholds}
    return ModelSummary(**_identity(entry), class_names=card.class_names, thresholds=thresholds)


def _identity(entry: Entry) -> dict[str, Any]:
    model = entry.served
    return {
        "name": model.name,
        "version": model.version,
        "sha256": model.sha256,
        "loaded_at": entry.loaded_at,
        "problem": entry.problem,
        "threshold_policy": model.card.threshold_policy,
    }


@router.get(
    f"/{MODEL}/drift", summary="Compare today with training", responses=problems(404, 500, 503)
)
def drift(request: Request, name: str, version: Version = None) -> DriftAnswer:
    """How far recent detections have moved from those on held-out images.

    Per class its scores, and over classes the number of detections, each as two histograms and
    their population stability index: below 0.1 `stable`, below 0.25 `moderate`, else `major`, and
    `unknown` while there are too few detections. Only requests at the file's own thresholds and
    IoU count, and only scores at or above the threshold are compared. Older detections fade: a
    class is judged by about its last 1,000, the mix of classes by about the last 10,000.
    """
    service = service_state(request)
    model = service.registry.loaded(name, version).served
    monitor, live = service.metrics.drift(model)
    return DriftAnswer(
        model=model.name,
        version=model.version,
        sha256=model.sha256,
        class_names=model.card.class_names,
        mix=_histograms(monitor.mix(live)),
        classes=[
            ClassDriftAnswer(
                class_name=one.name,
                threshold=one.threshold,
                edges=one.edges,
                scores=_histograms(one.scores),
            )
            for one in monitor.classes(live)
        ],
    )


@router.get(f"/{MODEL}", summary="Show a model's card", responses=problems(404, 500, 503))
async def show_model(request: Request, name: str, version: Version = None) -> ModelDetail:
    """The whole content of the card.

    Thresholds and the evidence behind each, training statistics, preprocessing, and the origin of
    the weights.
    """
    entry = service_state(request).registry.loaded(name, version)
    model = entry.served
    return ModelDetail(**_identity(entry), providers=model.providers, card=model.card)


def _histograms(comparison: Comparison) -> HistogramPair:
    return HistogramPair(
        drift=comparison.word,
        psi=comparison.psi,
        psi_by_chance=comparison.psi_by_chance,
        held_out=comparison.held_out,
        live=[round(count, 3) for count in comparison.live],
    )
