"""`ghm serve`, and the list of this package's commands."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghm_triton.options import Command, add_options, chosen, option
from ghm_triton.tables import printable
from service.predict import PREDICT

if TYPE_CHECKING:
    from service.core.settings import Settings

logger = logging.getLogger("ghm.service")

_DESCRIPTION = """Serve a detector, or a folder of them, over HTTP.

The file contains the classes, the thresholds and the preprocessing, so nothing else is needed.
Each option can also be set as an environment variable, GHM_HOST for --host and so on; the option
wins. More settings have a variable only: the README lists them.
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
_BACKLOG = 2048
_LEVELS = ("critical", "error", "warning", "info", "debug")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


@dataclass
class ServeOptions:
    """Settings that have a flag. `Settings` has the defaults, and checks the values."""

    host: str | None = option(None, "address to listen at", shown="127.0.0.1")
    port: int | None = option(None, "port; 0 takes a free one", shown="8000")
    uds: str | None = option(None, "Unix socket to listen at, in place of host and port")
    ssl_certfile: str | None = option(None, "certificate chain, PEM: answer over HTTPS")
    ssl_keyfile: str | None = option(
        None, "its private key, if the certificate's file does not hold it"
    )
    root_path: str | None = option(
        None, "prefix of the paths under which a reverse proxy publishes the service"
    )
    provider: str | None = option(
        None,
        "what runs the model; cuda fails to start where CUDA does not work",
        choices=("auto", "cpu", "cuda"),
        shown="auto",
    )

    workers: int | None = option(None, "processes that answer", group="work", shown="1")
    threads: int | None = option(
        None,
        "threads that inferences share",
        group="work",
        shown="the processors, divided among workers",
    )
    inferences: int | None = option(
        None, "concurrent inferences per worker", group="work", shown="the processors, up to 4"
    )
    batch_size: int | None = option(
        None, "most images in one inference", group="work", shown="1 on a CPU, 8 on CUDA"
    )
    queue_size: int | None = option(
        None, "images that may wait, per worker", group="work", shown="64"
    )
    deadline_ms: float | None = option(
        None, "milliseconds that a request may take", group="work", shown="10000"
    )

    max_upload_mb: float | None = option(
        None, "largest body, in MiB", group="limits", shown="20", type=_positive
    )
    max_megapixels: float | None = option(
        None, "largest image", group="limits", shown="40", type=_positive
    )
    max_images: int | None = option(None, "most images in a request", group="limits", shown="16")
    max_connections: int | None = option(
        None, "most open connections per worker", group="limits", shown="1000"
    )
    keep_alive_seconds: float | None = option(
        None, "how long an idle connection stays open", group="limits", shown="75"
    )
    rate_limit: float | None = option(
        None, "requests per second of one token or address", group="limits", shown="no limit"
    )

    tokens_file: str | None = option(
        None,
        "bearer tokens, name:token a line, of which each request must carry one",
        group="operations",
    )
    model_control: bool | None = option(
        None, "let requests reload models; on by default if tokens are required", group="operations"
    )
    cors_origins: str | None = option(
        None, "origins whose pages may call, comma-separated, or *", group="operations"
    )
    drain_seconds: float | None = option(
        None, "after SIGTERM, stay unready this long before closing", group="operations", shown="0"
    )
    shutdown_seconds: float | None = option(
        None, "after that, time for running requests to end", group="operations", shown="30"
    )
    log_level: str | None = option(
        None, "least level logged", choices=_LEVELS, group="operations", shown="info"
    )
    log_format: str | None = option(
        None, "format of the log", choices=("json", "text"), group="operations", shown="json"
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm serve`."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        nargs="?",
        help="the detector, a .onnx file that ghm export wrote, or a folder of them",
    )
    add_options(parser, ServeOptions)


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
        print(f"ghm serve: {printable(str(error))}", file=sys.stderr)
        return _BAD_USAGE
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    from service.core.settings import load_settings, unknown_variables
    from service.observability import logs

    options = chosen(arguments, ServeOptions)
    if "max_upload_mb" in options:
        options["max_upload_bytes"] = round(options.pop("max_upload_mb") * 2**20)
    if "max_megapixels" in options:
        options["max_pixels"] = round(options.pop("max_megapixels") * 10**6)
    if arguments.model is not None:
        options["models" if Path(arguments.model).is_dir() else "model"] = arguments.model
    settings = load_settings(**options)
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables():
        logger.warning("%s is set, but is not a setting of this service", name)
    return settings


def _serve(settings: Settings) -> None:
    from service.server import DrainingServer, banner, prepare

    app = prepare(settings)  # before listening, so that a model that cannot run fails the start
    with _listen(settings) as listener:
        _announce(banner(app), listener, settings)
        DrainingServer(app, settings).run(sockets=[listener])


def _serve_with_workers(settings: Settings) -> None:
    from service.core.settings import SettingsError
    from service.workers import Supervisor

    if sys.platform == "win32":
        raise SettingsError(f"workers is {settings.workers}: Windows can have only 1")
    with _listen(settings) as listener:
        Supervisor(settings, listener, lambda text: _announce(text, listener, settings)).run()


def _announce(text: str, listener: socket.socket, settings: Settings) -> None:
    print(text)
    print(f"serving at {_url(listener, settings)}", flush=True)


@contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """Yield a socket that listens already, so that readers of stdout can connect at once."""
    try:
        listener = _bind(settings)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python appends the address
        address = settings.uds or f"{settings.host}:{settings.port}"
        raise OSError(f"cannot listen at {address}: {reason}") from error
    with listener:
        try:
            yield listener
        finally:
            if settings.uds is not None:
                settings.uds.unlink(missing_ok=True)


def _bind(settings: Settings) -> socket.socket:
    if settings.uds is not None:
        _remove_stale(settings.uds)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(settings.uds))
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
    host = settings.host
    if ":" not in host:
        return socket.create_server((host, settings.port), backlog=_BACKLOG)
    both = host == "::" and socket.has_dualstack_ipv6()  # the wildcard is that of IPv4 too
    return socket.create_server(
        (host, settings.port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=both
    )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that has ended; one that is in use stays."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def _url(listener: socket.socket, settings: Settings) -> str:
    """Return an address that can be opened, also for a wildcard."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    scheme = "http" if settings.ssl_certfile is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  shown, not bound
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


SERVE = Command("serve", "serve a detector over HTTP", configure, run, "serve")

COMMANDS = (SERVE, PREDICT)
