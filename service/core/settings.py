"""The service's settings, from `GHM_*` environment variables or arguments."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from ghm_triton.images.header import MOST_PIXELS

PREFIX = "GHM_"
_PROVIDERS = "GHM_PROVIDERS"  # onnxruntime's spelling; read if GHM_PROVIDER is not set

# The largest batch that the file's contract allows.
LARGEST_BATCH = 64

_MOST_DEFAULT_INFERENCES = 4

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # names the control groups of this process
_QUOTA_V1: tuple[str, ...] = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
_QUOTA_V2: tuple[str, ...] = ("cpu.max",)


def available_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the number of processors that this process may use, at least 1.

    This is the smaller of the processors that it may be scheduled on and the quota of its control
    group (version 1 or 2), rounded down. A container sees the host's processors, but threads beyond
    its quota only wait for one another.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        schedulable = len(os.sched_getaffinity(0))
    else:
        schedulable = os.cpu_count() or 1
    quota = min(_quotas(cgroups, membership), default=math.inf)
    return max(1, math.floor(min(schedulable, quota)))


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Yield the quota, in processors, of each group of this process and of each group around it."""
    for line in _read(membership).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            root, names = cgroups, _QUOTA_V2
        elif "cpu" in controllers.split(","):
            root, names = cgroups / "cpu", _QUOTA_V1
        else:
            continue
        # Inside a container the file may name the group as the host sees it: the root is ours.
        inner = Path(group.lstrip("/"))
        for part in (inner, *inner.parents):
            words = " ".join(_read(root / part / name) for name in names).split()
            quota, period = [*words, "", ""][:2]
            if quota.isdecimal() and period.isdecimal() and int(quota) > 0:
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def default_inferences() -> int:
    """Return the number of processors, up to where more inferences only take memory."""
    return min(available_cpus(), _MOST_DEFAULT_INFERENCES)


class SettingsError(ValueError):
    """A setting has a value that the service cannot start with."""


class Settings(BaseSettings):
    """The service's settings. Field `x` is read from the environment variable `GHM_X`.

    Sizes of queues and limits are per worker.

    Attributes:
        model: The `.onnx` file to serve. Either this or `models`.
        models: A folder of detectors: `NAME.onnx`, or `NAME/VERSION.onnx` for several versions.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.
        uds: Unix socket to listen at, in place of `host` and `port`.
        ssl_certfile: Certificate chain, PEM; with it, the service speaks HTTPS.
        ssl_keyfile: Its private key, PEM, if the certificate's file does not hold it.
        root_path: Prefix of the paths under which a reverse proxy publishes the service.
        model_control: Whether requests may reload models; None: only if tokens are required.
        workers: Processes that answer at the same address.
        provider: `cpu`, `cuda` (the start fails where CUDA does not work), or `auto`.
        threads: Threads that a model's inferences share, and images decoded at a time.
        inferences: Concurrent inferences. They share `threads`: while one is in a part that cannot
            be divided, the others use the processors.
        queue_size: Images that may wait, beyond those being processed; more are refused with 429.
        deadline_ms: Milliseconds that a request may take after it was read; then it gets 504.
        batch_size: The most images in one inference; None is 1 on a CPU, where batching gains
            nothing, and 8 on CUDA.
        batch_wait_ms: Milliseconds that an image waits for others to share its inference.
        max_upload_bytes: Largest body, inflated.
        max_pixels: Largest image in pixels, as its header states it.
        max_images: The most images in one request.
        max_received_bytes: Bytes of bodies held at a time over all requests, inflated.
        receive_seconds: Time for a request's body to arrive.
        max_header_bytes: Bytes of a request's URL and headers.
        header_seconds: Time for a request's headers to arrive.
        write_seconds: Time in which a client must read some of an answer that waits.
        keep_alive_seconds: Time that an idle connection stays open.
        max_connections: Open connections, per worker; fewer if the process may open fewer files.
        max_decoded_bytes: Bytes of decoded images at a time over all requests.
        load_seconds: Time in which a model must load, and then run once.
        heartbeat_seconds: A worker that gives no sign of life for so long is replaced.
        reload_seconds: Seconds between checks of the files for changes; 0 is never.
        log_level: Lowest level that is logged.
        log_format: `json`, an object a line, or `text`.
        tokens: Comma-separated bearer tokens, each `name:token` or `token`. Without these and
            `tokens_file`, requests need no token.
        tokens_file: A file of such tokens, one a line; read again when it changes.
        public_health: Whether `/health` needs no token.
        public_metrics: Whether `/metrics` needs no token.
        trusted_proxies: Comma-separated addresses and networks of proxies whose `X-Forwarded-For`
            and `X-Forwarded-Proto` are believed; `unix` is whoever connects by a Unix socket.
        rate_limit: Requests per second of one token, or of one address without tokens; 0 is no
            limit. Holds over all workers.
        rate_burst: Requests that may come at once within that limit.
        cors_origins: Comma-separated origins whose pages may call the service; `*` is all.
        drain_seconds: Time from SIGTERM, when `/health/ready` turns 503, until connections close,
            so that load balancers notice.
        shutdown_seconds: Time after that for running requests to end.
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
    uds: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    root_path: str = Field(default="", pattern=r"^(/[^/?#\s]+)*$")
    model_control: bool | None = None
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
    max_header_bytes: int = Field(default=64 * 2**10, ge=1024)
    header_seconds: float = Field(default=10, gt=0, le=3600)
    write_seconds: float = Field(default=30, gt=0, le=3600)
    keep_alive_seconds: float = Field(default=75, gt=0, le=86_400)
    max_connections: int = Field(default=1000, ge=1)
    max_decoded_bytes: int = Field(default=512 * 2**20, ge=1)
    load_seconds: float = Field(default=120, gt=0, le=86_400)
    heartbeat_seconds: float = Field(default=30, gt=0, le=3600)
    reload_seconds: float = Field(default=2.0, ge=0, le=86_400)
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    log_format: Literal["json", "text"] = "json"
    tokens: SecretStr | None = None
    tokens_file: Path | None = None
    public_health: bool = True
    public_metrics: bool = False
    trusted_proxies: str = ""
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

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses(cls, text: str) -> str:
        for part in filter(None, map(str.strip, text.split(","))):
            if part != "unix":
                ipaddress.ip_network(part)  # raises a ValueError that names it
        return text

    @property
    def has_tokens(self) -> bool:
        """Whether requests need a token."""
        return self.tokens is not None or self.tokens_file is not None

    @property
    def source(self) -> Path:
        """The file or folder that is served.

        Raises:
            SettingsError: Neither is set.
        """
        source = self.model or self.models
        if source is None:
            raise SettingsError(
                f"no model is given, and neither {PREFIX}MODEL nor {PREFIX}MODELS is set"
            )
        return source


def load_settings(**arguments: Any) -> Settings:
    """Read settings from the environment, overridden by arguments.

    Args:
        **arguments: Fields of `Settings`; None counts as left out. A `model` or `models` wins
            over both of the environment.

    Raises:
        SettingsError: A value is out of range, or the model is not named. The message names the
            setting and the value.
    """
    values = {name: value for name, value in arguments.items() if value is not None}
    if _is_service_link():
        values.setdefault("port", Settings.model_fields["port"].default)
    if "provider" not in values and not os.environ.get(f"{PREFIX}PROVIDER"):
        alias = os.environ.get(_PROVIDERS)
        values |= {"provider": alias} if alias else {}
    if {"model", "models"} & set(values):
        values = {"model": None, "models": None} | values
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:
            raise SettingsError(first["msg"].removeprefix("Value error, ")) from error
        where = name if arguments.get(name) is not None else f"{PREFIX}{name.upper()}"
        raise SettingsError(f"{where} is {first['input']!r}: {first['msg']}") from error
    _ = settings.source
    if settings.workers > 1 and "threads" not in settings.model_fields_set:
        # Workers share the processors: more threads would only wait for one another.
        share = max(1, settings.threads // settings.workers)
        settings = settings.model_copy(update={"threads": share})
    if settings.workers > 1 and "inferences" not in settings.model_fields_set:
        settings = settings.model_copy(
            update={"inferences": min(settings.inferences, settings.threads)}
        )
    return settings


def _is_service_link() -> bool:
    """Whether `GHM_PORT` is what Kubernetes sets in each pod beside a Service called `ghm`."""
    return os.environ.get(f"{PREFIX}PORT", "").startswith("tcp://")


def unknown_variables() -> list[str]:
    """Return variables of the environment that look like settings but are not: likely typos."""
    links = (f"{PREFIX}PORT_", f"{PREFIX}SERVICE_") if _is_service_link() else ()
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {_PROVIDERS}
    return sorted(
        name
        for name in os.environ
        if name.startswith(PREFIX) and name.upper() not in known and not name.startswith(links)
    )
