from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper, parser

from export.quantize.convert import BINS, observe_ranges
from export.quantize.core import find_core

# One layer, whose result is `factor` times what it sees; and a tail that the core does not need.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[b, 1, 4, 4] images, float[1] floor) => (float[b, 1, 4, 4] y)
<float[1, 1, 1, 1] factor = {-2.0}, float[1] floor = {0.5}>
{
    [layer] a = Conv (images, factor)
    [cut] y = Max (a, floor)
}
"""


@pytest.fixture
def model() -> ModelProto:
    return parser.parse_model(GRAPH)


def images(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, 4, 4)).astype(np.float32) for _ in range(count)]


def ranges(model: ModelProto, seen: list[np.ndarray], coverage: float) -> dict:
    found = observe_ranges(model, find_core(model.graph), seen, coverage)
    pairs = {name: data.range_value for name, data in found.items()}
    return {
        name: (np.asarray(low).item(), np.asarray(high).item())
        for name, (low, high) in pairs.items()
    }


def test_every_value_of_every_image_is_in_the_range(model: ModelProto) -> None:
    seen = images(5)
    seen[2][0, 1, 1], seen[4][0, 3, 3] = -9.0, 30.0
    assert ranges(model, seen, 100) == {"images": (-9.0, 30.0), "a": (-60.0, 18.0)}


@pytest.mark.parametrize("coverage", [90.0, 99.0])
def test_what_is_not_covered_is_cut_off_at_both_ends(model: ModelProto, coverage: float) -> None:
    seen = images(400)
    values = np.concatenate([image.ravel() for image in seen])
    found = ranges(model, seen, coverage)["images"]
    # The histogram has this resolution over the first image's range, and later images keep it.
    width = (seen[0].max() - seen[0].min()) / BINS
    lowest, highest = np.percentile(values, [(100 - coverage) / 2, (100 + coverage) / 2])
    # The tails are thin: a bin on either side, and the gap to the next of 6400 values.
    gap = float(2 * width + 0.02)
    assert found == (pytest.approx(lowest, abs=gap), pytest.approx(highest, abs=gap))


def test_without_images_there_is_nothing_to_see(model: ModelProto) -> None:
    with pytest.raises(ValueError, match="no images to calibrate on"):
        observe_ranges(model, find_core(model.graph), [], 100)


def test_nothing_is_printed(model: ModelProto, capfd: pytest.CaptureFixture[str]) -> None:
    ranges(model, images(2), 99.9)
    assert capfd.readouterr() == ("", "")  # neither by Python nor by the runtime


def test_the_model_is_left_as_it_was(model: ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    ranges(model, images(1), 100)
    assert model.SerializeToString(deterministic=True) == before
    assert numpy_helper.to_array(model.graph.initializer[1]).tolist() == [0.5]
