import numpy as np
import pytest

from service.core.settings import Settings
from service.v2.inference import LARGEST_PIXEL, read

SETTINGS = Settings(model="none.onnx", max_pixels=1000)


@pytest.fixture(scope="module")
def request_of(frame):
    """A request with these tensors, each as its bytes."""
    names = {np.dtype("f4"): "FP32", np.dtype("u1"): "UINT8"}

    def make(**tensors: np.ndarray) -> tuple[bytes, str]:
        inputs = [
            {
                "name": name,
                "datatype": names[array.dtype],
                "shape": list(array.shape),
                "parameters": {"binary_data_size": array.nbytes},
            }
            for name, array in tensors.items()
        ]
        return frame({"inputs": inputs}, *(array.tobytes() for array in tensors.values()))

    return make


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)


def test_without_thresholds_the_files_own_are_left_to_the_model(card, images, request_of):
    asked, wanted = read(*request_of(images=images), card, SETTINGS)
    assert wanted is None
    assert asked.inputs["images"].tobytes() == images.tobytes()


def test_one_threshold_leaves_the_other_as_the_file_has_it(card, images, request_of):
    given = np.array([0.1, 2, 0], np.float32)
    _, wanted = read(*request_of(images=images, class_thresholds=given), card, SETTINGS)
    assert wanted.class_thresholds.tolist() == given.tolist()
    assert wanted.iou_threshold == card.iou_threshold
    assert wanted.max_detections == card.max_detections
    overlap = np.array([0.3], np.float32)
    _, wanted = read(*request_of(images=images, iou_threshold=overlap), card, SETTINGS)
    assert wanted.class_thresholds.tolist() == card.class_thresholds
    assert wanted.class_thresholds.dtype == np.float32
    assert np.float32(wanted.iou_threshold) == overlap[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LARGEST_PIXEL * 1.001, -3e38])
def test_numbers_that_are_no_pixels(value, card, images, request_of, refused):
    images[1, 2, 3, 4] = value
    detail = refused(400, read, *request_of(images=images), card, SETTINGS)
    assert f"holds {np.float32(value)}" in detail


def test_pixels_at_the_limit(card, images, request_of):
    images[0, 0, 0, :2] = LARGEST_PIXEL, -LARGEST_PIXEL
    read(*request_of(images=images), card, SETTINGS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *[("class_thresholds", [value, 0, 0]) for value in (np.nan, np.inf, -0.1)],
        *[("iou_threshold", [value]) for value in (np.nan, -0.1, 1.1)],
    ],
)
def test_thresholds_out_of_range(name, values, card, images, request_of, refused):
    given = np.array(values, np.float32)
    detail = refused(400, read, *request_of(images=images, **{name: given}), card, SETTINGS)
    assert f"input {name} must be" in detail
    assert str(given.tolist()).strip("[]") in detail


@pytest.mark.parametrize("value", [0, 1])
def test_overlaps_at_the_ends(value, card, images, request_of):
    given = np.array([value], np.float32)
    _, wanted = read(*request_of(images=images, iou_threshold=given), card, SETTINGS)
    assert wanted.iou_threshold == value


def test_the_batch_is_as_large_as_the_configuration_says(uint8_model, request_of, refused):
    card = uint8_model.card
    read(*request_of(images=np.zeros((64, 2, 2, 3), np.uint8)), card, SETTINGS)
    request = request_of(images=np.zeros((65, 2, 2, 3), np.uint8))
    assert "batch of 65" in refused(400, read, *request, card, SETTINGS)


def test_pictures_are_limited_in_pixels(uint8_model, request_of, refused):
    card = uint8_model.card
    read(*request_of(images=np.zeros((1, 10, 100, 3), np.uint8)), card, SETTINGS)
    request = request_of(images=np.zeros((1, 7, 143, 3), np.uint8))
    assert "143 x 7" in refused(413, read, *request, card, SETTINGS)


@pytest.mark.parametrize(
    ("shape", "status"),
    [
        ((1, 1080, 1920, 3), 200),
        ((1, 1920, 1080, 3), 200),
        ((16, 480, 640, 3), 200),
        ((1, 2560, 2560, 3), 200),
        ((1, 100, 8000, 3), 200),
        ((1, 8000, 100, 3), 413),  # a second and a gigabyte; a batch of 8 of them, 30 and 15
        ((1, 1, 6_500_000, 3), 413),
        ((1, 6_500_000, 1, 3), 413),
    ],
)
def test_pictures_that_take_too_much_to_resize(shape, status, uint8_model, request_of, refused):
    settings = Settings(model=SETTINGS.model)
    request = request_of(images=np.zeros(shape, np.uint8))
    if status == 200:
        read(*request, uint8_model.card, settings)
    else:
        detail = refused(413, read, *request, uint8_model.card, settings)
        assert f"{shape[2]} x {shape[1]}" in detail
        assert str(settings.max_decoded_bytes) in detail


def test_memory_is_that_of_the_pictures_that_run_at_once(uint8_model, request_of, refused):
    two = 2 * (64 + 64) * 96 * 3 * 4  # rows that there are and that are made, float32 colours
    request = request_of(images=np.zeros((9, 64, 96, 3), np.uint8))
    told = Settings(model=SETTINGS.model, max_decoded_bytes=two, max_images=2)
    read(*request, uint8_model.card, told)
    told = told.model_copy(update={"max_images": 3})
    assert f"takes {two * 3 // 2} bytes" in refused(413, read, *request, uint8_model.card, told)
