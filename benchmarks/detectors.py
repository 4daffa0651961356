"""Average precision of each detector, and the cost of its post-processing.

Trains each detector on the same scenes in the same number of steps and reports average precision on
the test split. `--cost` times each exported file and its network alone, in turns in one process, on
one thread. One JSON line per measurement, with provenance; recorded ones are not repeated.

    python -m benchmarks.detectors --steps 600
    python -m benchmarks.detectors --cost
    python -m benchmarks.detectors --table
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, latest, markdown, read
from benchmarks.trainings import precision_on_test, trained
from export.graph import build_graph
from export.runtimes import open_session
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.config import TrainOptions

RESULTS = Path(__file__).parent / "results" / "detectors.jsonl"
LEARNT, COST = "learnt", "cost"
ROUNDS = 20
# Networks to time: a very small one and one of common size.
NETWORKS = {"tiny": (128, 128), "resnet18": (320, 320)}
CHOSEN = 1000  # scores that reach their threshold in the image with the most
# Fields of the configuration and options of training that differ from the defaults.
DETECTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "retinanet": ({}, {}),
    "fcos": ({"architecture": "fcos"}, {"reg_loss": "giou"}),
    "faster-rcnn": ({"architecture": "faster-rcnn"}, {}),
    "faster-rcnn, softmax": (
        {"architecture": "faster-rcnn", "classifier": "softmax"},
        {"cls_loss": "ce", "reg_loss": "sl1"},
    ),
}


def main() -> None:
    """Run the missing measurements, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--cost", action="store_true", help="time instead of training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        rows = Rows(arguments.out, provenance())
        for name in arguments.detectors:
            if arguments.cost:
                for backbone in NETWORKS:
                    key = {"stage": COST, "detector": name, "backbone": backbone}
                    if not rows.here(key):
                        print(rows.add({**key, **cost(name, backbone)}), flush=True)
                continue
            for seed in arguments.seeds:
                key = {"stage": LEARNT, "detector": name, "seed": seed}
                key |= {"steps": arguments.steps, "data": arguments.data}
                if not rows.here(key):
                    print(rows.add({**key, **learn(name, seed, arguments)}), flush=True)
    print(table(read(arguments.out)))


def learn(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate on the test split."""
    built, trained_by = DETECTORS[name]
    options = TrainOptions(data=arguments.data, steps=arguments.steps, seed=seed, **trained_by)
    started = time.process_time()
    saved = trained(options, image_size=(128, 128), channels=48, **built)
    seconds = time.process_time() - started
    rounded = {key: round(ap, 4) for key, ap in precision_on_test(saved, arguments.data).items()}
    return {**rounded, "processor_seconds": round(seconds, 1)}


class Network(nn.Module):
    """A detector without post-processing; the regions of a two-stage detector are constants.

    Args:
        detector: The complete detector.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        if isinstance(detector, FasterRCNNDetector):
            with torch.no_grad():
                levels = detector.features(torch.randn(1, 3, *detector.config.image_size))
                regions, exist = detector.rpn.propose(list(levels.values()))
            self.register_buffer("regions", regions)
            self.register_buffer("exist", exist)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the last layers for an image `[1, 3, H, W]`."""
        detector = self.detector
        if not isinstance(detector, FasterRCNNDetector):
            return tuple(detector.outputs(images).values())  # type: ignore[operator]
        levels = detector.features(images)
        objectness, deltas = detector.rpn.head(list(levels.values()))
        pooled = detector.pool(levels, self.regions, self.exist)  # type: ignore[arg-type]
        return (*detector.classify(pooled), *objectness, *deltas)


def cost(name: str, backbone: str) -> dict[str, Any]:
    """Processor time of the network alone, and of the file at two sets of thresholds."""
    torch.manual_seed(0)
    config = DetectorConfig(
        tuple("abcdefghij"), NETWORKS[backbone], backbone=backbone, **DETECTORS[name][0]
    )
    detector = build_detector(config).eval()
    images = torch.randn(1, 3, *config.image_size)
    program = torch.onnx.export(
        Network(detector).eval(),
        (images,),
        input_names=["images"],
        dynamo=True,
        opset_version=18,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    network = open_session(program.model_proto.SerializeToString(), threads=1)
    classes = [0.5] * config.num_classes
    file = open_session(build_graph(detector, classes, 0.5).SerializeToString(), threads=1)
    with torch.inference_mode():
        scores = detector.predict(images).scores.flatten()
    busy = float(scores.topk(min(CHOSEN, len(scores))).values[-1])
    feeds = {
        "network": (network, {}),
        "quiet": (file, {"class_thresholds": np.ones(config.num_classes, np.float32)}),
        "busy": (file, {"class_thresholds": np.full(config.num_classes, busy, np.float32)}),
    }
    spent: dict[str, list[float]] = {key: [] for key in feeds}
    for _ in range(ROUNDS):
        for key, (session, more) in feeds.items():
            started = time.thread_time()  # of this thread, regardless of other load
            session.run(None, {"images": images.numpy(), **more})
            spent[key].append(time.thread_time() - started)
    medians = {key: statistics.median(times[2:]) * 1e3 for key, times in spent.items()}
    shares = {
        f"{key}_share": round(medians[key] / medians["network"] - 1, 4) for key in ("quiet", "busy")
    }
    about = {"image_size": list(config.image_size), "network_ms": round(medians["network"], 2)}
    return {**about, **shares, "rounds": ROUNDS}


def table(rows: list[Row]) -> str:
    """Format two tables: precision over seeds, and the newest cost of each network."""
    runs: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["stage"] == LEARNT:
            runs.setdefault((row["detector"], row["steps"]), []).append(row)
    averages = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}
    learnt = [
        {"detector": name, "steps": steps, "seeds": len(own)}
        | {head: f"{statistics.mean(r[key] for r in own):.3f}" for head, key in averages.items()}
        for (name, steps), own in runs.items()
    ]
    costs = latest((row for row in rows if row["stage"] == COST), ("detector", "backbone"))
    timed = [
        {
            "detector": row["detector"],
            "network": f"{row['backbone']}, {'x'.join(map(str, row['image_size']))}",
            "its latency, ms": f"{row['network_ms']:.2f}",
            "choosing none": f"{row['quiet_share']:+.1%}",
            f"choosing among {CHOSEN:,}": f"{row['busy_share']:+.1%}",
        }
        for row in costs
    ]
    return f"{markdown(learnt)}\n\n{markdown(timed)}"


if __name__ == "__main__":
    main()
