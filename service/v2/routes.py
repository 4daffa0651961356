"""The Open Inference Protocol, for existing clients: Triton Inference Server's and KServe's.

Supported extensions are binary tensors, model configuration, statistics, and the repository's
index and load. Routes of the others answer 404 with the reason.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel

from service.api.openapi import problems
from service.api.state import MODEL, service_state
from service.core.errors import ProblemError, short
from service.engine.repository import Entry
from service.engine.session import ServedModel
from service.http.bodies import read_body
from service.v2 import inference, schemas
from service.v2.codec import HEADER, parse_json
from service.v2.signature import config, metadata
from service.v2.statistics import statistics_of
from service.v2.tensors import malformed

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]

# Requests to the repository are a line or two.
_MOST_QUERY_BYTES = 64 * 1024

Name = Annotated[str, Path(description="A model's name", examples=["pets"])]
Version = Annotated[str, Path(description="One of its versions", examples=["1"])]
Handler = Callable[[Request, str, str | None], Awaitable[Response]]
Query = TypeVar("Query", bound=BaseModel)

_BYTES = {"schema": {"type": "string", "format": "binary"}}
_LENGTH = {
    "description": "Bytes of JSON at the start of the body; the bytes of tensors follow."
    " 0: the body is images alone",
    "schema": {"type": "integer", "minimum": 0},
}


def _json_body(kind: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schemas.inlined(kind)}}}


_REQUEST = {
    "parameters": [{"name": HEADER, "in": "header", "required": False, **_LENGTH}],
    "requestBody": {
        "required": True,
        "content": {
            **_json_body(schemas.InferenceRequest)["content"],
            "application/octet-stream": _BYTES,
        },
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/octet-stream": _BYTES},
        "headers": {HEADER: _LENGTH},
        "description": "The outputs: JSON, followed by bytes where any was asked for as bytes",
    },
    **problems(400, 404, 408, 413, 415, 429, 500, 503, 504),
}


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _model_route(
    method: str, suffix: str, summary: str, answer: type[BaseModel], **options: Any
) -> Callable[..., Handler]:
    """Register a handler twice: for a model's newest version, and for a named one."""
    options.setdefault("responses", problems(404, 500, 503))

    def register(handler: Handler) -> Handler:
        async def newest(request: Request, name: Name) -> Response:
            return await handler(request, name, None)

        async def one_version(request: Request, name: Name, version: Version) -> Response:
            return await handler(request, name, version)

        for path, endpoint in (("/versions/{version}", one_version), ("", newest)):
            router.add_api_route(
                f"/models/{MODEL}{path}{suffix}",
                endpoint,
                methods=[method],
                summary=summary + (" of one version" if path else ""),
                description=handler.__doc__,
                name=f"{handler.__name__}_{endpoint.__name__}",
                response_model=answer,
                **options,
            )
        return handler

    return register


@router.get("/", include_in_schema=False)
@router.get("", summary="The service", response_model=schemas.ServerMetadata)
async def server() -> Response:
    """Name, version, and the protocol's extensions that are supported."""
    version = installed_version("ghm-triton")
    return _json({"name": "ghm-triton", "version": version, "extensions": EXTENSIONS})


@router.get(
    "/health/live", summary="Whether the process is alive", response_model=schemas.ServerLive
)
async def server_live() -> Response:
    """Answers as long as the process does."""
    return _json({"live": True})


@router.get(
    "/health/ready",
    summary="Whether requests can be answered",
    response_model=schemas.ServerReady,
    responses=problems(500, 503),
)
async def server_ready(request: Request) -> Response:
    """As `/health/ready`."""
    service_state(request).check_ready()
    return _json({"ready": True})


@router.get(
    "/models/stats",
    summary="Statistics of all models",
    response_model=schemas.Statistics,
    responses=problems(500),
)
async def all_statistics(request: Request) -> Response:
    """Counts and times of every model that is loaded."""
    return _statistics(service_state(request).registry.entries())


def _statistics(entries: list[Entry]) -> Response:
    models = [entry.model for entry in entries if entry.model]
    return _json({"model_stats": [statistics_of(model).to_dict(model) for model in models]})


def _versions(request: Request, name: str) -> list[Entry]:
    entries = service_state(request).registry.entries()
    return [entry for entry in entries if entry.name == name and entry.model]


def _loaded(request: Request, name: str, version: str | None) -> ServedModel:
    return service_state(request).registry.loaded(name, version).served


@_model_route("GET", "/ready", "Whether requests can be answered", schemas.ModelReady)
async def model_ready(request: Request, name: str, version: str | None) -> Response:
    """Answers 200 once the model is loaded and has run."""
    model = service_state(request).registry.get(name, version)
    return _json({"name": model.name, "ready": True})


@_model_route("GET", "/config", "The configuration", schemas.ModelConfig)
async def model_config(request: Request, name: str, version: str | None) -> Response:
    """The model's configuration, in the form of Triton Inference Server's."""
    service = service_state(request)
    model = _loaded(request, name, version)
    return _json(
        config(
            model,
            inferences=service.settings.inferences,
            batch_size=service.scheduler.batch_size(model),
            batch_wait_ms=service.settings.batch_wait_ms,
        )
    )


@_model_route("GET", "/stats", "The statistics", schemas.Statistics)
async def model_statistics(request: Request, name: str, version: str | None) -> Response:
    """Counts and times of the model, through this protocol and in this process."""
    entry = service_state(request).registry.loaded(name, version)
    return _statistics(_versions(request, name) if version is None else [entry])


@_model_route(
    "POST",
    "/infer",
    "Run on tensors",
    schemas.InferenceAnswer,
    responses=_ANSWERS,
    openapi_extra=_REQUEST,
)
async def model_infer(request: Request, name: str, version: str | None) -> Response:
    """Run the model on a batch of images, given as tensors.

    The body may be compressed (`Content-Encoding: gzip` or `deflate`), and so is the answer where
    `Accept-Encoding` allows.
    """
    return await inference.infer(request, service_state(request).registry.get(name, version))


@router.post(
    "/repository/index",
    summary="List the models",
    response_model=list[schemas.RepositoryModel],
    responses=problems(400, 408, 413, 415, 429, 500),
    openapi_extra={"requestBody": _json_body(schemas.RepositoryQuery)},
)
async def repository_index(request: Request) -> Response:
    """Every model in the repository, and whether it is ready."""
    only_ready = (await _query(request, schemas.RepositoryQuery)).ready
    entries = service_state(request).registry.entries()
    return _json([_listed(entry) for entry in entries if entry.ready or not only_ready])


def _listed(entry: Entry) -> dict[str, str]:
    state = "READY" if entry.ready else "LOADING" if entry.warming else "UNAVAILABLE"
    reason = entry.problem or ""
    return {"name": entry.name, "version": entry.version, "state": state, "reason": reason}


@router.post(
    f"/repository/models/{MODEL}/load",
    summary="Read a model's file again",
    response_model=list[schemas.RepositoryModel],
    responses=problems(400, 403, 404, 408, 409, 413, 415, 429, 500),
    openapi_extra={"requestBody": _json_body(schemas.LoadRequest)},
)
async def load_model(request: Request, name: Name) -> Response:
    """As `POST /v1/models/{name}/reload`. A file or configuration in the request is refused."""
    parameters = (await _query(request, schemas.LoadRequest)).parameters
    if parameters:
        raise malformed(f"parameters are {short(parameters)}; models are loaded from their files")
    return _json([_listed(entry) for entry in await service_state(request).reload(name)])


async def _query(request: Request, kind: type[Query]) -> Query:
    """Parse the JSON object that a request to the repository may have."""
    decode = service_state(request).scheduler.decode
    body = await read_body(request, _MOST_QUERY_BYTES, decode)
    return parse_json(body, kind) if body.strip() else kind()


_UNSUPPORTED = {
    "/logging": "logging",
    "/trace/setting": "trace",
    f"/models/{MODEL}/trace/setting": "trace",
    "/systemsharedmemory/{rest:path}": "system_shared_memory",
    "/cudasharedmemory/{rest:path}": "cuda_shared_memory",
    f"/models/{MODEL}/generate": "generate",
    f"/models/{MODEL}/generate_stream": "generate",
    f"/repository/models/{MODEL}/unload": "unloading of models, which stay as long as their files,",
}


def _refusal(extension: str) -> Callable[[], Awaitable[Response]]:
    async def refuse() -> Response:
        raise ProblemError(404, f"{extension} is not among this service's extensions: GET /v2")

    return refuse


for _path, _extension in _UNSUPPORTED.items():
    router.add_api_route(
        _path, _refusal(_extension), methods=["GET", "POST"], include_in_schema=False
    )


# The last, as its path ends with the name.
@_model_route("GET", "", "The tensors", schemas.ModelMetadata)
async def model_metadata(request: Request, name: str, version: str | None) -> Response:
    """The model's inputs and outputs."""
    model = _loaded(request, name, version)
    return _json(metadata(model, [entry.version for entry in _versions(request, name)]))
