"""A real detector for the service's tests: it finds patches of red, green and blue.

It is small enough to build in a moment and keeps the whole contract: overridable thresholds and
IoU, non-maximum suppression, padded and sorted outputs, any batch. A patch is a 16 x 16 box on a
grid of 8 pixels; its score for a colour is a sigmoid of how much of that colour its mean has.
"""

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnx.parser
import pytest
import uvicorn
from fastapi import FastAPI
from onnx import helper, numpy_helper
from PIL import Image
from starlette.testclient import TestClient

import export.file
from export.card import (
    CARD_KEY,
    IOU_INPUT,
    THRESHOLDS_INPUT,
    DetectorCard,
    Preprocessing,
    TrainingCard,
)
from export.file import read_detector
from export.preprocess import accept_uint8
from ghm_triton.evidence import ClassStatistics, ClassThreshold, as_float32
from service.app import create_app, load_model
from service.core.errors import ProblemError
from service.core.schema import ProblemDetails
from service.core.settings import Settings
from service.engine.session import ModelError, ServedModel

HEIGHT, WIDTH, CELL, STRIDE = 64, 96, 16, 8
CLASSES = ["red", "green", "blue"]
THRESHOLDS = [as_float32(value) for value in (0.5, 0.6, 0.7)]
MAX_DETECTIONS = 20
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def anchors() -> np.ndarray:
    """The boxes, float32 [A, 4], row by row."""
    rows = np.arange(0, HEIGHT - CELL + 1, STRIDE)
    columns = np.arange(0, WIDTH - CELL + 1, STRIDE)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([x, y, x + CELL, y + CELL], -1).reshape(-1, 4).astype(np.float32)


def make_card(**changes: object) -> DetectorCard:
    evidence = {"support": 100, "ground_truths": 50, "precision": 0.9, "recall": 0.8}
    thresholds = [
        ClassThreshold(name=name, threshold=threshold, source="policy", **evidence)
        for name, threshold in zip(CLASSES, THRESHOLDS, strict=True)
    ]
    fields = {
        "name": "colours",
        "architecture": "patches",
        "backbone": "mean colour",
        "class_names": CLASSES,
        "threshold_policy": "f1",
        "thresholds": thresholds,
        "iou_threshold": 0.25,
        "candidates": 1000,
        "max_detections": MAX_DETECTIONS,
        "preprocessing": Preprocessing(height=HEIGHT, width=WIDTH, mean=MEAN, std=STD),
        "statistics": ClassStatistics(
            changes.get("class_names", CLASSES),
            anchors=1000,
            positives=[100, 100, 100],
            ground_truths=[50, 50, 50],
            positive_scores=[[0, 1]] * 3,
            negative_scores=[[1, 0]] * 3,
        ),
        "training": TrainingCard(
            data="none", losses={}, seed=0, steps=0, versions={}, checkpoint_sha256="0" * 64
        ),
    }
    return DetectorCard.model_validate(fields | changes)


def colour_weights() -> tuple[np.ndarray, np.ndarray]:
    """Weights [C, 3] and bias [C] of logit = 8 * (own - the mean of the others) - 4."""
    of_colour = np.full((3, 3), -4.0) + 12.0 * np.eye(3)
    weights = of_colour * np.array(STD)  # the input is normalized; undo it here
    bias = of_colour @ np.array(MEAN) - 4.0
    return weights.astype(np.float32), bias.astype(np.float32)


# The last 17 nodes threshold, suppress, sort and pad the scores p, float [B, C, A].
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
colours (
  float[batch, 3, 64, 96] images, float[CLASSES] class_thresholds, float[1] iou_threshold
) => (
  float[batch, M, 4] boxes, float[batch, M] scores, int64[batch, M] labels,
  int64[batch] num_detections
) {
  mean = AveragePool <kernel_shape = [16, 16], strides = [8, 8]> (images)
  logits = Conv(mean, weights, bias)
  grid = Sigmoid(logits)
  p = Reshape(grid, dense)
  bars = Reshape(class_thresholds, per_class)
  stands = GreaterOrEqual(p, bars)
  candidates = Where(stands, p, minus_one)
  batch_size = Shape <start = 0, end = 1> (images)
  boxes_shape = Concat <axis = 0> (batch_size, boxes_tail)
  every_box = Expand(anchors, boxes_shape)
  kept = NonMaxSuppression(every_box, candidates, total_row, iou_threshold, zero_row)
  kept_scores = GatherND(candidates, kept)
  dense_shape = Shape(candidates)
  nothing = ConstantOfShape <value = float[1] {-1}> (dense_shape)
  survivors = ScatterND(nothing, kept, kept_scores)
  flat_scores = Reshape(survivors, flat)
  top, places = TopK <axis = 1> (flat_scores, k)
  found = GreaterOrEqual(top, zero)
  scores = Where(found, top, zero)
  class_of = Div(places, total)
  labels = Where(found, class_of, no_label)
  anchor_of = Mod(places, total)
  top_boxes = Gather(anchors, anchor_of)
  found_column = Unsqueeze(found, third)
  boxes = Where(found_column, top_boxes, zero)
  ones = Cast <to = 7> (found)
  num_detections = ReduceSum <keepdims = 0> (ones, second)
}
"""


def build_detector(card: DetectorCard) -> bytes:
    """A file that keeps the contract, with this card."""
    boxes = anchors()
    total, classes = len(boxes), len(card.class_names)
    weights, bias = colour_weights()
    initializers = {
        "weights": weights.reshape(classes, 3, 1, 1),
        "bias": bias,
        "anchors": boxes,
        "minus_one": np.array(-1, np.float32),
        "zero": np.array(0, np.float32),
        "zero_row": np.array([0], np.float32),
        "no_label": np.array(-1),
        "second": np.array([1]),
        "third": np.array([2]),
        "k": np.array([card.max_detections]),
        "total": np.array(total),
        "total_row": np.array([total]),
        "boxes_tail": np.array([total, 4]),
        "per_class": np.array([1, classes, 1]),
        "dense": np.array([0, classes, total]),
        "flat": np.array([0, classes * total]),
        THRESHOLDS_INPUT: np.array(card.class_thresholds, np.float32),
        IOU_INPUT: np.array([card.iou_threshold], np.float32),
    }
    model = onnx.parser.parse_model(GRAPH.replace("CLASSES", str(classes)))
    tensors = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    model.graph.initializer.extend(tensors)
    helper.set_model_props(model, {CARD_KEY: card.to_json()})
    return model.SerializeToString()


def make_scene(
    width: int, height: int, patches: dict[tuple[int, int, int, int], str]
) -> Image.Image:
    """A white image with coloured rectangles."""
    image = Image.new("RGB", (width, height), "white")
    for box, colour in patches.items():
        image.paste(colour, box)
    return image


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of tests that are coroutines, marked `anyio`."""
    return "asyncio"


@pytest.fixture(scope="session")
def encode():
    return encode_image


@pytest.fixture(scope="session")
def scene():
    return make_scene


@pytest.fixture(scope="session")
def card() -> DetectorCard:
    return make_card()


@pytest.fixture(scope="session")
def write_detector(tmp_path_factory: pytest.TempPathFactory):
    """Writes a detector whose card has some fields changed; returns the path."""

    def write(**changes: object) -> Path:
        path = tmp_path_factory.mktemp("model") / "colours.onnx"
        path.write_bytes(build_detector(make_card(**changes)))
        return path

    return write


@pytest.fixture(scope="session")
def detector(write_detector) -> Path:
    return write_detector()


@pytest.fixture(scope="session")
def endless_detector(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector whose inference does not end, but can be ended between two operators."""
    model = onnx.load(detector)
    graph, first = model.graph, model.graph.input[0].name
    body = onnx.parser.parse_graph(
        "body (int64 iteration, bool go, float sum) => (bool on, float next)"
        " { on = Identity(go) next = Add(sum, sum) }"
    )
    endless = [
        helper.make_node("ReduceMean", [first], ["start"], keepdims=0),
        helper.make_node("Loop", ["", "yes", "start"], ["end"], body=body),
        helper.make_node("Add", [first, "end"], ["delayed"]),
    ]
    for node in graph.node:
        node.input[:] = ["delayed" if name == first else name for name in node.input]
    nodes = [*endless, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    path = tmp_path_factory.mktemp("endless") / "endless.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="session")
def uint8_detector(detector: Path) -> Path:
    """The same detector, with letterbox and normalisation inside its graph."""
    path = detector.with_name("colours.uint8.onnx")
    model, card = accept_uint8(onnx.load(detector), read_detector(detector).card)
    export.file.write_detector(path, model, card)
    return path


@pytest.fixture(scope="session")
def uint8_model(uint8_detector: Path) -> ServedModel:
    model = ServedModel(read_detector(uint8_detector), provider="cpu")
    model.warm_up()
    return model


@pytest.fixture(scope="session")
def told(detector: Path):
    """Settings of a service, some of them changed."""

    def make(**changes: object) -> Settings:
        given = {"model": detector, "threads": 1, "inferences": 1, "provider": "cpu"}
        given["model_control"] = True
        return Settings(**given | changes)

    return make


@pytest.fixture(scope="session")
def settings(told) -> Settings:
    return told()


@pytest.fixture(scope="session")
def model(settings: Settings) -> ServedModel:
    model = load_model(settings)
    model.warm_up()
    return model


@pytest.fixture(scope="session")
def client(settings: Settings, model: ServedModel):
    with TestClient(create_app(settings, model)) as client:
        yield client


@pytest.fixture(scope="session")
def serve_with(told, model: ServedModel):
    """A client of a service with some settings changed."""

    def make(served: ServedModel | None = model, /, **changes: object) -> TestClient:
        return TestClient(create_app(told(**changes), served))

    return make


@contextmanager
def serve_app(app: FastAPI) -> Iterator[str]:
    """The address of a real server, in a thread. It listens before it is ready to answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve():
    return serve_app


@pytest.fixture(scope="session")
def ready_at():
    """Asks an address until its models have answered their warm-up; returns it."""

    def ask(url: str) -> str:
        for _ in range(10_000):
            if httpx.get(f"{url}/health/ready").is_success:
                return url
        raise AssertionError(f"{url} does not become ready")

    return ask


@pytest.fixture(scope="session")
def live_service(settings: Settings, model: ServedModel) -> Iterator[str]:
    """The address of a service that a browser, curl or another process can ask."""
    with serve_app(create_app(settings, model)) as url:
        yield url


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """Twice the model's size, so that boxes come back doubled; scores 0.98, 0.93 and 0.98."""
    patches = {
        (32, 32, 64, 64): "#ff0000",
        (128, 32, 160, 64): "#00d000",
        (64, 80, 96, 112): "#0000ff",
    }
    return make_scene(192, 128, patches)


@pytest.fixture(scope="session")
def png(image: Image.Image) -> bytes:
    return encode_image(image)


@pytest.fixture(scope="session")
def status_without_body():
    """The status that an application gives a client which never sends the body of its POST."""

    def ask(app: FastAPI, path: str) -> int:
        statuses = []

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            statuses.append(message.get("status"))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"9")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
        return statuses[0]

    return ask


@pytest.fixture(scope="session")
def problem():
    """Checks that an answer is a problem of a status; returns its detail."""

    def check(response: httpx.Response, status: int) -> str:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        body = ProblemDetails.model_validate(response.json())
        assert body.status == status
        assert body.detail == body.error
        assert body.request_id == response.headers["x-request-id"]
        return body.detail

    return check


@pytest.fixture(scope="session")
def refused():
    """Runs what must be refused; returns the detail."""

    def run(status: int, function, *arguments) -> str:
        with pytest.raises(ProblemError) as caught:
            function(*arguments)
        assert caught.value.status == status, caught.value.detail
        return caught.value.detail

    return run


class BrokenModel(ServedModel):
    """Loads and does not run."""

    def run(self, *inputs, **options):
        raise ModelError("broken")


@pytest.fixture
def in_trouble(serve_with, detector):
    """Clients of services that answer a good request with each status from 429 on."""
    broken = BrokenModel(read_detector(detector), provider="cpu")
    broken.warm = True
    busy, late = serve_with(), serve_with(deadline_ms=1e-6)
    busy.app.state.service.scheduler.in_flight = 1000
    unloaded = serve_with(None)  # without its start, no model is loaded
    return {429: busy, 500: serve_with(broken), 503: unloaded, 504: late}
