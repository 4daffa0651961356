import numpy as np
import pytest
import torch
from PIL import Image

from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.config import DetectorConfig


def frame(height: int, width: int) -> DetectorConfig:
    return DetectorConfig(class_names=("a",), image_size=(height, width))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_an_image_of_the_right_size_is_only_normalised():
    config, image = frame(64, 96), noise(96, 64)
    tensor, scales = Letterbox(config)(image)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 - mean) / std
    assert scales == (1.0, 1.0)
    # Two float32 roundings of values below 3: each at most 2^-24 relative.
    assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (33, 200), (5, 5), (1, 300), (97, 65)])
def test_the_image_keeps_its_aspect_and_the_rest_is_grey(width, height):
    config = frame(64, 96)
    tensor, (scale_x, scale_y) = Letterbox(config)(noise(width, height))
    inner_width, inner_height = round(width * scale_x), round(height * scale_y)
    assert inner_width == 96 or inner_height == 64
    assert inner_width <= 96
    assert inner_height <= 64
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    grey = tensor * std + mean
    pad = torch.full_like(grey, config.pad_value / 255)
    # Normalising and back costs a few float32 roundings.
    assert torch.allclose(grey[:, inner_height:], pad[:, inner_height:], atol=1e-6)
    assert torch.allclose(grey[:, :, inner_width:], pad[:, :, inner_width:], atol=1e-6)


def test_what_is_not_rgb_is_refused():
    with pytest.raises(ValueError, match="expected an RGB image, got L"):
        Letterbox(frame(64, 64))(Image.new("L", (8, 8)))
