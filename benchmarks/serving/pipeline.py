"""From the bytes of an image to the answer's JSON without a server: the baseline.

Decoding, letterboxing, inference and the answer are functions of the service, so that contenders
differ only in how they serve.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.processes import resident_bytes
from export.file import read_detector
from ghm_triton.images.decode import decode
from service.api.pipeline import image_answer
from service.core.detections import DetectOptions, resolve
from service.engine.session import ServedModel
from service.images import prepare


class Pipeline:
    """A detector that takes the bytes of an image.

    Args:
        path: The detector's file.
        threads: Threads of one inference.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.model = ServedModel(read_detector(path), provider="cpu", threads=threads)
        self.wanted = resolve(DetectOptions.model_validate({}), self.model.card)
        self.model.warm_up()

    def __call__(self, content: bytes) -> dict[str, Any]:
        """Return the answer for one image."""
        row, geometry = self.prepare(content)
        return self.infer(row, geometry)

    def prepare(self, content: bytes) -> tuple[np.ndarray, Any]:
        """Return a row of the model's input and its geometry."""
        return prepare(decode(content), self.model.card)

    def infer(self, row: np.ndarray, geometry: Any) -> dict[str, Any]:
        """Return the answer for a row."""
        found = self.model.detect(
            row[None], self.wanted.class_thresholds, self.wanted.iou_threshold
        )[0]
        return image_answer(geometry, found, self.wanted, self.model.card)


def main() -> None:
    """Read numbers of seconds from stdin; for each, measure and print images per second."""
    import orjson

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    contents = [path.read_bytes() for path in arguments.images]
    before = resident_bytes()
    pipeline = Pipeline(arguments.model, arguments.threads)
    for content in contents[:8]:
        pipeline(content)
    print(resident_bytes() - before, flush=True)  # what the model itself weighs
    for line in sys.stdin:
        done, started, cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - started) < float(line):
            orjson.dumps(pipeline(contents[done % len(contents)]))
            done += 1
        print(done / elapsed, (time.process_time() - cpu) / done * 1000, flush=True)


if __name__ == "__main__":
    main()
