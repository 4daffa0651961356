"""Compare the service's HTTP protocol with the two that it could use as uvicorn has them.

In every round each protocol is loaded for some seconds with detections, and then with the smallest
request. The ratios are medians over rounds of a protocol's rate over that of `httptools` in the
same round. At the end one connection sends 48 MB of headers.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.provenance import provenance
from benchmarks.result_file import Rows
from benchmarks.serving.load import ask, raw_request
from benchmarks.serving.processes import free_port, memory_bytes, running, wait_for_port

RESULTS = Path(__file__).parents[1] / "results" / "serving_protocols.jsonl"
OURS = "bounded"
PROTOCOLS = (OURS, "httptools", "h11")
_LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
_FLOOD = 48 * 10**6


def main() -> None:
    """Measure and print a row per protocol, or, with `--serve`, be one of the servers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="for one turn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", choices=PROTOCOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model, arguments.serve)
        return
    rows = Rows(arguments.out, provenance())
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    images = [path.read_bytes() for path in sorted(arguments.images.glob("*.jp*g"))[:64]]
    kinds = {"detect": [raw_request("/v1/detect", image) for image in images], "live": [_LIVE]}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in PROTOCOLS}
    with ExitStack() as stack:
        servers = {}
        for name in PROTOCOLS:
            command = [sys.executable, "-m", __spec__.name, "--serve", name]
            port = free_port()
            settings = {"GHM_PORT": str(port), "GHM_LOG_LEVEL": "error"}
            process = stack.enter_context(
                running([*command, "--model", str(arguments.model)], [0], **settings)
            )
            wait_for_port(port, process)
            ask(port, kinds["detect"], arguments.clients, 1.0)
            servers[name] = port, process.pid
        for turn in range(arguments.rounds):
            for name in sorted(servers, reverse=bool(turn % 2)):
                for kind, requests in kinds.items():
                    load = ask(servers[name][0], requests, arguments.clients, arguments.seconds)
                    rates[name].setdefault(kind, []).append(load.per_second)
        for name, (port, pid) in servers.items():
            sent, held = flood(port, pid)
            row = {
                "protocol": name,
                "clients": arguments.clients,
                "model": arguments.model.stem,
                "flood_mb_sent": round(sent / 1e6, 1),
                "flood_mb_held": round(held / 1e6, 1),
            }
            for kind, of_kind in rates[name].items():
                base = rates["httptools"][kind]
                ratios = [rate / other for rate, other in zip(of_kind, base, strict=True)]
                row[f"{kind}_per_second"] = round(statistics.median(of_kind), 1)
                row[f"{kind}_ratio"] = round(statistics.median(ratios), 3)
            print(rows.add(row))


def serve(model: Path, protocol: str) -> None:
    """Serve on one protocol until killed."""
    from service.core.settings import load_settings
    from service.observability import logs
    from service.server import DrainingServer, prepare

    settings = load_settings(model=model, threads=1)
    logs.configure(settings.log_level, settings.log_format)
    server = DrainingServer(prepare(settings), settings)
    if protocol != OURS:
        server.config.http = protocol  # type: ignore[assignment]
    server.config.host, server.config.port = settings.host, settings.port
    server.run()


def flood(port: int, pid: int) -> tuple[int, int]:
    """Send headers without end; return the bytes that the server took, and those it then holds."""
    before, sent, header = memory_bytes(pid), 0, b"X-Header: " + b"x" * 990 + b"\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            while sent < _FLOOD:
                connection.sendall(header * 64)
                sent += len(header) * 64
        except OSError:
            pass  # refused
        return sent, memory_bytes(pid) - before


if __name__ == "__main__":
    main()
