"""The whole road, with nothing replaced: the same detections from checkpoint, file and service."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from export.file import read_detector
from ghm_triton import cli
from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.evaluate import Detections, Predict, detect, torch_predictor
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from service.engine.session import ServedModel
from service.images.decode import decode, letterbox

# The contract's: boxes in pixels, scores. Runtimes sum convolutions in different orders.
BOX, SCORE = 0.1, 1e-4


@dataclass
class Road:
    data: str
    checkpoint: Path
    onnx: Path
    dataset: DetectionDataset


def travel(out: Path, data: str, flags: list[str]) -> Road:
    """Train, export and verify by command."""
    checkpoint, onnx = out / "checkpoint.pt", out / "detector.onnx"
    train = ["train", "--out", str(out), "--data", data, "--device", "cpu", *flags]
    assert cli.main(train) == 0
    export = ["export", str(checkpoint), "--out", str(onnx), "--policy", "fixed=0.05"]
    assert cli.main(export) == 0
    verify = ["verify", str(onnx), "--checkpoint", str(checkpoint), "--data", data, "--images", "9"]
    assert cli.main(verify) == 0
    return Road(data, checkpoint, onnx, open_dataset(data, "test"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Road:
    flags = "--steps 60 --batch-size 8 --channels 24 --head-convs 1"
    data = "digits:held_out_images=24"
    return travel(tmp_path_factory.mktemp("digits"), data, flags.split())


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Road:
    root = os.environ.get("BCCD_ROOT")
    if not root:
        pytest.skip("BCCD_ROOT is not set: no blood cells to train on")
    flags = "--image-size 128x160 --steps 60 --batch-size 8 --channels 24 --head-convs 1"
    return travel(tmp_path_factory.mktemp("cells"), f"voc:{root}", flags.split())


@pytest.fixture(
    params=["digits", pytest.param("cells", marks=[pytest.mark.bccd, pytest.mark.slow])]
)
def road(request: pytest.FixtureRequest) -> Road:
    return request.getfixturevalue(request.param)


def by_checkpoint(road: Road) -> list[Detections]:
    saved = Checkpoint.load(road.checkpoint)
    thresholds = torch.tensor(read_detector(road.onnx).card.class_thresholds)
    predict = torch_predictor(DeployedDetector(saved.detector()), thresholds)
    return [found for _, found in detect(predict, saved.config, road.dataset)]


def by_file(road: Road) -> list[Detections]:
    model = ServedModel(read_detector(road.onnx), provider="cpu")
    config = Checkpoint.load(road.checkpoint).config
    return [found for _, found in detect(runtime(model), config, road.dataset, batch_size=5)]


def runtime(model: ServedModel) -> Predict:
    """The service's session, called as `detect` calls a checkpoint."""

    def predict(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answers = model.detect(images.numpy())
        counts = torch.tensor([len(answer.scores) for answer in answers])
        columns = zip(*((a.boxes, a.scores, a.labels) for a in answers), strict=True)
        padded = [
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.array(x)) for x in c], True)
            for c in columns
        ]
        return (*padded, counts)

    return predict


def by_service(road: Road) -> list[Detections]:
    with serving(road.onnx) as url, httpx.Client(base_url=url, timeout=60) as client:
        answers = []
        for index in range(len(road.dataset)):
            answer = client.post("/v1/detect", content=posted(road.dataset, index))
            assert answer.status_code == 200, answer.text
            answers.append(as_tensors(answer.json()["detections"]))
    return answers


def by_crowd(road: Road) -> list[Detections]:
    """Many clients at once send lists of one to five images; the service batches as it can."""
    order = np.random.default_rng(0).permutation(len(road.dataset)).tolist()
    sizes = [1, 2, 3, 4, 5] * len(order)
    lists = []
    while order:
        size = sizes[len(lists)]
        lists.append(order[:size])
        order = order[size:]
    found: dict[int, Detections] = {}
    flags = ("--batch-size", "8", "--queue-size", "1000")
    with (
        serving(road.onnx, *flags) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(12) as pool,
    ):

        def ask(indices: list[int]) -> None:
            files = [("files", (f"{i}.png", posted(road.dataset, i))) for i in indices]
            answer = client.post("/v1/detect", files=files)
            assert answer.status_code == 200, answer.text
            for index, result in zip(indices, answer.json()["results"], strict=True):
                found[index] = as_tensors(result["detections"])

        list(pool.map(ask, lists))
    return [found[index] for index in range(len(road.dataset))]


def as_tensors(detections: list[dict]) -> Detections:
    return Detections(
        torch.tensor([d["box"] for d in detections]).view(-1, 4),
        torch.tensor([d["score"] for d in detections]),
        torch.tensor([d["label"] for d in detections], dtype=torch.int64),
    )


def posted(dataset: DetectionDataset, index: int) -> bytes:
    """The held-out image as a lossless upload."""
    from io import BytesIO

    stream = BytesIO()
    dataset[index].image.save(stream, "PNG")
    return stream.getvalue()


@contextmanager
def serving(onnx: Path, *flags: str) -> Iterator[str]:
    """`ghm serve` in a process of its own; yields its address."""
    serve = ["serve", str(onnx), "--port", "0", *flags]
    command = [sys.executable, "-u", "-m", "ghm_triton.cli", *serve]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        try:
            address = next(line.split()[-1] for line in server.stdout if "serving at" in line)
            yield address
        finally:
            server.terminate()


def assert_same(ours: list[Detections], theirs: list[Detections], threshold: float) -> int:
    """Every detection has its twin; one at the very threshold may be on one side only."""
    assert len(ours) == len(theirs)
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        free = set(range(len(b.scores)))
        for box, score, label in zip(a.boxes, a.scores, a.labels, strict=True):
            twin = next(
                (
                    j
                    for j in sorted(free)
                    if int(b.labels[j]) == int(label)
                    and abs(float(b.scores[j] - score)) <= SCORE
                    and float((b.boxes[j] - box).abs().max()) <= BOX
                ),
                None,
            )
            if twin is None:
                assert float(score) <= threshold + SCORE, (box, score, label)
                continue
            free.discard(twin)
            compared += 1
        assert all(float(b.scores[j]) <= threshold + SCORE for j in free)
    return compared


@pytest.mark.slow
def test_checkpoint_file_and_service_detect_the_same_on_every_held_out_image(road):
    checkpoint, file, service = by_checkpoint(road), by_file(road), by_service(road)
    assert assert_same(checkpoint, file, 0.05) > 3 * len(road.dataset)
    assert assert_same(checkpoint, service, 0.05) > 3 * len(road.dataset)


@pytest.mark.slow
def test_the_service_detects_the_same_in_any_batch_and_any_crowd(road):
    assert assert_same(by_checkpoint(road), by_crowd(road), 0.05) > 3 * len(road.dataset)


def test_training_and_serving_prepare_images_bit_for_bit_alike(road):
    saved, card = Checkpoint.load(road.checkpoint), read_detector(road.onnx).card
    from ghm_triton.detection.data.transforms import Letterbox

    for index in range(5):
        ours, _ = Letterbox(saved.config)(road.dataset[index].image)
        image = decode(posted(road.dataset, index), 10**8)
        theirs, _ = letterbox(image, card.preprocessing)
        assert np.array_equal(ours.numpy(), theirs)


def test_the_card_tells_where_the_thresholds_come_from(road):
    card, saved = read_detector(road.onnx).card, Checkpoint.load(road.checkpoint)
    assert card.threshold_policy == "fixed=0.05"
    assert card.statistics.anchors == saved.statistics.anchors > 0
    assert [t.support for t in card.thresholds] == saved.statistics.positives.tolist()
    assert card.training.data.startswith(road.dataset.name)
    assert "/" not in card.training.data  # no folder of this machine
