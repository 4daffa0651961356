from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.card import OUTPUTS, CardError
from export.file import SEAL_KEY, detector_bytes, is_broken, read_detector, seal
from export.runtimes import RUNTIMES


def test_a_seal_holds_until_a_bit_changes():
    sealed = seal(b"\x08\x0a", 10)
    assert not is_broken(sealed)
    for place in range(2):  # what is sealed; the seal itself comes after
        for bit in range(8):
            changed = bytearray(sealed)
            changed[place] ^= 1 << bit
            assert is_broken(bytes(changed))


def test_a_changed_digest_breaks_it():
    sealed = bytearray(seal(b"\x08\x0a", 10))
    sealed[-3] ^= 1
    assert is_broken(bytes(sealed))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\x08\x0a", bytes(200), b"\xff" * 200])
def test_what_was_never_sealed_is_not_broken(content):
    assert not is_broken(content)


def test_every_changed_bit_of_the_weights_of_an_export_is_seen(
    detector_path: Path, tmp_path: Path
) -> None:
    content, path = detector_path.read_bytes(), tmp_path / "flipped.onnx"
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content) - 200, size=40):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(CardError, match="damaged: its bytes are not those whose digest"):
            read_detector(path)


def test_a_tool_that_writes_the_file_anew_may_change_it(
    detector_path: Path, tmp_path: Path
) -> None:
    model, path = onnx.load(detector_path), tmp_path / "changed.onnx"
    model.graph.node[0].doc_string = "optimised"
    onnx.save(model, path)
    file = read_detector(path)
    assert detector_bytes(model, file.card).endswith(seal(b"", model.ir_version)[-2:])
    assert [entry.key for entry in model.metadata_props].count(SEAL_KEY) == 1


def test_sealing_anew_gives_the_same_bytes(detector_path: Path) -> None:
    file = read_detector(detector_path)
    model = onnx.load_model_from_string(file.content)
    assert detector_bytes(model, file.card) == file.content


def test_runtimes_read_through_the_seal(detector_path: Path) -> None:
    file = read_detector(detector_path)
    assert onnx.load_model_from_string(file.content).ir_version == 10
    meta = onnxruntime.InferenceSession(file.content, providers=["CPUExecutionProvider"])
    assert len(meta.get_modelmeta().custom_metadata_map[SEAL_KEY]) == 64
    images = np.zeros((1, 3, 64, 96), np.float32)
    for runtime in RUNTIMES:
        assert len(runtime(file).run(images, {})) == len(OUTPUTS)
