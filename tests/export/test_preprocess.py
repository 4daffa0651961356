from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from PIL import Image

from export.card import IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT, DetectorCard, Preprocessing
from export.file import read_detector
from export.preprocess import PREFIX, accept_uint8
from export.runtimes import open_session
from export.verify.compare import (
    Detections,
    Proposals,
    Setting,
    Tolerance,
    compare,
    split_batch,
)
from ghm_triton.detection.data import open_dataset
from service.images import letterbox

Feeds = dict[str, np.ndarray]


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    return open_session(model.SerializeToString())


@pytest.fixture(scope="module")
def card(detector_path):
    return read_detector(detector_path).card


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def frame_of(height: int, width: int) -> Preprocessing:
    return Preprocessing(height=height, width=width, mean=MEAN, std=STD)


def with_nodes(nodes: str, frame: tuple[int, int]) -> ModelProto:
    """A graph that makes `seen` of its images by these nodes; its one box is the whole frame."""
    height, width = frame
    shape = f"float[batch, 3, {height}, {width}]"
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18]>
        probe ({shape} images) => ({shape} seen, float[1, 1, 4] boxes)
        <float[1, 1, 4] corners = {{0, 0, {width}, {height}}}, bool yes = {{1}}>
        {{ {nodes}
           boxes = Identity (corners) }}""")


def probe(card: DetectorCard, height: int, width: int) -> ModelProto:
    """A graph that answers with what it was given: `seen` is what the network would see."""
    frame = frame_of(height, width)
    model = with_nodes("seen = Identity (images)", (height, width))
    made, its_card = accept_uint8(model, card.model_copy(update={"preprocessing": frame}))
    assert (its_card.input, its_card.preprocessing) == ("uint8", frame)
    return made


# Multiples of 8, of 3 alone, a prime beside a power, and one that is a single block.
FRAMES = [(64, 96), (33, 51), (127, 128), (6, 4)]


@pytest.fixture(scope="module")
def probes(card):
    return {frame: session(probe(card, *frame)) for frame in FRAMES}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey_levels(
    probe: onnxruntime.InferenceSession, image: np.ndarray, frame: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """What the graph prepares and what the service does, in grey levels `[3, H, W]`."""
    host, _ = letterbox(Image.fromarray(image), frame_of(*frame))
    (ours,) = probe.run(["seen"], {"images": image[None]})
    scale, shift = (np.array(v)[:, None, None] for v in (STD, MEAN))
    return np.rint(255 * (ours[0] * scale + shift)), np.rint(255 * (host * scale + shift))


@settings(max_examples=150, deadline=None)
@given(
    frame=st.sampled_from(FRAMES), height=st.integers(1, 400), width=st.integers(1, 400), seed=...
)
@example(frame=(64, 96), height=64, width=96, seed=0)
@example(frame=(64, 96), height=1, width=1, seed=0)
@example(frame=(64, 96), height=1, width=400, seed=0)
@example(frame=(64, 96), height=400, width=1, seed=0)
@example(frame=(64, 96), height=85, width=128, seed=0)  # 63.75 rows
@example(frame=(64, 96), height=37, width=64, seed=0)  # 55.5 rows: Python rounds to even
@example(frame=(64, 96), height=39, width=64, seed=0)  # 58.5
@example(frame=(127, 128), height=352, width=176, seed=0)  # columns first, in Pillow 13
def test_any_image_is_prepared_as_the_service_does(probes, frame, height, width, seed: int) -> None:
    image = noise(height, width, abs(seed))
    ours, host = grey_levels(probes[frame], image, frame)
    # Pillow 13 resizes the columns of some images first, tall ones mostly: that rounds otherwise.
    size = frame_of(*frame).resized(width, height)
    along_rows = Image.fromarray(image).resize((size[0], height), Image.Resampling.BILINEAR)
    truth = np.asarray(along_rows.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(ours[:, : size[1], : size[0]], truth)
    assert np.abs(ours - host).max() <= 1


@pytest.mark.parametrize("size", [(48, 64), (640, 481), (97, 301), (1200, 1600), (31, 47)])
def test_what_is_prepared_is_the_services_to_the_last_bit(probes, size):
    image = noise(*size)
    host, _ = letterbox(Image.fromarray(image), frame_of(64, 96))
    (ours,) = probes[64, 96].run(["seen"], {"images": image[None]})
    np.testing.assert_array_equal(ours[0], host)


def in_openvino(model: ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    openvino = pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    core = openvino.Core()
    graph = core.read_model(model.SerializeToString())
    run = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: run({"images": images})["seen"]


def in_reference(model: ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    run = ReferenceEvaluator(model)
    return lambda images: run.run(["seen"], {"images": images})[0]


@pytest.mark.parametrize("runtime", [in_openvino, in_reference])
@pytest.mark.parametrize("frame", [(64, 96), (33, 51)])
def test_other_runtimes_prepare_the_same(card, runtime, frame):
    run = runtime(probe(card, *frame))
    for size in [(64, 96), (48, 64), (481, 640), (97, 301), (31, 47), (1, 3)]:
        image = noise(*size)
        host, _ = letterbox(Image.fromarray(image), frame_of(*frame))
        # The last bits of (x / 255 - mean) / std; a grey level is 0.017 of it.
        np.testing.assert_allclose(run(image[None])[0], host, atol=1e-5)


@pytest.mark.parametrize("size", [(400, 100), (700, 20), (97, 31)])
def test_few_levels_of_a_tall_image_differ_at_all(probes, size):
    ours, host = grey_levels(probes[64, 96], noise(*size), (64, 96))
    width, _ = frame_of(64, 96).resized(size[1], size[0])
    # Half a level is rounded away between the axes. Truncating there would move every second.
    assert (ours != host)[:, :, :width].mean() < 0.3


def test_boxes_come_back_in_pixels_of_the_image(probes):
    # The probe's box is the whole frame, most of which is padding below a wide image.
    for height, width in ((50, 200), (200, 50), (64, 96), (1, 500)):
        (boxes,) = probes[64, 96].run(["boxes"], {"images": noise(height, width)[None]})
        assert boxes.tolist() == [[[0, 0, width, height]]]


@pytest.fixture(scope="module")
def both(detector_path):
    """The exported detector, and the same that takes uint8."""
    model, card = onnx.load(detector_path), read_detector(detector_path).card
    return session(model), session(accept_uint8(model, card)[0]), card


def assert_same_detections(both, images: list[Image.Image], feeds: Feeds) -> int:
    """Every detection of the float32 file, found on the host's canvas, is the uint8 file's."""
    floats, bytes_, card = both
    thresholds = feeds.get(THRESHOLDS_INPUT, np.array(card.class_thresholds, np.float32))
    iou = float(feeds.get(IOU_INPUT, [card.iou_threshold])[0])
    setting = Setting(card.class_names, thresholds, iou, card.max_detections)
    nothing = Proposals(np.zeros((0, 4), np.float32), np.zeros((0, len(thresholds)), np.float32))
    total = 0
    for image in images:
        row, geometry = letterbox(image, card.preprocessing)
        inputs = (floats, row), (bytes_, np.asarray(image))
        answers = [one.run(list(OUTPUTS), {"images": x[None], **feeds}) for one, x in inputs]
        host, ours = (Detections.of(split_batch(answer)[0]) for answer in answers)
        back = geometry.to_image(host.boxes).astype(np.float32)
        # The verifier's tolerances; the boxes' is in pixels of the network's frame.
        grown = max(1.0, image.width / geometry.resized_width)
        result = compare(
            Detections(back, host.scores, host.labels),
            ours,
            nothing,
            setting,
            Tolerance(box=0.1 * grown, score=1e-4),
        )
        assert result.mismatches == []
        total += int(result.matched.sum())
    return total


OVERRIDES = [
    {},
    {THRESHOLDS_INPUT: np.array([0.7, 0.4, 0.3], np.float32)},
    {IOU_INPUT: np.array([0.6], np.float32)},
]


@pytest.mark.parametrize("feeds", OVERRIDES, ids=["defaults", "thresholds", "iou"])
def test_detections_of_scenes_are_those_of_the_float_file(both, feeds):
    dataset = open_dataset("digits:held_out_images=6", "test")
    scenes = [dataset[i].image for i in range(len(dataset))]
    sizes = [(128, 128), (96, 64), (301, 97), (50, 40), (640, 480), (77, 133)]
    images = [scene.resize(size) for scene, size in zip(scenes, sizes, strict=True)]
    assert assert_same_detections(both, images, feeds) > 10


@pytest.fixture(scope="module")
def cells():
    root = os.environ.get("BCCD_ROOT")
    if not root:
        pytest.skip("BCCD_ROOT is not set: no blood cells to detect")
    dataset = open_dataset(f"voc:{root}", "test")
    return [dataset[i].image for i in range(0, len(dataset), 3)]


@pytest.mark.bccd
def test_detections_of_blood_cells_are_those_of_the_float_file(both, cells):
    assert assert_same_detections(both, cells, {}) > 100


@pytest.mark.bccd
def test_blood_cells_are_prepared_as_the_service_does(probes, cells):
    for frame in FRAMES:
        np.testing.assert_array_equal(*grey_levels(probes[frame], np.asarray(cells[0]), frame))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_images_of_a_batch_are_answered_for_alike(both, batch):
    images = np.stack([noise(50, 70, seed) for seed in range(batch)])
    together = both[1].run(list(OUTPUTS), {"images": images})
    for i in range(batch):
        alone = both[1].run(list(OUTPUTS), {"images": images[i : i + 1]})
        assert together[3][i] == alone[3][0] > 0
        np.testing.assert_array_equal(together[2][i], alone[2][0])
        # Sums of another order where a batch is laid out otherwise.
        np.testing.assert_allclose(together[1][i], alone[1][0], atol=1e-5)


def test_an_answer_is_padded_as_before(both):
    nothing = {THRESHOLDS_INPUT: np.full(3, 2.0, np.float32)}
    boxes, scores, labels, counts = both[1].run(
        list(OUTPUTS), {"images": noise(20, 30)[None], **nothing}
    )
    assert counts.tolist() == [0]
    assert (labels == -1).all()
    assert not boxes.any()
    assert not scores.any()


def test_the_graph_passes_the_checker_and_strict_shape_inference(detector_path):
    model, card = onnx.load(detector_path), read_detector(detector_path).card
    made, _ = accept_uint8(model, card)
    onnx.checker.check_model(made, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(
        made, check_type=True, strict_mode=True, data_prop=True
    )
    shapes = {value.name: value.type.tensor_type.shape for value in inferred.graph.value_info}
    prepared = [dim.dim_param or dim.dim_value for dim in shapes[f"{PREFIX}prepared"].dim]
    assert prepared == ["batch", 3, 64, 96]  # static, so that runtimes plan the network ahead


def test_the_same_graph_gives_the_same_bytes_and_is_left_alone(detector_path):
    model, card = onnx.load(detector_path), read_detector(detector_path).card
    before = model.SerializeToString(deterministic=True)
    made = [accept_uint8(model, card)[0].SerializeToString(deterministic=True) for _ in range(2)]
    assert made[0] == made[1]
    assert model.SerializeToString(deterministic=True) == before


def test_a_detector_that_takes_uint8_is_refused(detector_path):
    made = accept_uint8(onnx.load(detector_path), read_detector(detector_path).card)
    with pytest.raises(ValueError, match="retinanet-tiny takes uint8 images already"):
        accept_uint8(*made)


def test_images_are_renamed_inside_branches_too(card):
    branches = ", ".join(
        f"{name} = {op} () => (float[batch, 3, 64, 96] {op}_out) {{ {op}_out = {op} (images) }}"
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    )
    model = with_nodes(f"seen = If (yes) <{branches}>", (64, 96))
    made, _ = accept_uint8(model, card)
    onnx.checker.check_model(made, full_check=True)
    (branch,) = [node for node in made.graph.node if node.op_type == "If"]
    for attribute in branch.attribute:
        assert list(attribute.g.node[0].input) == [f"{PREFIX}prepared"]
