"""`ghm serve`, and the list of this package's commands."""

from __future__ import annotations

import argparse
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ghm_triton.command import Command
from ghm_triton.tables import threshold_table
from service.predict import PREDICT

if TYPE_CHECKING:
    from service.settings import Settings

_DESCRIPTION = """Serve a detector over HTTP.

The file carries its classes, its thresholds and how images are prepared, so nothing else is
needed. Each option can also be set as an environment variable, GHM_HOST for --host and so on;
the option wins.
"""

_EPILOG = """example:
  ghm serve detector.onnx --port 8000
  curl -F file=@photo.jpg http://127.0.0.1:8000/v1/detect
  curl -F file=@photo.jpg -F threshold=0.3 -F classes=dog,cat http://127.0.0.1:8000/v1/detect

http://127.0.0.1:8000/docs describes every request and answer. Ctrl+C stops the service.
"""

_BAD_USAGE = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm serve`."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument("model", nargs="?", help="the detector, a .onnx file that ghm export wrote")
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--threads", type=int, help="threads of an inference (default: the processors we may use)"
    )
    parser.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        help="what runs the model; cuda does not start where it does not work (default: auto)",
    )
    parser.add_argument(
        "--max-upload-mb", type=_positive, metavar="MB", help="largest body, in MiB (default: 20)"
    )
    parser.add_argument(
        "--max-megapixels", type=_positive, metavar="MP", help="largest image (default: 40)"
    )
    parser.add_argument(
        "--max-images", type=int, metavar="N", help="most images in a request (default: 16)"
    )
    parser.add_argument(
        "--log-level",
        choices=("critical", "error", "warning", "info", "debug"),
        help="what is logged (default: info)",
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Serve until stopped.

    Returns:
        0 after a normal stop, 2 when the service could not start; the reason is on stderr.
    """
    from export.contract import CardError
    from service.model import ModelError
    from service.settings import SettingsError

    try:
        _serve(_settings(arguments))
    except (SettingsError, CardError, ModelError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 0


def _refuse(reason: str) -> int:
    print(f"ghm serve: {reason}", file=sys.stderr)
    return _BAD_USAGE


def _settings(arguments: argparse.Namespace) -> Settings:
    from service.settings import load_settings

    def scaled(value: float | None, unit: int) -> int | None:
        return None if value is None else round(value * unit)

    return load_settings(
        model=arguments.model,
        host=arguments.host,
        port=arguments.port,
        threads=arguments.threads,
        provider=arguments.provider,
        max_upload_bytes=scaled(arguments.max_upload_mb, 2**20),
        max_pixels=scaled(arguments.max_megapixels, 10**6),
        max_images=arguments.max_images,
        log_level=arguments.log_level,
    )


def _serve(settings: Settings) -> None:
    import uvicorn

    from service.app import create_app, load_model

    model = load_model(settings)
    model.warm_up()  # here, so that a graph that does not run is an error of the start
    app = create_app(settings, model)
    config = uvicorn.Config(
        app,
        log_level=settings.log_level,
        log_config=_logging(settings.log_level),
        timeout_graceful_shutdown=30,
    )
    with _listen(settings.host, settings.port) as listener:
        print(threshold_table(model.card.threshold_policy, model.card.thresholds))
        print(f"{model.card.name} runs on {model.providers[0]}, threads: {settings.threads}")
        print(f"serving at {_url(listener)}", flush=True)
        with suppress(KeyboardInterrupt):  # Ctrl+C has stopped the server in good order by now
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that already listens: whoever reads the address from stdout can connect to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address, as we do
        raise OSError(f"cannot listen at {host}:{port}: {reason}") from error


def _url(listener: socket.socket) -> str:
    """An address that can be opened: a wildcard stands for this machine too."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  shown, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _logging(level: str) -> dict[str, Any]:
    """Uvicorn's own logging with our logger beside it, all on stderr: stdout is for the address."""
    from copy import deepcopy

    from uvicorn.config import LOGGING_CONFIG

    config: dict[str, Any] = deepcopy(LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["ghm.service"] = {
        "handlers": ["default"],
        "level": level.upper(),
        "propagate": False,
    }
    return config


SERVE = Command("serve", "serve a detector over HTTP", configure, run, "serve")

COMMANDS = (SERVE, PREDICT)
