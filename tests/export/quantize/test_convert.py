from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser

from export.card import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT
from export.file import read_detector, write_detector
from export.graph import build_graph
from export.quantize.convert import BINS, Int8Recipe, observe_ranges, to_float16, to_int8
from export.quantize.core import cut_out, find_core, name_nodes, products_per_output
from export.runtimes import open_session
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def images(samples, config):
    letterbox = Letterbox(config)
    return [letterbox(sample.image)[0].numpy() for sample in samples]


@pytest.fixture(scope="module")
def model(detector_path):
    return onnx.load(detector_path)


@pytest.fixture(scope="module")
def int8(model, images):
    before = model.SerializeToString(deterministic=True)
    made = to_int8(model, images)
    assert model.SerializeToString(deterministic=True) == before  # left as it was
    return made


@pytest.fixture(scope="module")
def float16(model):
    before = model.SerializeToString(deterministic=True)
    made = to_float16(model)
    assert model.SerializeToString(deterministic=True) == before
    return made


@pytest.fixture(params=["int8", "float16"])
def smaller(request):
    return request.getfixturevalue(request.param)


def initializers(model: ModelProto) -> Tensors:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def answer(model: ModelProto, batch: np.ndarray, *names: str, **feeds: np.ndarray) -> Tensors:
    """What a graph computes: its outputs, and any other values by name."""
    probed = ModelProto()
    probed.CopyFrom(model)
    for name in names:
        probed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    wanted = [*OUTPUTS, *names]
    results = open_session(probed.SerializeToString()).run(wanted, {INPUT: batch, **feeds})
    return dict(zip(wanted, results, strict=True))


def outside(model: ModelProto) -> Iterator[NodeProto]:
    """Nodes that are no part of the core."""
    core = {node.name for node in find_core(model.graph).nodes}
    return (node for node in model.graph.node if node.name not in core)


def test_the_contract_is_kept(smaller, detector_path, tmp_path, images):
    card = read_detector(detector_path).card
    write_detector(tmp_path / "smaller.onnx", smaller, card)  # onnx's own checks are in it
    file = read_detector(tmp_path / "smaller.onnx")
    assert file.card == card
    names = [value.name for value in open_session(file.content).get_overridable_initializers()]
    assert names == [THRESHOLDS_INPUT, IOU_INPUT]
    assert smaller.ir_version == 10
    assert [(entry.domain, entry.version) for entry in smaller.opset_import] == [("", 18)]
    assert smaller.producer_name == "ghm-triton"
    for size in (1, 3):
        found = answer(smaller, np.stack(images[:size]))
        assert [len(found[name]) for name in OUTPUTS] == [size] * 4
        assert found["num_detections"].min() > 0
    none = answer(smaller, images[0][None], class_thresholds=np.full(3, 1.1, np.float32))
    assert none["num_detections"].tolist() == [0]


def test_only_the_core_changes(model, smaller):
    """What compares scores, decodes boxes and suppresses is there as it was, on the same names."""
    before = {node.name: node for node in outside(model)}
    after = {node.name: node for node in smaller.graph.node}
    assert len(before) > 80
    for name, node in before.items():
        assert after[name].op_type == node.op_type
        assert list(after[name].output) == list(node.output)
        assert after[name].attribute == node.attribute
    kept = initializers(smaller)
    for name in {name for node in before.values() for name in node.input}:
        if (tensor := initializers(model).get(name)) is not None:
            assert kept[name].dtype == tensor.dtype
            assert np.array_equal(kept[name], tensor)


def test_the_same_model_and_images_give_the_same_graph(
    int8, float16, detector_path, tmp_path, images
):
    np.save(tmp_path / "images.npy", np.stack(images))
    code = """
import sys, numpy, onnx
from export.quantize.convert import to_float16, to_int8
model, images, folder = onnx.load(sys.argv[1]), numpy.load(sys.argv[2]), sys.argv[3]
for name, made in (("int8", to_int8(model, images)), ("float16", to_float16(model))):
    open(f"{folder}/{name}", "wb").write(made.SerializeToString(deterministic=True))
"""
    subprocess.run(
        [sys.executable, "-c", code, detector_path, tmp_path / "images.npy", tmp_path],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert (tmp_path / "int8").read_bytes() == int8.SerializeToString(deterministic=True)
    assert (tmp_path / "float16").read_bytes() == float16.SerializeToString(deterministic=True)


def layers_of(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]


def readers(model: ModelProto, name: str) -> list[NodeProto]:
    return [node for node in model.graph.node if name in node.input]


def dequantized(model: ModelProto) -> dict[str, NodeProto]:
    return {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}


def in_integers(model: ModelProto) -> list[NodeProto]:
    made = dequantized(model)
    return [node for node in layers_of(model) if all(name in made for name in node.input)]


def test_layers_compute_with_integers_of_7_and_8_bits(int8):
    kept, made, chosen = initializers(int8), dequantized(int8), in_integers(int8)
    # All but the first, which sees three colours in windows of 3 x 3.
    left = [node.input[0] for node in layers_of(int8) if node not in chosen]
    assert (len(chosen), left) == (31, [INPUT])
    for layer in chosen:
        activation, weight, *bias = (made[name] for name in layer.input)
        assert kept[activation.input[2]].dtype == np.uint8
        numbers, scales = kept[weight.input[0]], kept[weight.input[1]]
        assert numbers.dtype == np.int8
        assert scales.shape == numbers.shape[:1]  # one a channel
        assert not kept[weight.input[2]].any()  # symmetric
        # So that two products, each of a uint8 and such a weight, fit in 16 bits.
        assert np.abs(numbers.astype(int)).max() == 64
        # Several levels share a bias, each with a scale of its own.
        for node in bias:
            assert kept[node.input[0]].dtype == np.int32
            scale = kept[activation.input[1]] * scales
            assert kept[node.input[1]] == pytest.approx(scale, rel=1e-6)  # float32
        # What a layer gives is rounded at once, so that no float32 comes in between.
        assert [node.op_type for node in readers(int8, layer.output[0])] == ["QuantizeLinear"]


def said(model: ModelProto, made: ModelProto) -> list[tuple[str, str]]:
    """What the last layers say, by its name in a model and in what was made of that."""
    names = []
    for layer in find_core(model.graph).last:
        name = layer.output[0]
        (reader, *_) = readers(made, name)
        if reader.op_type == "QuantizeLinear":
            (reader,) = readers(made, reader.output[0])
            names.append((name, reader.output[0]))
        else:
            names.append((name, name))
    return names


def errors(model: ModelProto, made: ModelProto, images: list[np.ndarray]) -> list[float]:
    """Of what each of the last layers says: spread of the error by the range, which has a zero."""
    batch = np.stack(images)
    names, new_names = zip(*said(model, made), strict=True)
    truth, found = answer(model, batch, *names), answer(made, batch, *new_names)
    return [
        float(
            np.std(found[new] - truth[name]) / np.ptp([0.0, truth[name].min(), truth[name].max()])
        )
        for name, new in zip(names, new_names, strict=True)
    ]


# Ten layers in a row, each off by a step of 1 / 255 of its range; errors that know nothing of each
# other add up by their squares. Likewise with float16, whose step is 2**-11.
INT8_ERROR = 10**0.5 / 255
FLOAT16_ERROR = 10**0.5 / 2**11
# A group norm divides by how much a few numbers differ, and their errors with them.
NORMED = 3.0


def test_the_detector_says_nearly_what_it_said(model, int8, float16, images):
    assert max(errors(model, int8, images)) < INT8_ERROR
    assert max(errors(model, float16, images)) < FLOAT16_ERROR


def test_a_recipe_is_followed(model, int8, images):
    recipes = {
        "8 bits": Int8Recipe(weight_bits=8),
        "by tensor": Int8Recipe(per_channel=False),
        "cut": Int8Recipe(coverage=98.0),
        "last": Int8Recipe(float_last=True),
    }
    made = {name: to_int8(model, images, recipe) for name, recipe in recipes.items()}
    error = {name: np.mean(errors(model, each, images)) for name, each in made.items()}
    usual = np.mean(errors(model, int8, images))
    assert error["8 bits"] < usual < error["by tensor"] < error["cut"]
    assert error["last"] < usual
    left = [n.name for n in layers_of(made["last"]) if n not in in_integers(made["last"])]
    core = find_core(model.graph)
    assert sorted(left) == sorted(node.name for node in (*core.first, *core.last))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"coverage": x}, rf"lie in \(0, 100\], got {x}") for x in (0.0, 100.1, float("nan"))),
        ({"weight_bits": 4}, "weight_bits must be 7 or 8, got 4"),
    ],
)
def test_options_of_a_recipe_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Int8Recipe(**options)


def test_there_must_be_images(model):
    with pytest.raises(ValueError, match="no images to calibrate on"):
        to_int8(model, [])


def test_float16_is_half_the_weights(model, float16):
    before, after = initializers(model), initializers(float16)
    weights = [name for node in layers_of(float16) for name in node.input[1:]]
    assert len(layers_of(float16)) == 32
    assert {after[name].dtype for name in weights} == {np.dtype(np.float16)}
    originals = [name for node in layers_of(model) for name in node.input[1:]]
    size = sum(before[name].nbytes for name in set(originals))
    assert sum(after[name].nbytes for name in set(weights)) == size // 2


def test_a_constant_of_core_and_rest_stays_float32_for_the_rest():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[b, 1, 2, 2] images) => (float[b, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {0.1}>
    {
        [layer] a = Conv (images, w)
        [tail] y = Mul (a, w)
    }
    """
    made = to_float16(parser.parse_model(text))
    (tail,) = (node for node in made.graph.node if node.name == "tail")
    assert initializers(made)[tail.input[1]].tolist() == [[[[np.float32(0.1)]]]]
    session = open_session(made.SerializeToString())
    (found,) = session.run(None, {INPUT: np.ones((1, 1, 2, 2), np.float32)})
    half = np.float32(np.float16(0.1))
    assert np.array_equal(found, np.full((1, 1, 2, 2), half * np.float32(0.1)))


@pytest.mark.parametrize(
    ("architecture", "factor"),
    [("fcos", NORMED), pytest.param("faster-rcnn", 1.0, marks=pytest.mark.slow)],
)
def test_other_detectors(architecture, factor):
    torch.manual_seed(0)
    config = DetectorConfig(("a", "b"), (64, 64), channels=16, architecture=architecture)
    model = build_graph(build_detector(config), [0.0, 0.0], 0.5)
    generator = np.random.default_rng(0)
    images = [generator.standard_normal((3, 64, 64)).astype(np.float32) for _ in range(2)]
    made = {"int8": to_int8(model, images), "float16": to_float16(model)}
    for name, limit in (("int8", INT8_ERROR), ("float16", FLOAT16_ERROR)):
        onnx.checker.check_model(made[name], full_check=True)
        # The second stage of Faster R-CNN looks at the regions that the first chose.
        convolutions = [n for n in find_core(model.graph).last if n.op_type == "Conv"]
        assert max(errors(model, made[name], images)[: len(convolutions)]) < factor * limit
        assert answer(made[name], images[0][None])["num_detections"].tolist() == [100]
    left = [n.input[0] for n in layers_of(made["int8"]) if n not in in_integers(made["int8"])]
    assert left == [INPUT]


# What detectors put between and after their layers: a norm by group, regions pooled by boxes that
# were decoded half-way, a join with a constant, and scores at the end.
LAYERS = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1, 3, 8, 8] images, float[1, 4, 8, 8] other) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] s)
<float[4, 3, 3, 3] w1, float[4, 4, 1, 1] w2, float[4, 4, 1, 1] w3, float[4, 4, 1, 1] w4,
 float[4] one, float[4] zero, float[1] half>
{
    [first] a = Conv <pads = [1, 1, 1, 1]> (images, w1)
    [act] b = Relu (a)
    [second] c = Conv (b, w2)
    [sum] d = Add (b, c)
    [third] e = Conv (d, w3)
    [norm] f = InstanceNormalization (e, one, zero)
    [normed] g = Relu (f)
    [fourth] h = Conv (g, w4)
    [shifted] i = Add (h, half)
    [mixed] k = Add (h, other)
    [last] y = Conv (k, w2)
    [tail] l = Relu (c)
    [score] s = Sigmoid (l)
}
"""


def layers() -> ModelProto:
    model = parser.parse_model(LAYERS)
    model.graph.ClearField("initializer")
    shapes = {"w1": [4, 3, 3, 3], "w2": [4, 4, 1, 1], "w3": [4, 4, 1, 1], "w4": [4, 4, 1, 1]}
    shapes |= {"one": [4], "zero": [4], "half": [1]}
    for name, shape in shapes.items():
        values = (0.1 * (np.arange(np.prod(shape)) % 7)).reshape(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def names_of(nodes: object) -> list[str]:
    return [node.name for node in nodes]  # type: ignore[attr-defined]


def test_the_core_is_what_lies_between_layers_with_weights():
    core = find_core(layers().graph)
    # Not in it: the norm and what follows it, sums with what comes from outside, and the tail.
    assert names_of(core.nodes) == ["first", "act", "second", "sum", "third", "fourth", "last"]
    assert names_of(core.first) == ["first"]
    assert names_of(core.last) == ["third", "fourth", "last"]
    assert core.op_types == ["Add", "Conv", "Relu"]


def test_a_product_of_two_activations_is_no_layer():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[2, 2] images) => (float[2, 2] y) { y = MatMul (images, images) }
    """
    with pytest.raises(ValueError, match="no layer with weights"):
        find_core(parser.parse_model(text).graph)


def test_the_core_of_a_real_detector(detector_path):
    graph = onnx.load(detector_path).graph
    core = find_core(graph)
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert [node for node in core.nodes if node.op_type == "Conv"] == layers
    assert set(core.op_types) == {"Add", "Conv", "Relu", "Resize"}
    assert [list(node.input[:1]) for node in core.first] == [["images"]]
    assert products_per_output(core.first[0], graph) == 27
    # Classes and boxes of three levels of the pyramid.
    kinds = [node.input[1].rsplit(".", 2)[-2] for node in core.last]
    assert sorted(kinds) == ["bbox_reg"] * 3 + ["cls_logits"] * 3


def test_a_core_cut_out_takes_and_gives_what_it_shares_with_the_rest():
    whole = layers()
    part = cut_out(whole, find_core(whole.graph)).graph
    assert [value.name for value in part.input] == ["images", "g", "k"]
    # `c` feeds the tail, `y` is an output of the whole.
    assert [value.name for value in part.output] == ["c", "e", "h", "y"]
    assert sorted(tensor.name for tensor in part.initializer) == ["w1", "w2", "w3", "w4"]
    assert len(whole.graph.node) == 13  # as it was


def test_nodes_get_names_of_their_own():
    graph = layers().graph
    for node, name in zip(graph.node, ["same", "", "same", "Relu_1", "", "same_"], strict=False):
        node.name = name
    name_nodes(graph)
    found = names_of(graph.node)
    assert len(set(found)) == len(found)
    assert "" not in found
    assert found[0] == "same"
    assert found[6:] == ["normed", "fourth", "shifted", "mixed", "last", "tail", "score"]


# One layer, whose result is `factor` times what it sees; and a tail that the core does not need.
ONE_LAYER = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[b, 1, 4, 4] images, float[1] floor) => (float[b, 1, 4, 4] y)
<float[1, 1, 1, 1] factor = {-2.0}, float[1] floor = {0.5}>
{
    [layer] a = Conv (images, factor)
    [cut] y = Max (a, floor)
}
"""


def noise(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, 4, 4)).astype(np.float32) for _ in range(count)]


def ranges(seen: list[np.ndarray], coverage: float) -> dict:
    model = parser.parse_model(ONE_LAYER)
    found = observe_ranges(model, find_core(model.graph), seen, coverage)
    pairs = {name: data.range_value for name, data in found.items()}
    return {
        name: (np.asarray(low).item(), np.asarray(high).item())
        for name, (low, high) in pairs.items()
    }


def test_every_value_of_every_image_is_in_the_range():
    seen = noise(5)
    seen[2][0, 1, 1], seen[4][0, 3, 3] = -9.0, 30.0
    assert ranges(seen, 100) == {"images": (-9.0, 30.0), "a": (-60.0, 18.0)}


@pytest.mark.parametrize("coverage", [90.0, 99.0])
def test_what_is_not_covered_is_cut_off_at_both_ends(coverage):
    seen = noise(400)
    values = np.concatenate([image.ravel() for image in seen])
    found = ranges(seen, coverage)["images"]
    # The histogram has this resolution over the first image's range, and later images keep it.
    width = (seen[0].max() - seen[0].min()) / BINS
    lowest, highest = np.percentile(values, [(100 - coverage) / 2, (100 + coverage) / 2])
    # The tails are thin: a bin on either side, and the gap to the next of 6400 values.
    gap = float(2 * width + 0.02)
    assert found == (pytest.approx(lowest, abs=gap), pytest.approx(highest, abs=gap))


def test_calibration_prints_nothing(capfd):
    ranges(noise(2), 99.9)
    assert capfd.readouterr() == ("", "")  # neither by Python nor by the runtime
