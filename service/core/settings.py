"""What the service can be told, as `GHM_*` environment variables or arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.core.cpus import available_cpus

PREFIX = "GHM_"
_PROVIDERS = "GHM_PROVIDERS"  # as onnxruntime says it; read where GHM_PROVIDER is not set

# The largest batch that the contract lets a file be run with.
LARGEST_BATCH = 64

_MOST_DEFAULT_INFERENCES = 4

# Pillow refuses an image of more pixels by itself, whatever we would allow.
MOST_PIXELS = 178_956_970


def default_inferences() -> int:
    """As many inferences as processors, up to where more gain nothing but take memory."""
    return min(available_cpus(), _MOST_DEFAULT_INFERENCES)


class SettingsError(ValueError):
    """A setting has a value that the service cannot start with."""


class Settings(BaseSettings):
    """The service's settings. Each field `x` is read from the environment variable `GHM_X`.

    Attributes:
        model: The detector to serve, a `.onnx` file with a card. Either this or `models`.
        models: A folder of detectors: `NAME.onnx`, or `NAME/VERSION.onnx` for several versions.
        host: The address to listen at.
        port: The port to listen at; 0 takes a free one.
        workers: Processes that answer at the same address.
        provider: What runs the model. `auto` takes CUDA where it works and the CPU elsewhere;
            `cuda` does not start where CUDA does not work.
        threads: Threads that a model's inferences share, and images decoded at a time.
        inferences: Inferences that run at a time. They share `threads` threads: while one of them
            does what cannot be divided, the others use the processors.
        queue_size: Images that may wait, beyond those that are worked on; more are refused with
            429.
        deadline_ms: Milliseconds from a request's arrival to the start of its inference; after
            that its answer is 504.
        batch_size: The most images that are put into one inference. Where not given, 1 on a CPU,
            where batching gains nothing, and 8 on CUDA.
        batch_wait_ms: How long an image waits for others to share its inference, in milliseconds.
        max_upload_bytes: The largest request body, in bytes, after decompression.
        max_pixels: The largest image, in pixels, as its header states it.
        max_images: The most images in one request.
        max_received_bytes: The most bytes of request bodies that are held at a time, over all
            requests, decompressed.
        receive_seconds: How long a request's body may take to arrive.
        max_decoded_bytes: The most bytes of decoded images at a time, over all requests.
        reload_seconds: How often the files are looked at for changes, in seconds; 0 is never.
        log_level: What is logged.
        log_format: A JSON object a line, or text for people.
        tokens: Bearer tokens that requests must carry, separated by commas, each as `name:token`
            or `token`. Where neither these nor `tokens_file` is given, none is needed.
        tokens_file: A file of such tokens, one a line; read again when it changes.
        public_health: Whether `/health` answers without a token.
        public_metrics: Whether `/metrics` answers without a token.
        rate_limit: Requests a second that one token (or address, without tokens) may send; 0 is
            no limit.
        rate_burst: Requests that may come at once within that limit.
        cors_origins: The origins whose pages may call the service, separated by commas; `*` is
            every one.
        drain_seconds: After SIGTERM, how long `/health/ready` says 503 before connections are
            closed, so that a load balancer has seen it.
        shutdown_seconds: After that, how long requests in work may take to end.
        page: Whether there is a page at `/`.
        metrics: Whether there are metrics at `/metrics`.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: Path | None = None
    models: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256)
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default_factory=available_cpus, ge=1, le=1024)
    inferences: int = Field(default_factory=default_inferences, ge=1, le=64)
    queue_size: int = Field(default=64, ge=0, le=100_000)
    deadline_ms: float = Field(default=10_000, gt=0, le=3_600_000)
    batch_size: int | None = Field(default=None, ge=1, le=LARGEST_BATCH)
    batch_wait_ms: float = Field(default=2.0, ge=0, le=1000)
    max_upload_bytes: int = Field(default=20 * 2**20, ge=1)
    max_pixels: int = Field(default=40_000_000, ge=1, le=MOST_PIXELS)
    max_images: int = Field(default=16, ge=1, le=LARGEST_BATCH)
    max_received_bytes: int = Field(default=256 * 2**20, ge=1)
    receive_seconds: float = Field(default=30, gt=0, le=3600)
    max_decoded_bytes: int = Field(default=512 * 2**20, ge=1)
    reload_seconds: float = Field(default=2.0, ge=0, le=86_400)
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    log_format: Literal["json", "text"] = "json"
    tokens: SecretStr | None = None
    tokens_file: Path | None = None
    public_health: bool = True
    public_metrics: bool = False
    rate_limit: float = Field(default=0, ge=0, allow_inf_nan=False)
    rate_burst: int = Field(default=20, ge=1)
    cors_origins: str = ""
    drain_seconds: float = Field(default=0, ge=0, le=3600)
    shutdown_seconds: float = Field(default=30, ge=0, le=3600)
    page: bool = True
    metrics: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model is not None and self.models is not None:
            raise ValueError(
                f"both a model ({self.model}) and a folder of models ({self.models}) are given"
            )
        return self

    @property
    def source(self) -> Path:
        """The file or folder that is served.

        Raises:
            SettingsError: Neither is given.
        """
        source = self.model or self.models
        if source is None:
            raise SettingsError(
                f"no model is given, and neither {PREFIX}MODEL nor {PREFIX}MODELS is set"
            )
        return source


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the arguments given.

    Args:
        **given: Fields of `Settings`; None stands for not given. A `model` or `models` that is
            given wins over both of the environment.

    Returns:
        The settings.

    Raises:
        SettingsError: A value is out of range, or the model is not named. The message names the
            setting and the value.
    """
    wanted = {name: value for name, value in given.items() if value is not None}
    if "provider" not in wanted and not os.environ.get(f"{PREFIX}PROVIDER"):
        alias = os.environ.get(_PROVIDERS)
        wanted |= {"provider": alias} if alias else {}
    if {"model", "models"} & set(wanted):
        wanted = {"model": None, "models": None} | wanted
    try:
        settings = Settings(**wanted)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:
            raise SettingsError(first["msg"].removeprefix("Value error, ")) from error
        where = name if given.get(name) is not None else f"{PREFIX}{name.upper()}"
        raise SettingsError(f"{where} is {first['input']!r}: {first['msg']}") from error
    _ = settings.source
    if settings.workers > 1 and "threads" not in settings.model_fields_set:
        # All workers share the processors: threads that wait for one another only cost.
        share = max(1, settings.threads // settings.workers)
        settings = settings.model_copy(update={"threads": share})
    if settings.workers > 1 and "inferences" not in settings.model_fields_set:
        settings = settings.model_copy(
            update={"inferences": min(settings.inferences, settings.threads)}
        )
    return settings


def unknown_variables() -> list[str]:
    """Variables of the environment that look like settings, and are none: mistyped, likely."""
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {_PROVIDERS}
    return sorted(
        name for name in os.environ if name.startswith(PREFIX) and name.upper() not in known
    )
