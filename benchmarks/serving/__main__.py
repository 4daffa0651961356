"""Load every server in turn and compare each with the pipeline without a server.

In every round each contender is loaded for some seconds, the pipeline first. A contender's share is
the median over rounds of its images per second over the pipeline's in the same round, so that a
machine that slows down slows all. `--before` adds the service of another checkout; `ratio` is the
median over rounds of this checkout's images per second by the other's. The servers are pinned to
the first cores; the clients run on the last one, which on a machine of two cores a two-core server
shares with them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, latest, markdown, read
from benchmarks.serving.load import Load, ask, form_request, raw_request
from benchmarks.serving.processes import (
    cpu_seconds,
    free_port,
    memory_bytes,
    running,
    wait_for_port,
)

RESULTS = Path(__file__).parents[1] / "results" / "serving.jsonl"
CLIENTS = (1, 8, 32)
NO_SERVER = "no server"
OURS, OURS_RAW = "ghm serve", "ghm serve, raw body"
BEFORE = "ghm serve, before"
# Command, path, and name of the image in a form.
COMMANDS = {
    OURS: (["ghm", "serve"], "/v1/detect", "file"),
    BEFORE: (["ghm", "serve"], "/v1/detect", "file"),
    "fastapi": (["python", "-m", "benchmarks.serving.servers.plain"], "/detect", "file"),
    "litserve": (["python", "-m", "benchmarks.serving.servers.lit"], "/predict", "request"),
    "bentoml": (["python", "-m", "benchmarks.serving.servers.bento"], "/detect", "file"),
}


@dataclass(frozen=True)
class Contender:
    """A running server.

    Attributes:
        port: Port that it listens on.
        pid: Its process.
        requests: Requests to send.
    """

    port: int
    pid: int
    requests: list[bytes]


@dataclass(frozen=True)
class Setting:
    """Setting of a measurement.

    Attributes:
        model: The detector.
        images: Image files that clients send in turn.
        cores: Cores of the servers.
        peers: Python interpreter with LitServe and BentoML.
        servers: Names of COMMANDS.
        before: Checkout that BEFORE is served from.
    """

    model: Path
    images: list[Path]
    cores: list[int]
    peers: str
    servers: tuple[str, ...] = (OURS,)
    before: Path | None = None


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a detector that ghm export wrote")
    parser.add_argument("--images", type=Path, help="a folder of JPEG files")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="cores of a server")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="for one turn")
    parser.add_argument("--peers-python", default=sys.executable, help="has litserve and bentoml")
    parser.add_argument("--before", type=Path, help="also serve from this checkout")
    parser.add_argument("--servers", nargs="+", choices=COMMANDS, help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.model is None or arguments.images is None:
            parser.error("--model and --images are needed to measure")
        images = sorted(arguments.images.glob("*.jp*g"))[:64]
        if not images:
            parser.error(f"no JPEG file in {arguments.images}")
        servers = arguments.servers or [name for name in COMMANDS if name != BEFORE]
        if arguments.before:
            servers = [*servers, BEFORE]
        elif BEFORE in servers:
            parser.error(f"{BEFORE!r} needs --before")
        rows = Rows(arguments.out, provenance())
        for number in arguments.cores:
            setting = Setting(
                arguments.model.resolve(),
                images,
                list(range(number)),
                arguments.peers_python,
                tuple(dict.fromkeys(servers)),
                arguments.before and arguments.before.resolve(),
            )
            for row in measure(setting, arguments.clients, arguments.rounds, arguments.seconds):
                print(rows.add(row)["server"], row["clients"], row["share"], flush=True)
    print(table(latest(read(arguments.out), ("model", "cores", "clients", "server"))))


def measure(
    setting: Setting, clients: list[int], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield a row per contender and number of clients."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    threads = len(setting.cores)
    with ExitStack() as stack:
        weight, alone = stack.enter_context(yardstick(setting, threads))
        contenders = {
            name: stack.enter_context(contender(name, setting, threads)) for name in setting.servers
        }
        if OURS in contenders and BEFORE not in contenders:
            contenders[OURS_RAW] = raw(contenders[OURS], setting)
        for one in contenders.values():
            ask(one.port, one.requests, max(clients), 1.0)  # initialise what is lazy
        for number in clients:
            shares: dict[str, list[float]] = {name: [] for name in contenders}
            parts: dict[str, list[tuple[Load, float]]] = {name: [] for name in contenders}
            own: list[tuple[float, float]] = []
            for turn in range(rounds):
                own.append(alone(seconds))
                for name in sorted(contenders, reverse=bool(turn % 2)):
                    one = contenders[name]
                    before = cpu_seconds(one.pid)
                    load = ask(one.port, one.requests, number, seconds)
                    parts[name].append((load, cpu_seconds(one.pid) - before))
                    shares[name].append(load.per_second / own[-1][0])
            common = {"cores": threads, "clients": number, "model": setting.model.stem}
            yield {
                **common,
                "server": NO_SERVER,
                "share": 1.0,
                "per_second": round(statistics.median(rate for rate, _ in own), 2),
                "cpu_ms": round(statistics.median(cpu for _, cpu in own), 3),
                "megabytes": round(weight / 2**20, 1),
            }
            for name, one in contenders.items():
                row = {**common, "server": name, **summary(shares[name], parts[name], one)}
                if name == OURS and BEFORE in shares:
                    pairs = zip(shares[OURS], shares[BEFORE], strict=True)
                    row["ratio"] = round(statistics.median(new / old for new, old in pairs), 4)
                yield row


def summary(shares: list[float], parts: list[tuple[Load, float]], one: Contender) -> dict[str, Any]:
    """Summarise the rounds of one contender."""
    loads = [load for load, _ in parts]
    everything = Load(milliseconds=[ms for load in loads for ms in load.milliseconds])
    answers = len(everything.milliseconds)
    return {
        "share": round(statistics.median(shares), 4),
        "shares": [round(share, 4) for share in shares],
        "per_second": round(statistics.median(load.per_second for load in loads), 2),
        "p50_ms": round(everything.quantile(0.5), 2),
        "p99_ms": round(everything.quantile(0.99), 2),
        "cpu_ms": round(sum(cpu for _, cpu in parts) / answers * 1000, 3),
        "megabytes": round(memory_bytes(one.pid) / 2**20, 1),
        "refused": sum(sum(load.refused.values()) for load in loads),
    }


@contextmanager
def yardstick(setting: Setting, threads: int) -> Iterator[tuple[int, Any]]:
    """Start the pipeline in its own process; yield its model's memory and a way to measure it."""
    module = [sys.executable, "-m", "benchmarks.serving.pipeline", "--threads", str(threads)]
    command = [*module, "--model", str(setting.model), "--images", *map(str, setting.images)]
    with running(command, setting.cores, speaks=True) as process:
        assert process.stdin is not None  # noqa: S101  both are pipes
        assert process.stdout is not None  # noqa: S101
        weight = int(process.stdout.readline())

        def alone(seconds: float) -> tuple[float, float]:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            rate, cpu = process.stdout.readline().split()
            return float(rate), float(cpu)

        yield weight, alone


@contextmanager
def contender(name: str, setting: Setting, threads: int) -> Iterator[Contender]:
    """Start a server and wait until it listens."""
    port = free_port()
    environment = {
        "MODEL": str(setting.model),
        "PORT": str(port),
        "GHM_PORT": str(port),
        "GHM_MODEL": str(setting.model),
        "THREADS": str(threads),
        "PYTHONPATH": str(setting.before if name == BEFORE else Path(__file__).parents[2]),
        "BENTOML_DO_NOT_TRACK": "1",
        "BENTOML_HOME": tempfile.gettempdir(),
    }
    command, path, field = COMMANDS[name]
    command = [
        {"python": setting.peers, "ghm": str(Path(sys.executable).parent / "ghm")}[command[0]],
        *command[1:],
    ]
    requests = [form_request(path, field, image.read_bytes()) for image in setting.images]
    with running(command, setting.cores, **environment) as process:
        wait_for_port(port, process)
        yield Contender(port, process.pid, requests)


def raw(ours: Contender, setting: Setting) -> Contender:
    """Our server with request bodies that are images."""
    make = partial(raw_request, "/v1/detect")
    return Contender(ours.port, ours.pid, [make(image.read_bytes()) for image in setting.images])


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table."""
    return markdown(
        {
            **{name: row[name] for name in ("cores", "clients", "server")},
            "img/s": f"{row['per_second']:.1f}",
            "of no server": f"{row['share']:.2f}",
            "of before": f"{row['ratio']:.3f}" if "ratio" in row else "",
            "p50 ms": f"{row['p50_ms']:.1f}" if "p50_ms" in row else "",
            "p99 ms": f"{row['p99_ms']:.1f}" if "p99_ms" in row else "",
            "CPU ms": f"{row['cpu_ms']:.1f}",
            "MiB": f"{row['megabytes']:.0f}",
        }
        for row in rows
    )


if __name__ == "__main__":
    main()
