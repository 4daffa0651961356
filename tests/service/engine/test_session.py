import numpy as np
import onnx
import onnxruntime
import pytest

from export.file import read_detector
from service.core.detections import OFF
from service.engine import session as module
from service.engine.session import CPU, CUDA, ModelError, ServedModel
from service.images import letterbox

PATCHES = {(16, 16, 32, 32): "#ff0000", (64, 16, 80, 32): "#00d000", (32, 40, 48, 56): "#0000ff"}

FOUND = {(0, (16, 16, 32, 32)), (1, (64, 16, 80, 32)), (2, (32, 40, 48, 56))}


@pytest.fixture(scope="module")
def batch(scene, card):
    """One image with a patch of each colour, and one with none."""
    images = [scene(96, 64, PATCHES), scene(96, 64, {})]
    return np.stack([letterbox(image, card.preprocessing)[0] for image in images])


def found(detections) -> set[tuple[int, tuple[float, ...]]]:
    pairs = zip(detections.labels.tolist(), detections.boxes.tolist(), strict=True)
    return {(label, tuple(box)) for label, box in pairs}


def test_finds_what_is_there(model, batch):
    first, second = model.detect(batch)
    assert found(first) == FOUND
    assert len(second.scores) == 0
    assert (np.diff(first.scores) <= 0).all()
    assert first.boxes.dtype == first.scores.dtype == np.float32
    # logit = 8 * (own - mean of the others) - 4 for a pure colour
    assert first.scores[0] == pytest.approx(1 / (1 + np.exp(-4)), abs=1e-6)  # float32


def test_an_image_is_answered_for_alike_in_any_batch(model, batch):
    alone = model.detect(batch[:1])[0]
    among = model.detect(np.concatenate([batch[1:], batch[:1], batch[1:]]))[1]
    np.testing.assert_array_equal(alone.scores, among.scores)
    np.testing.assert_array_equal(alone.boxes, among.boxes)


def test_a_detection_stands_from_its_threshold_on(model, batch):
    first = model.detect(batch)[0]
    exact = first.scores[np.argsort(first.labels)]  # one of each class
    assert len(model.detect(batch, exact)[0].scores) == 3
    for label in range(3):
        above = exact.copy()
        above[label] = np.nextafter(above[label], np.float32(1))
        assert set(model.detect(batch, above)[0].labels.tolist()) == {0, 1, 2} - {label}


def test_off_switches_a_class_off(model, batch):
    thresholds = np.array([0, OFF, OFF], dtype=np.float32)
    assert set(model.detect(batch, thresholds)[0].labels.tolist()) == {0}


def test_iou_decides_what_falls(model, batch):
    low = np.full(3, 0.05, dtype=np.float32)
    # Neighbours on the grid overlap by a third, or by a seventh across a corner.
    numbers = [len(model.detect(batch[:1], low, iou)[0].scores) for iou in (0.1, 0.25, 0.5)]
    assert numbers[0] < numbers[1] < numbers[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_refused(model, batch, bad):
    broken = batch.copy()
    broken[1, 2, 5, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.detect(broken)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        ("model", (1, 3, 64, 95), "f4"),
        ("model", (3, 64, 96), "f4"),
        ("model", (0, 3, 64, 96), "f4"),
        ("model", (1, 3, 64, 96), "f8"),
        ("uint8_model", (1, 3, 64, 96), "u1"),
        ("uint8_model", (1, 64, 96, 4), "u1"),
        ("uint8_model", (64, 96, 3), "u1"),
        ("uint8_model", (1, 64, 96, 3), "f4"),
        ("uint8_model", (0, 64, 96, 3), "u1"),
        ("uint8_model", (1, 0, 96, 3), "u1"),
        ("uint8_model", (1, 64, 0, 3), "u1"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(request, kind, shape, dtype):
    with pytest.raises(ValueError, match="images"):
        request.getfixturevalue(kind).detect(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("message", "thresholds", "iou"),
    [
        ("class_thresholds", np.array([0.5, 0.5], np.float32), None),
        ("class_thresholds", np.array([0.5, 0.5, 0.5]), None),
        ("class_thresholds", np.array([0.5, np.nan, 0.5], np.float32), None),
        ("class_thresholds", np.array([0.5, -0.1, 0.5], np.float32), None),
        ("iou_threshold", None, -0.1),
        ("iou_threshold", None, 1.1),
        ("iou_threshold", None, float("nan")),
    ],
)
def test_invalid_thresholds_are_refused(model, batch, message, thresholds, iou):
    with pytest.raises(ValueError, match=message):
        model.detect(batch, thresholds, iou)


def test_a_failed_inference_is_an_error_and_no_line_on_stderr(model, batch, monkeypatch, capfd):
    monkeypatch.setattr(model, "_check_batch", lambda _: None)  # so that onnxruntime fails
    with pytest.raises(ModelError, match="inference failed"):
        model.run(batch[:, :2])
    assert capfd.readouterr().err == ""


def test_uint8_images_are_answered_for_as_prepared_ones(model, uint8_model, scene, batch):
    images = np.stack([np.asarray(scene(96, 64, patches)) for patches in (PATCHES, {})])
    for ours, theirs in zip(uint8_model.detect(images), model.detect(batch), strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)  # float32


def test_boxes_of_uint8_images_are_in_their_own_pixels(uint8_model, scene):
    image = scene(96, 64, PATCHES).resize((384, 256))
    (answer,) = uint8_model.detect(np.asarray(image)[None])
    expected = {(label, tuple(4 * x for x in box)) for label, box in FOUND}
    assert found(answer) == expected


@pytest.mark.parametrize("variant", ["detector", "uint8_detector"])
def test_warm_up(request, variant):
    fresh = ServedModel(read_detector(request.getfixturevalue(variant)), provider="cpu")
    assert not fresh.warm
    fresh.warm_up()
    assert fresh.warm
    assert fresh.providers == [CPU]


def test_the_card_and_the_digest_are_the_files(model, detector, card):
    assert model.card == card
    assert model.sha256 == read_detector(detector).sha256


def test_a_graph_that_the_runtime_refuses(detector, tmp_path):
    broken = onnx.load(detector)
    broken.graph.node[0].op_type = "NoSuchOperator"
    path = tmp_path / "broken.onnx"
    onnx.save(broken, path)
    with pytest.raises(ModelError, match=r"broken\.onnx: onnxruntime cannot load it"):
        ServedModel(read_detector(path), provider="cpu")


@pytest.mark.skipif(module._has_cuda_device(), reason="for machines without a CUDA device")
def test_cuda_is_an_error_where_it_does_not_work(detector):
    with pytest.raises(ModelError, match="provider cuda does not work here"):
        ServedModel(read_detector(detector), provider="cuda")


@pytest.mark.skipif(
    module._has_cuda_device() or CUDA not in onnxruntime.get_available_providers(),
    reason="for machines whose onnxruntime lists CUDA but which have no device",
)
def test_a_session_that_silently_fell_back_to_the_cpu_is_an_error(detector, monkeypatch):
    monkeypatch.setattr(module, "_has_cuda_device", lambda: True)  # the driver is there, say
    with pytest.raises(ModelError, match=f"fell back to {CPU}"):
        ServedModel(read_detector(detector), provider="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not module._has_cuda_device(), reason="needs a CUDA device")
def test_cuda_gives_the_same_detections(model, detector, batch):
    fast = ServedModel(read_detector(detector), provider="cuda")
    assert fast.providers[0] == CUDA
    assert found(fast.detect(batch)[0]) == found(model.detect(batch)[0])


def test_auto_runs_everywhere(detector, batch):
    assert len(ServedModel(read_detector(detector)).detect(batch)) == 2


@pytest.mark.parametrize(("spin", "entry"), [(True, None), (False, "0")])
def test_threads_spin_only_where_one_inference_has_the_processors(detector, spin, entry):
    model = ServedModel(read_detector(detector), provider="cpu", spin=spin)
    options = model._session.get_session_options()
    if entry is None:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.intra_op.allow_spinning")
    else:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == entry
