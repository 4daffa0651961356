"""Every detector travels the whole road: from its checkpoint to its file to the service's answer.

RetinaNet's own journey, by command and over a socket, is in test_road.py.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from export.card import INPUT, OUTPUTS
from export.file import read_detector
from export.verify.side_by_side import _proposals
from ghm_triton import cli
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.evaluate import Detections, detect, torch_predictor
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from service.app import create_app
from service.core.settings import Settings
from service.engine.session import ServedModel

# The contract's: boxes in pixels, scores. Runtimes sum convolutions in different orders.
BOX, SCORE = 0.1, 1e-4
THRESHOLD = 0.05
DATA = "digits:images=64,held_out_images=9,size=96"
COMMON = "--image-size 96x96 --channels 16 --head-convs 1 --steps 30 --batch-size 8 --device cpu"
KINDS = {
    "fcos": "--detector fcos --prior 0.05",
    "faster-rcnn": "--detector faster-rcnn --proposals 50 --region-samples 32 --prior 0.05",
    "clean": "--detector faster-rcnn --proposals 50 --region-samples 32 --assigner cleanliness"
    " --adversarial asdn+astn --prior 0.05",
    "softmax": "--detector faster-rcnn --cls-loss ce --proposals 50 --region-samples 32",
}


@dataclass
class Travelled:
    checkpoint: Path
    onnx: Path
    report: str


# The first lane has one kind; the others train for as long.
LANES = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "fcos")) for kind in KINDS]


@pytest.fixture(scope="module", params=LANES)
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Travelled:
    """Trained and exported by command."""
    out = tmp_path_factory.mktemp(request.param)
    onnx, checkpoint = out / "detector.onnx", out / "checkpoint.pt"
    flags = [*COMMON.split(), *KINDS[request.param].split()]
    assert cli.main(["train", "--out", str(out), "--data", DATA, *flags]) == 0
    policy = ["--policy", f"fixed={THRESHOLD}"]
    assert cli.main(["export", str(checkpoint), "--out", str(onnx), *policy]) == 0
    return Travelled(checkpoint, onnx, request.param)


@pytest.mark.slow
def test_the_file_passes_verify(detector, capsys):
    """On every held-out image, in batches of 1, 3 and 8."""
    words = ["verify", str(detector.onnx), "--checkpoint", str(detector.checkpoint)]
    code = cli.main(words)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "9 images" in printed
    assert printed.count("every class shown") == 3


def by_checkpoint(path: Path) -> list[Detections]:
    saved = Checkpoint.load(path)
    thresholds = torch.full((10,), THRESHOLD)
    predict = torch_predictor(DeployedDetector(saved.detector()), thresholds)
    dataset = open_dataset(DATA, "test")
    return [found for _, found in detect(predict, saved.config, dataset)]


def by_service(path: Path) -> list[Detections]:
    model = ServedModel(read_detector(path), provider="cpu")
    model.warm_up()  # until then the service is not ready
    answers = []
    dataset = open_dataset(DATA, "test")
    with TestClient(create_app(Settings(model=path), model)) as client:
        for index in range(len(dataset)):
            stream = io.BytesIO()
            dataset[index].image.save(stream, "PNG")
            answer = client.post("/v1/detect", content=stream.getvalue())
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["detections"])
    return [
        Detections(
            torch.tensor([d["box"] for d in found]).view(-1, 4),
            torch.tensor([d["score"] for d in found]),
            torch.tensor([d["label"] for d in found], dtype=torch.int64),
        )
        for found in answers
    ]


def test_the_service_answers_what_the_checkpoint_detects(detector):
    ours, theirs = by_checkpoint(detector.checkpoint), by_service(detector.onnx)
    assert len(ours) == len(theirs) == 9
    assert sum(len(x.scores) for x in ours) > 30
    assert sum(len(unmatched(a, b)) for a, b in zip(ours, theirs, strict=True)) == 0
    assert sum(len(unmatched(b, a)) for a, b in zip(ours, theirs, strict=True)) == 0


def unmatched(ours: Detections, theirs: Detections) -> list[Tensor]:
    """Boxes of ours without a twin, but for those at the very threshold."""
    alone = []
    for box, score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
        same = (theirs.labels == label) & ((theirs.scores - score).abs() <= SCORE)
        same &= (theirs.boxes - box).abs().amax(1) <= BOX
        if not bool(same.any()) and float(score) > THRESHOLD + SCORE:
            alone.append(box)
    return alone


def test_one_file_takes_any_batch_up_to_64(detector):
    session = onnxruntime.InferenceSession(detector.onnx, providers=["CPUExecutionProvider"])
    config = Checkpoint.load(detector.checkpoint).config
    generator = np.random.default_rng(0)
    images = generator.standard_normal((64, 3, *config.image_size)).astype(np.float32)
    whole = session.run(list(OUTPUTS), {INPUT: images})
    one = [session.run(list(OUTPUTS), {INPUT: images[i : i + 1]}) for i in (0, 31, 63)]
    for i, alone in zip((0, 31, 63), one, strict=True):
        assert whole[3][i] == alone[3][0] > 0
        # The same file and runtime; a matrix product of 64 images is summed in another order.
        assert np.allclose(np.sort(whole[1][i]), np.sort(alone[1][0]), rtol=0, atol=1e-5)


def test_the_card_names_the_detector_and_what_it_learnt(detector):
    card, saved = read_detector(detector.onnx).card, Checkpoint.load(detector.checkpoint)
    assert card.architecture == saved.config.architecture
    assert card.name == f"{card.architecture}-tiny"
    assert card.training.losses["reg_loss"] == ("giou" if card.architecture == "fcos" else "ghm")
    assert card.statistics.anchors == saved.statistics.anchors > 0
    assert [t.support for t in card.thresholds] == saved.statistics.positives.tolist()


def test_a_box_of_one_class_is_proposed_for_no_other():
    boxes = torch.arange(24.0).reshape(1, 2, 3, 4)
    scores = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
    (own,) = _proposals(Predictions(boxes, scores, scores))
    assert own.boxes.tolist() == boxes.reshape(6, 4).tolist()
    assert own.scores.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert own.scores.sum(1).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    (shared,) = _proposals(Predictions(boxes[:, :, :1], scores, scores))
    assert shared.boxes.tolist() == boxes[0, :, 0].tolist()
    assert shared.scores.tolist() == scores[0].tolist()
