"""Every detector from training to served detections, with nothing replaced."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from os import environ
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from export.card import INPUT, OUTPUTS, DetectorCard
from export.file import read_detector
from export.runtimes import open_session
from ghm_triton import cli
from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import Detections, detect, torch_predictor
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.images.decode import decode
from service.app import create_app
from service.core.settings import Settings
from service.engine.session import ServedModel
from service.images import letterbox

# The contract's: boxes in pixels, scores. Runtimes sum convolutions in different orders.
BOX, SCORE = 0.1, 1e-4
THRESHOLD = 0.05
CELLS = f"voc:{environ.get('BCCD_ROOT')}"
RETINANET = "--steps 60 --batch-size 8 --channels 24 --head-convs 1"
SMALL = "--image-size 96x96 --channels 16 --head-convs 1 --steps 30 --batch-size 8"
FASTER = f"{SMALL} --detector faster-rcnn --proposals 50 --region-samples 32"
SCENES = "digits:images=64,held_out_images=9,size=96"
ROADS = {
    "digits": ("digits:held_out_images=24", RETINANET),
    "cells": (CELLS, f"{RETINANET} --image-size 128x160"),
    "fcos": (SCENES, f"{SMALL} --detector fcos --prior 0.05"),
    "faster-rcnn": (SCENES, f"{FASTER} --prior 0.05"),
    "clean": (SCENES, f"{FASTER} --assigner cleanliness --adversarial asdn+astn --prior 0.05"),
    "softmax": (SCENES, f"{FASTER} --cls-loss ce"),
}
# The first lane has two; the others train for as long.
SLOW = {road: [pytest.mark.slow] for road in ROADS if road not in ("digits", "fcos")}
SLOW["cells"] += [
    pytest.mark.bccd,
    pytest.mark.skipif("BCCD_ROOT" not in environ, reason="BCCD_ROOT is not set"),
]


@dataclass
class Road:
    """A detector that was trained, exported and verified by command."""

    checkpoint: Checkpoint
    onnx: Path
    verified: str
    dataset: DetectionDataset

    @property
    def card(self) -> DetectorCard:
        return read_detector(self.onnx).card

    def posted(self, index: int) -> bytes:
        """A held-out image as a lossless upload."""
        stream = BytesIO()
        self.dataset[index].image.save(stream, "PNG")
        return stream.getvalue()

    def by_checkpoint(self) -> list[Detections]:
        thresholds = torch.tensor(self.card.class_thresholds)
        predict = torch_predictor(DeployedDetector(self.checkpoint.detector()), thresholds)
        return [found for _, found in detect(predict, self.checkpoint.config, self.dataset)]

    def by_service(self, client: httpx.Client) -> list[Detections]:
        answers = []
        for index in range(len(self.dataset)):
            answer = client.post("/v1/detect", content=self.posted(index))
            assert answer.status_code == 200, answer.text
            answers.append(as_tensors(answer.json()["detections"]))
        return answers

    def by_crowd(self, client: httpx.Client) -> list[Detections]:
        """Many clients at once send lists of one to five images; the service batches as it can."""
        order = np.random.default_rng(0).permutation(len(self.dataset)).tolist()
        lists, found = [], {}
        while order:
            size = len(lists) % 5 + 1
            lists.append(order[:size])
            order = order[size:]

        def ask(indices: list[int]) -> None:
            files = [("files", (f"{i}.png", self.posted(i))) for i in indices]
            answer = client.post("/v1/detect", files=files)
            assert answer.status_code == 200, answer.text
            for index, result in zip(indices, answer.json()["results"], strict=True):
                found[index] = as_tensors(result["detections"])

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(ask, lists))
        return [found[index] for index in range(len(self.dataset))]


def as_tensors(detections: list[dict]) -> Detections:
    return Detections(
        torch.tensor([d["box"] for d in detections]).view(-1, 4),
        torch.tensor([d["score"] for d in detections]),
        torch.tensor([d["label"] for d in detections], dtype=torch.int64),
    )


@pytest.fixture(scope="module", params=[pytest.param(r, marks=SLOW.get(r, [])) for r in ROADS])
def road(request, tmp_path_factory):
    data, flags = ROADS[request.param]
    out = tmp_path_factory.mktemp(request.param)
    onnx, saved = out / "detector.onnx", out / "checkpoint.pt"
    train = ["train", "--out", str(out), "--data", data, "--device", "cpu", *flags.split()]
    assert cli.main(train) == 0
    assert cli.main(["export", str(saved), "--out", str(onnx), "--policy", "fixed=0.05"]) == 0
    with redirect_stdout(StringIO()) as verified:
        code = cli.main(["verify", str(onnx), "--checkpoint", str(saved), "--images", "9"])
    assert code == 0, verified.getvalue()
    return Road(Checkpoint.load(saved), onnx, verified.getvalue(), open_dataset(data, "test"))


@contextmanager
def serving(onnx: Path, *flags: str) -> Iterator[httpx.Client]:
    """`ghm serve` in a process of its own, and a client of it."""
    serve = ["serve", str(onnx), "--port", "0", *flags]
    command = [sys.executable, "-u", "-m", "ghm_triton.cli", *serve]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        try:
            address = next(line.split()[-1] for line in server.stdout if "serving at" in line)
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client
        finally:
            server.terminate()


def assert_same(ours: list[Detections], theirs: list[Detections], least: int) -> None:
    """Every detection has its twin; one at the very threshold may be on one side only."""
    assert len(ours) == len(theirs)
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        free = set(range(len(b.scores)))
        for box, score, label in zip(a.boxes, a.scores, a.labels, strict=True):
            close = (b.labels == label) & ((b.scores - score).abs() <= SCORE)
            close &= (b.boxes - box).abs().amax(1) <= BOX
            twins = free.intersection(close.nonzero().flatten().tolist())
            if twins:
                free.discard(min(twins))
                compared += 1
            else:
                assert float(score) <= THRESHOLD + SCORE, (box, score, label)
        assert all(float(b.scores[j]) <= THRESHOLD + SCORE for j in free)
    assert compared > least


def test_the_file_passes_verify_in_all_batches(road):
    assert "9 images" in road.verified
    assert road.verified.count("every class shown") == 3  # batches of 1, 3 and 8


def test_checkpoint_and_service_detect_the_same_on_every_held_out_image(road):
    model = ServedModel(read_detector(road.onnx), provider="cpu")
    model.warm_up()  # until then the service is not ready
    with TestClient(create_app(Settings(model=road.onnx), model)) as client:
        assert_same(road.by_checkpoint(), road.by_service(client), 3 * len(road.dataset))


@pytest.mark.slow
def test_a_process_of_its_own_detects_the_same_alone_in_batches_and_in_a_crowd(road):
    expected, least = road.by_checkpoint(), 3 * len(road.dataset)
    with serving(road.onnx, "--batch-size", "8", "--queue-size", "1000") as client:
        assert_same(expected, road.by_service(client), least)
        assert_same(expected, road.by_crowd(client), least)


def test_training_and_serving_prepare_images_bit_for_bit_alike(road):
    for index in range(5):
        ours, _ = Letterbox(road.checkpoint.config)(road.dataset[index].image)
        theirs, _ = letterbox(decode(road.posted(index), 10**8), road.card.preprocessing)
        assert np.array_equal(ours.numpy(), theirs)


def test_one_file_takes_any_batch_up_to_64(road):
    session = open_session(road.onnx.read_bytes())
    generator = np.random.default_rng(0)
    size = road.checkpoint.config.image_size
    images = generator.standard_normal((64, 3, *size)).astype(np.float32)
    whole = session.run(list(OUTPUTS), {INPUT: images})
    for i in (0, 31, 63):
        alone = session.run(list(OUTPUTS), {INPUT: images[i : i + 1]})
        assert whole[3][i] == alone[3][0] > 0
        # The same file and runtime; a matrix product of 64 images is summed in another order.
        assert np.allclose(np.sort(whole[1][i]), np.sort(alone[1][0]), rtol=0, atol=1e-5)


def test_the_card_names_the_detector_its_training_and_the_source_of_its_thresholds(road):
    card, saved = road.card, road.checkpoint
    assert card.architecture == saved.config.architecture
    assert card.name == f"{card.architecture}-tiny"
    assert card.training.losses["reg_loss"] == ("giou" if card.architecture == "fcos" else "ghm")
    assert card.threshold_policy == "fixed=0.05"
    assert card.statistics.anchors == saved.statistics.anchors > 0
    assert [t.support for t in card.thresholds] == saved.statistics.positives.tolist()
    assert card.training.data.startswith(road.dataset.name)
    assert "/" not in card.training.data  # no folder of this machine
