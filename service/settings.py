"""What the service can be told, as `GHM_*` environment variables or arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.cpus import available_cpus

PREFIX = "GHM_"

# The largest batch that the contract lets a file be run with.
LARGEST_BATCH = 64

# Pillow refuses an image of more pixels by itself, whatever we would allow.
MOST_PIXELS = 178_956_970


class SettingsError(ValueError):
    """A setting has a value that the service cannot start with."""


class Settings(BaseSettings):
    """The service's settings. Each field `x` is read from the environment variable `GHM_X`.

    Attributes:
        model: The detector to serve, a `.onnx` file with a card.
        host: The address to listen at.
        port: The port to listen at; 0 takes a free one.
        threads: Threads of one inference, and images decoded at a time.
        provider: What runs the model. `auto` takes CUDA where it works and the CPU elsewhere;
            `cuda` does not start where CUDA does not work.
        max_upload_bytes: The largest request body, in bytes.
        max_pixels: The largest image, in pixels, as its header states it.
        max_images: The most images in one request.
        log_level: What is logged.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True
    )

    model: Path
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    threads: int = Field(default_factory=available_cpus, ge=1, le=1024)
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    max_upload_bytes: int = Field(default=20 * 2**20, ge=1)
    max_pixels: int = Field(default=40_000_000, ge=1, le=MOST_PIXELS)
    max_images: int = Field(default=16, ge=1, le=LARGEST_BATCH)
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the arguments given.

    Args:
        **given: Fields of `Settings`; None stands for not given.

    Returns:
        The settings.

    Raises:
        SettingsError: A value is out of range, or the model is not named. The message names the
            setting and the value.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise SettingsError(
                f"no {name} is given, and {PREFIX}{name.upper()} is not set"
            ) from error
        where = name if given.get(name) is not None else f"{PREFIX}{name.upper()}"
        raise SettingsError(f"{where} is {first['input']!r}: {first['msg']}") from error
