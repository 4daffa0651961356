"""The application: `create_app` puts the parts together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from export.file import read_detector
from service.api import openapi
from service.api.routes import detect, health, metrics, models, page, preview
from service.api.state import ServiceState
from service.core import errors as problems
from service.core.settings import Settings, load_settings
from service.engine.session import ServedModel
from service.http import direct
from service.http import middleware as chain
from service.v2 import routes as v2

_DESCRIPTION = """Object detection with a threshold of its own for each class.

The thresholds come from training statistics and travel inside the model file. Every detection
names the one that it passed.
"""


def load_model(settings: Settings) -> ServedModel:
    """Read and load the one detector that the settings name, without running it.

    Raises:
        CardError: The file does not keep the contract.
        ModelError: The runtime cannot load it, or not on the provider asked for.
        OSError: The file cannot be read.
        SettingsError: No model is named.
    """
    file = read_detector(settings.source)
    return ServedModel(file, provider=settings.provider, threads=settings.threads)


def create_app(settings: Settings | None = None, model: ServedModel | None = None) -> FastAPI:
    """Make the application.

    Args:
        settings: What the service is told; read from `GHM_*` where None, so that
            `uvicorn --factory service.app:create_app` works.
        model: A loaded model; where None, the start loads what the settings name.

    Returns:
        The application. Its start fails if no model can be loaded; a model is ready once it has
        answered a warm-up image.

    Raises:
        SettingsError: The environment has a value that is no setting, or one that cannot be used.
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
            if app.state.tracing is not None:  # sends what is left
                await asyncio.to_thread(app.state.tracing.shutdown)

    app = FastAPI(
        title="ghm-triton",
        version=version("ghm-triton"),
        description=_DESCRIPTION,
        lifespan=lifespan,
    )
    app.state.service = service
    direct.install(app, detect.router, preview.router)
    chain.install(app, service.settings, service.metrics)
    problems.install(app)
    openapi.install(app, service.settings)
    for part in (detect, models, health, page, preview, v2):
        app.include_router(part.router)
    app.include_router(metrics.drift_router)
    if service.settings.metrics:
        app.include_router(metrics.metrics_router)
    return app
