"""The application factory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from export.file import read_detector
from service.api import openapi
from service.api.routes import detect, health, models, page
from service.api.state import ServiceState
from service.core import errors
from service.core.settings import Settings, load_settings
from service.engine.session import ServedModel
from service.http.middleware import build_middleware
from service.observability import traces
from service.v2 import routes as v2

_DESCRIPTION = """Object detection with a threshold per class.

The thresholds come from training statistics and are part of the model file. Every detection has
the threshold that it passed.
"""


def load_model(settings: Settings) -> ServedModel:
    """Load the one detector that the settings name, without running it.

    Raises:
        CardError: The file does not keep the contract.
        ModelError: The runtime cannot load it, or not on the provider asked for.
        OSError: The file cannot be read.
        SettingsError: No model is named.
    """
    file = read_detector(settings.source)
    return ServedModel(file, provider=settings.provider, threads=settings.threads)


def create_app(settings: Settings | None = None, model: ServedModel | None = None) -> FastAPI:
    """Create the application.

    Args:
        settings: The settings; None reads `GHM_*`, so that
            `uvicorn --factory service.app:create_app` works.
        model: A loaded model; None loads what the settings name at the start.

    Returns:
        The application. Its start fails if no model can be loaded; a model is ready once it has
        answered a warm-up image.

    Raises:
        SettingsError: A setting is malformed or cannot be used.
    """
    service = ServiceState(load_settings() if settings is None else settings)
    if model is not None:
        service.registry.adopt(model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()
            if app.state.tracing is not None:  # sends the remaining spans
                await asyncio.to_thread(app.state.tracing.shutdown)

    app = FastAPI(
        title="ghm-triton",
        version=version("ghm-triton"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        root_path=service.settings.root_path,
        docs_url=None,  # FastAPI's pages load scripts of other hosts
        redoc_url=None,
        redirect_slashes=False,  # the redirect would lead to whatever `Host` the client sent
        middleware=build_middleware(service.settings, service.metrics),
        routes=detect.first_routes(),
    )
    app.state.service = service
    app.state.tracing = traces.instrument(app)
    errors.install(app)
    openapi.install(app, service.settings)
    for part in (detect, models, health, page, v2):
        app.include_router(part.router)
    if service.settings.metrics:
        app.include_router(health.metrics_router)
    return app
