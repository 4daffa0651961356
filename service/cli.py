"""`ghm serve`, and the list of this package's commands."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ghm_triton.command import Command
from service.predict import PREDICT

if TYPE_CHECKING:
    from service.core.settings import Settings

logger = logging.getLogger("ghm.service")

_DESCRIPTION = """Serve a detector, or a folder of them, over HTTP.

The file carries its classes, its thresholds and how images are prepared, so nothing else is
needed. Each option can also be set as an environment variable, GHM_HOST for --host and so on;
the option wins. More settings have a variable only: the README has them all.
"""

_EPILOG = """example:
  ghm serve detector.onnx --port 8000
  curl -F file=@photo.jpg http://127.0.0.1:8000/v1/detect
  curl -F file=@photo.jpg -F threshold=0.3 -F classes=dog,cat http://127.0.0.1:8000/v1/detect

In production:
  ghm serve models/ --host 0.0.0.0 --workers 4 --tokens-file tokens --drain-seconds 5

http://127.0.0.1:8000/docs describes every request and answer. Ctrl+C stops the service.
"""

_BAD_USAGE = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm serve`."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        nargs="?",
        help="the detector, a .onnx file that ghm export wrote, or a folder of them",
    )
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--provider",
        choices=("auto", "cpu", "cuda"),
        help="what runs the model; cuda does not start where it does not work (default: auto)",
    )
    _add_work(parser.add_argument_group("work"))
    _add_limits(parser.add_argument_group("limits"))
    _add_operations(parser.add_argument_group("operations"))


def _add_work(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes that answer (default: 1)"
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that inferences share (default: the processors, divided among workers)",
    )
    group.add_argument(
        "--inferences",
        type=int,
        metavar="N",
        help="inferences at a time, a worker (default: the processors, up to 4)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="most images of one inference (default: 1 on a CPU, 8 on CUDA)",
    )
    group.add_argument(
        "--queue-size", type=int, metavar="N", help="images that may wait, a worker (default: 64)"
    )
    group.add_argument(
        "--deadline-ms",
        type=float,
        metavar="MS",
        help="how long a request may take (default: 10000)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-upload-mb", type=_positive, metavar="MB", help="largest body, in MiB (default: 20)"
    )
    group.add_argument(
        "--max-megapixels", type=_positive, metavar="MP", help="largest image (default: 40)"
    )
    group.add_argument(
        "--max-images", type=int, metavar="N", help="most images in a request (default: 16)"
    )
    group.add_argument(
        "--rate-limit",
        type=float,
        metavar="R",
        help="requests a second of one token or address (default: no limit)",
    )


def _add_operations(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tokens-file",
        metavar="FILE",
        help="bearer tokens, name:token a line, of which each request must carry one",
    )
    group.add_argument(
        "--cors-origins", metavar="LIST", help="origins whose pages may call us, with commas, or *"
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        help="after SIGTERM, stay unready this long before closing (default: 0)",
    )
    group.add_argument(
        "--shutdown-seconds",
        type=float,
        metavar="S",
        help="after that, how long requests in work may take to end (default: 30)",
    )
    group.add_argument(
        "--log-level",
        choices=("critical", "error", "warning", "info", "debug"),
        help="what is logged (default: info)",
    )
    group.add_argument(
        "--log-format", choices=("json", "text"), help="how it is logged (default: json)"
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
    from service.core.settings import SettingsError

    try:
        settings = _settings(arguments)
        if settings.workers == 1:
            _serve(settings)
        else:
            _serve_with_workers(settings)
    except (SettingsError, OSError) as error:
        print(f"ghm serve: {error}", file=sys.stderr)
        return _BAD_USAGE
    return 0


# Options that are named and measured like their settings.
_PLAIN = (
    *("host", "port", "provider", "workers", "threads", "inferences", "batch_size", "queue_size"),
    *("deadline_ms", "max_images", "rate_limit", "tokens_file", "cors_origins"),
    *("drain_seconds", "shutdown_seconds", "log_level", "log_format"),
)


def _settings(arguments: argparse.Namespace) -> Settings:
    from service.core.settings import load_settings, unknown_variables
    from service.observability import logs

    def scaled(value: float | None, unit: int) -> int | None:
        return None if value is None else round(value * unit)

    source = arguments.model
    kind = "models" if source is not None and Path(source).is_dir() else "model"
    settings = load_settings(
        **{kind: source},
        **{name: getattr(arguments, name) for name in _PLAIN},
        max_upload_bytes=scaled(arguments.max_upload_mb, 2**20),
        max_pixels=scaled(arguments.max_megapixels, 10**6),
    )
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables():
        logger.warning("%s is set, and is no setting of this service", name)
    return settings


def _serve(settings: Settings) -> None:
    from service.server import DrainingServer, banner, prepare

    app = prepare(settings)  # before we listen, so that what cannot run is an error of the start
    with _listen(settings.host, settings.port) as listener:
        _announce(banner(app), listener)
        DrainingServer(app, settings).run(sockets=[listener])


def _serve_with_workers(settings: Settings) -> None:
    from service.core.settings import SettingsError
    from service.workers import Supervisor

    if sys.platform == "win32":
        raise SettingsError(f"workers is {settings.workers}: Windows can have only 1")
    with _listen(settings.host, settings.port) as listener:
        Supervisor(settings, listener, lambda text: _announce(text, listener)).run()


def _announce(text: str, listener: socket.socket) -> None:
    print(text)
    print(f"serving at {_url(listener)}", flush=True)


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


SERVE = Command("serve", "serve a detector over HTTP", configure, run, "serve")

COMMANDS = (SERVE, PREDICT)
