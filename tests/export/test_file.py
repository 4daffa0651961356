import hashlib
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.card import CARD_KEY, OUTPUTS, CardError, DetectorCard
from export.file import SEAL_KEY, detector_bytes, is_broken, read_detector, seal, write_detector
from export.runtimes import RUNTIMES

Edit = Callable[[ModelProto], object]


@pytest.fixture
def read(tmp_path, small_model):
    """Reads a detector after an edit."""

    def edited(edit: Edit = lambda _: None):
        edit(small_model)
        path = tmp_path / "detector.onnx"
        path.write_bytes(small_model.SerializeToString())
        return read_detector(path)

    return edited


def test_reads_what_keeps_the_contract(read, tmp_path, small_card):
    file = read()
    content = (tmp_path / "detector.onnx").read_bytes()
    assert file.card == small_card
    assert file.content == content
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert file.path == tmp_path / "detector.onnx"
    assert read_detector(str(file.path)) == file


def initializer(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def replace(name: str, array: np.ndarray) -> Edit:
    def edit(model: ModelProto) -> None:
        initializer(model, name).CopyFrom(numpy_helper.from_array(array, name))

    return edit


def drop(field: str, name: str) -> Edit:
    def edit(model: ModelProto) -> None:
        values = getattr(model.graph, field)
        values.remove(next(value for value in values if value.name == name))

    return edit


def retype(field: str, name: str, element: int, shape: list | None) -> Edit:
    def edit(model: ModelProto) -> None:
        value = next(value for value in getattr(model.graph, field) if value.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, element, shape))

    return edit


def set_card(text: str) -> Edit:
    return lambda model: helper.set_model_props(model, {CARD_KEY: text})


def two_cards(model: ModelProto) -> None:
    model.metadata_props.append(model.metadata_props[0])


def no_thresholds(model: ModelProto) -> None:
    for field in ("input", "initializer"):
        drop(field, "class_thresholds")(model)


def damage(model: ModelProto) -> None:
    initializer(model, "class_thresholds").raw_data = b"abc"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.ClearField("metadata_props"), "no card.*'ghm.card'.*ghm export"),
        (two_cards, "2 cards"),
        (set_card("{"), "the card is not JSON"),
        (set_card('{"format_version": 7}'), "format_version 7.*Upgrade ghm-triton"),
        (set_card('{"format_version": 1}'), "the card is not valid at name"),
        (drop("input", "images"), r"inputs are \[\]; there must be one, 'images'"),
        (
            lambda m: m.graph.input.append(
                helper.make_tensor_value_info("more", TensorProto.FLOAT, [1])
            ),
            r"inputs are \['images', 'more'\]",
        ),
        (
            retype("input", "images", TensorProto.UINT8, ["b", 3, 8, 16]),
            r"'images' is uint8 \[any, 3, 8, 16\], not float32 \[batch, 3, 8, 16\]",
        ),
        (
            retype("input", "images", TensorProto.FLOAT, ["b", 3, 16, 8]),
            r"float32 \[any, 3, 16, 8\], not float32 \[batch, 3, 8, 16\]",
        ),
        (retype("input", "images", TensorProto.FLOAT, [1, 3, 8, 16]), r"float32 \[1, 3, 8, 16\]"),
        (retype("input", "images", TensorProto.FLOAT, None), "no stated shape"),
        (drop("output", "labels"), "no output 'labels'; it has .*'boxes'"),
        (
            retype("output", "labels", TensorProto.INT32, ["b", "m"]),
            r"'labels' is int32 \[any, any\], not int64 of 2 dimensions",
        ),
        (retype("output", "boxes", TensorProto.FLOAT, ["b", 4]), "float32 of 3 dimensions"),
        (drop("input", "class_thresholds"), "'class_thresholds' is no input.*override"),
        (drop("input", "iou_threshold"), "'iou_threshold' is no input.*override"),
        (drop("initializer", "class_thresholds"), "inputs are"),
        (no_thresholds, "0 initializers 'class_thresholds'"),
        (
            replace("class_thresholds", np.array([0.5], np.float32)),
            r"'class_thresholds' is float32 \[1\], not float32 \[2\]",
        ),
        (
            replace("class_thresholds", np.array([0.5, 0.5])),
            r"'class_thresholds' is float64 \[2\], not float32 \[2\]",
        ),
        (replace("iou_threshold", np.array(0.6, np.float32)), r"'iou_threshold' is float32 \[\]"),
        (
            replace("class_thresholds", np.array([0.5, np.nan], np.float32)),
            "class 'cat': the graph's threshold is nan",
        ),
        (
            replace("class_thresholds", np.array([0.5, 0.25], np.float32)),
            "class 'cat': the graph's threshold is 0.25, the card's 0.5",
        ),
        (replace("iou_threshold", np.array([0.5], np.float32)), "iou_threshold is 0.5"),
        (damage, "'class_thresholds' is damaged"),
    ],
)
def test_what_breaks_the_contract_is_refused_in_a_sentence(read, tmp_path, edit, message):
    with pytest.raises(CardError, match=message) as caught:
        read(edit)
    assert str(caught.value).startswith(f"{tmp_path / 'detector.onnx'}: ")
    assert "\n" not in str(caught.value)


def say_uint8(model: ModelProto) -> None:
    card = DetectorCard.from_json(model.metadata_props[0].value)
    set_card(card.model_copy(update={"input": "uint8"}).to_json())(model)


def test_images_may_be_uint8_of_any_size(read):
    def edit(model: ModelProto) -> None:
        retype("input", "images", TensorProto.UINT8, ["b", "h", "w", 3])(model)
        say_uint8(model)

    assert read(edit).card.input == "uint8"


@pytest.mark.parametrize(
    ("element", "shape"),
    [
        (TensorProto.UINT8, ["b", 8, 16, 3]),
        (TensorProto.UINT8, ["b", 3, "h", "w"]),
        (TensorProto.UINT8, [1, "h", "w", 3]),
        (TensorProto.FLOAT, ["b", 3, 8, 16]),
    ],
)
def test_uint8_images_of_another_layout_are_refused(read, element, shape):
    def edit(model: ModelProto) -> None:
        retype("input", "images", element, shape)(model)
        say_uint8(model)

    message = r"not uint8 \[batch, height, width, 3\] with images of any size"
    with pytest.raises(CardError, match=message):
        read(edit)


def test_an_output_without_a_shape_is_the_runtimes_business(read):
    assert read(retype("output", "boxes", TensorProto.FLOAT, None)).card.name == "pets"


def external_tensor() -> TensorProto:
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secrets")
    return tensor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"not a model", "not an ONNX file"),
        (b"\x00\xff" * 50, "not an ONNX file"),
        (b"\x08" + b"\xff" * 20, "not an ONNX file"),
        (b"PK\x03\x04 a zip file", "not an ONNX file"),
        (b"\x08\x0a", "holds no graph"),  # a message with an IR version and nothing else
    ],
)
def test_what_is_no_onnx_file_is_refused(tmp_path, content, message):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CardError, match=message):
        read_detector(path)


def test_names_that_are_not_utf8_are_refused_in_a_sentence(tmp_path, small_model):
    path = tmp_path / "x.onnx"
    path.write_bytes(small_model.SerializeToString().replace(b"labels", b"\xff\xfebels"))
    with pytest.raises(CardError):
        read_detector(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_detector(tmp_path / "none.onnx")


@pytest.mark.parametrize("path", ["/", "/dev/zero"], ids=["folder", "device"])
def test_a_folder_or_a_device_is_no_file(path):
    with pytest.raises(CardError, match="not a file"):
        read_detector(path)


def test_a_written_detector_is_read_again(tmp_path, small_model, small_card):
    path = tmp_path / "made" / "x.onnx"
    small_model.metadata_props[0].key = "author"
    write_detector(path, small_model, small_card)
    content = path.read_bytes()
    assert read_detector(path).card == small_card
    write_detector(path, onnx.load(path), small_card)  # its old card makes way for the new
    assert path.read_bytes() == content
    keys = [entry.key for entry in onnx.load(path).metadata_props]
    assert keys == ["author", CARD_KEY, SEAL_KEY]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (replace("iou_threshold", np.array([0.5], np.float32)), CardError, "iou_threshold is 0.5"),
        (lambda m: m.graph.initializer.append(external_tensor()), CardError, "'far' is kept in"),
        (retype("output", "boxes", TensorProto.FLOAT, [1, 2, 4]), ValueError, "not a valid ONNX"),
        (lambda m: m.ClearField("opset_import"), ValueError, "not a valid ONNX graph"),
        (
            lambda m: m.graph.node.append(helper.make_node("Relu", ["nowhere"], ["y"])),
            ValueError,
            "not a valid ONNX graph.*nowhere",
        ),
    ],
)
def test_what_the_reader_or_onnx_would_refuse_is_not_written(
    tmp_path, small_model, small_card, edit, error, message
):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"old")
    edit(small_model)
    with pytest.raises(error, match=f"(?s){message}"):
        write_detector(path, small_model, small_card)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_seal_holds_until_a_bit_changes():
    sealed = seal(b"\x08\x0a", 10)
    assert not is_broken(sealed)
    for place in range(2):  # what is sealed; the seal itself comes after
        for bit in range(8):
            changed = bytearray(sealed)
            changed[place] ^= 1 << bit
            assert is_broken(bytes(changed))
    changed = bytearray(sealed)
    changed[-3] ^= 1  # of the digest
    assert is_broken(bytes(changed))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x08\x0a", bytes(200), b"\xff" * 200])
def test_what_was_never_sealed_is_not_broken(content):
    assert not is_broken(content)


def test_every_changed_bit_of_the_weights_of_an_export_is_seen(detector_path, tmp_path):
    content, path = detector_path.read_bytes(), tmp_path / "flipped.onnx"
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content) - 200, size=40):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(CardError, match="damaged: its bytes are not those whose digest"):
            read_detector(path)


def test_a_tool_that_writes_the_file_anew_may_change_it(detector_path, tmp_path):
    model, path = onnx.load(detector_path), tmp_path / "changed.onnx"
    model.graph.node[0].doc_string = "optimised"
    onnx.save(model, path)
    file = read_detector(path)
    assert detector_bytes(model, file.card).endswith(seal(b"", model.ir_version)[-2:])
    assert [entry.key for entry in model.metadata_props].count(SEAL_KEY) == 1


def test_sealing_anew_gives_the_same_bytes(detector_path):
    file = read_detector(detector_path)
    model = onnx.load_model_from_string(file.content)
    assert detector_bytes(model, file.card) == file.content


def test_runtimes_read_through_the_seal(detector_path):
    file = read_detector(detector_path)
    assert onnx.load_model_from_string(file.content).ir_version == 10
    meta = onnxruntime.InferenceSession(file.content, providers=["CPUExecutionProvider"])
    assert len(meta.get_modelmeta().custom_metadata_map[SEAL_KEY]) == 64
    images = np.zeros((1, 3, 64, 96), np.float32)
    for runtime in RUNTIMES:
        assert len(runtime(file).run(images, {})) == len(OUTPUTS)
