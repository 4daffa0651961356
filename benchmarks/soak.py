"""Hold `ghm serve` under mixed good and hostile traffic, and watch what grows.

    python -m benchmarks.soak --model detector.onnx               # an hour
    python -m benchmarks.soak --model detector.onnx --minutes 5

Starts the service with two workers on loopback, on a folder whose model is replaced every 30 s,
and `benchmarks.soak_traffic` in a process of its own. Every 5 s it records resident memory,
descriptors and threads of the supervisor and the workers, and the latency of `/health/live` over
new connections. Appends one JSON line with provenance and draws the series. The exit status is 1
if a bound does not hold; the bounds on growth count from 30 minutes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, perf_counter, sleep

import numpy as np
from matplotlib.figure import Figure

from benchmarks.provenance import ROOT, provenance
from benchmarks.result_file import Row, Rows
from benchmarks.serving.processes import tree

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
PLOT = ROOT / "docs" / "images" / "soak.png"
CORPUS = ROOT / "tests" / "service" / "corpus"
SAMPLE_SECONDS, PROBE_SECONDS, REPLACE_SECONDS = 5.0, 0.1, 30.0
WARM_UP = 1 / 6  # of the run: memory pools and caches fill
MEANINGFUL_MINUTES = 30.0  # from which a slope says something
POINTS = 120  # of the series in the row
BOUNDS = {
    "rss_mb_per_hour": 1.0,
    "descriptors_growth": 2.0,  # open connections of the traffic vary
    "threads_growth": 0.0,
    "live_p99_ms": 100.0,
    "lost": 0,
    "wrong": 0,
    "workers_replaced": 0,
    "tracebacks": 0,
    "exit_status": 0,
}
GROWTH = ("rss_mb_per_hour", "descriptors_growth", "threads_growth")
Series = dict[str, list[float]]


@contextmanager
def service(model: Path, workers: int, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Serve a copy of a model from a folder; yield the process and its port, and kill it at last.

    Raises:
        RuntimeError: It did not start.
    """
    models = folder / "models"
    models.mkdir()
    replace(model, models)
    command = [sys.executable, "-m", "ghm_triton.cli", "serve", str(models), "--port", "0"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GHM_")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=plain,
            start_new_session=True,
        )
        try:
            lines = iter(process.stdout or ())
            address = next((line for line in lines if line.startswith("serving at")), None)
            if address is None:
                raise RuntimeError(f"the service did not start:\n{(folder / 'log').read_text()}")
            yield process, int(address.rpartition(":")[2])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def replace(model: Path, folder: Path) -> None:
    """Put a new file in the place of the served model, which the service then loads."""
    fresh = folder / ".fresh"
    shutil.copyfile(model, fresh)
    fresh.replace(folder / model.name)


def probe(port: int) -> float:
    """Milliseconds of `/health/live` over a new connection; infinite without a 200 answer."""
    connection, started = HTTPConnection("127.0.0.1", port, timeout=10), perf_counter()
    try:
        connection.request("GET", "/health/live")
        status = connection.getresponse().status
    except (OSError, HTTPException):
        return float("inf")
    finally:
        connection.close()
    return (perf_counter() - started) * 1000 if status == 200 else float("inf")


def weigh(pid: int) -> tuple[float, int, int]:
    """Resident megabytes, descriptors and threads of a process; zeros if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0.0, 0, 0
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    kilobytes = int(fields.get("VmRSS", "0").split()[0])
    return kilobytes * 1024 / 1e6, descriptors, int(fields["Threads"])


def watch(
    process: subprocess.Popen[str], port: int, seconds: float, model: Path, models: Path
) -> Row:
    """Record the series while the traffic runs, and replace the model from time to time.

    Returns:
        The series, their summary, the number of workers that were replaced and of reloads.

    Raises:
        RuntimeError: The service ended.
    """
    series: Series = {}
    latencies: list[float] = []
    warm_latencies: list[float] = []
    started, reloads, seen = monotonic(), 0, set(tree(process.pid))
    first = len(seen)
    while (now := monotonic() - started) < seconds:
        latencies.append(probe(port))
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with {process.returncode}")
        if now >= (reloads + 0.5) * REPLACE_SECONDS:
            replace(model, models)
            reloads += 1
        if now >= (len(series.get("seconds", ())) + 1) * SAMPLE_SECONDS:
            seen.update(tree(process.pid))
            for name, value in {"seconds": now, **sample(process.pid, latencies)}.items():
                series.setdefault(name, []).append(value)
            warm_latencies += latencies if now > WARM_UP * seconds else []
            latencies = []
        sleep(PROBE_SECONDS)
    return {
        **summary(series),
        "live_p99_ms": _quantile(warm_latencies, 0.99),
        "live_worst_ms": _quantile(warm_latencies, 1.0),
        "probes": len(warm_latencies),
        "workers_replaced": len(seen) - first,
        "reloads": reloads,
        "series": series,
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return round(float(np.quantile(values, share, method="higher")), 2)


def sample(pid: int, latencies: Sequence[float]) -> dict[str, float]:
    """Weigh the supervisor and its descendants; the latencies are those since the last sample."""
    supervisor = weigh(pid)
    workers = [weigh(each) for each in tree(pid)[1:]]
    everything = np.array([supervisor, *workers])
    return {
        "supervisor_mb": supervisor[0],
        "workers_mb": sum(megabytes for megabytes, *_ in workers),
        "descriptors": float(everything[:, 1].sum()),
        "threads": float(everything[:, 2].sum()),
        "live_p50_ms": _quantile(latencies, 0.5),
        "live_p99_ms": _quantile(latencies, 0.99),
    }


def summary(series: Series) -> Row:
    """Slope of the memory, growth of descriptors and threads, and latency, after the warm-up."""
    seconds = np.array(series["seconds"])
    warm = seconds >= WARM_UP * seconds[-1]
    found: Row = {}
    memory = (np.array(series["supervisor_mb"]) + series["workers_mb"])[warm]
    slope = np.polyfit(seconds[warm] / 3600, memory, 1)[0] if warm.sum() > 1 else 0.0
    found["rss_mb_per_hour"] = round(float(slope), 3)
    found["rss_mb"] = round(float(np.median(memory)), 1)
    for name in ("descriptors", "threads"):
        values = np.array(series[name])[warm]
        quarter = max(1, len(values) // 4)
        found[f"{name}_growth"] = float(np.median(values[-quarter:]) - np.median(values[:quarter]))
    found["live_p50_ms"] = round(float(np.median(np.array(series["live_p50_ms"])[warm])), 2)
    return found


def shortened(series: Series) -> Series:
    """Means over at most `POINTS` equal stretches, rounded."""
    count = min(POINTS, len(series["seconds"]))
    parts = {name: np.array_split(np.array(values), count) for name, values in series.items()}
    return {name: [round(float(x.mean()), 2) for x in split] for name, split in parts.items()}


def draw(series: Series, row: Row, path: Path) -> None:
    """Draw memory, descriptors and threads, and latency over the minutes of the run."""
    minutes = np.array(series["seconds"]) / 60
    figure = Figure(figsize=(7, 6.5), layout="constrained")
    memory, counts, latency = figure.subplots(3, 1, sharex=True)
    for axes, names, label in (
        (memory, {"workers_mb": "workers", "supervisor_mb": "supervisor"}, "resident MB"),
        (counts, {"descriptors": "descriptors", "threads": "threads"}, "number"),
        (latency, {"live_p50_ms": "median", "live_p99_ms": "99 %"}, "/health/live, ms"),
    ):
        for name, title in names.items():
            axes.plot(minutes, series[name], linewidth=1, label=title)
        axes.set(ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", ncols=2)
        axes.axvspan(0, WARM_UP * minutes[-1], color="#eeeeee")  # warm-up
    memory.set_title(f"{row['rss_mb_per_hour']:+.2f} MB an hour after the warm-up (grey)")
    latency.set(yscale="log", xlabel="minutes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def measure(options: argparse.Namespace, folder: Path) -> Row:
    """Run the service and the traffic; return the row, with the whole series."""
    seconds = options.minutes * 60
    honest = options.images or sorted(CORPUS.glob("200-*"))
    refused = sorted(CORPUS.glob("4*"))
    with service(options.model, options.workers, folder) as (process, port):
        words = ["--port", str(port), "--seconds", str(seconds)]
        words += ["--images", *map(str, honest), "--bombs", *map(str, refused)]
        words += ["--clients", str(options.clients), "--attackers", str(options.attackers)]
        command = [sys.executable, "-m", "benchmarks.soak_traffic", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as traffic:
            try:
                row = watch(process, port, seconds, options.model, folder / "models")
                outcomes, _ = traffic.communicate(timeout=600)
            finally:
                traffic.kill()
        process.terminate()
        row["exit_status"] = process.wait(120)
    sent = json.loads(outcomes)
    row["lost_by_reason"] = sent.pop("lost")
    row["lost"] = sum(row["lost_by_reason"].values())
    row["tracebacks"] = (folder / "log").read_text().count("Traceback")
    asked = {
        name: getattr(options, name) for name in ("minutes", "workers", "clients", "attackers")
    }
    return {"model": options.model.stem, **asked, **row, **sent}


def broken(row: Row) -> list[str]:
    """List the bounds that a row does not hold; those on growth only of a long run."""
    long = row["minutes"] >= MEANINGFUL_MINUTES
    return [
        f"{name} is {row[name]}, which is above {bound}"
        for name, bound in BOUNDS.items()
        if row[name] > bound and (long or name not in GROWTH)
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write, draw and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="a detector of ghm export")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4, help="honest clients (default: 4)")
    parser.add_argument("--attackers", type=int, default=1, help="of each hostile shape")
    parser.add_argument("--images", type=Path, nargs="+", help="honest files, not the tests'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; appended to")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    series = row.pop("series")
    problems = broken(row)
    draw(series, row, options.plot)
    Rows(options.out, provenance()).add({**row, "series": shortened(series)})
    print(json.dumps(row, indent=2))
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
