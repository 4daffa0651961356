from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import onnx
import pytest

from export.card import QuantizationCard
from export.file import read_detector, write_detector
from export.inspect import LINE, describe
from export.preprocess import accept_uint8
from export.thresholds import rewrite_thresholds
from ghm_triton.cli import main


@pytest.fixture(scope="module")
def file(detector_path):
    return read_detector(detector_path)


@pytest.fixture(scope="module")
def facts(file):
    """What the table says, by its first column."""
    return parse(describe(file))


def parse(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines()[1:]:
        name, rest = line[2:13].strip(), line[13:].strip()
        if name:
            found[name] = rest
        else:
            found[list(found)[-1]] += f" {rest}"
    return found


def test_the_file_itself(file, facts):
    size, digest = len(file.content), hashlib.sha256(file.content).hexdigest()
    assert describe(file).startswith(f"{file.path}: retinanet-tiny\n")
    assert facts["file"] == f"{size / 1e6:.2f} MB, sha256 {digest}"
    assert facts["format"] == "ONNX IR 10, opset 18; card 2"
    weights = sum(
        tensor.ByteSize()
        for tensor in onnx.load(file.path).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert facts["graph"].endswith(f"nodes, weights float32 {weights / 1e6:.2f} MB")


def test_what_it_takes_and_gives(facts):
    assert facts["input"] == "images float32 [B, 3, 64, 96], prepared by the caller"
    assert "RGB letterboxed to 64 x 96 (height x width)" in facts["prepared"]
    assert facts["normalised"].endswith("mean 0.4 0.5 0.6, std 0.229 0.224 0.225")
    assert facts["output"].endswith("in pixels of `images`; at most 150 per image")
    assert facts["NMS"] == "IoU 0.3, per class, over 400 candidates"


def test_what_it_comes_from(file, facts):
    training, counted = file.card.training, file.card.statistics
    assert facts["network"] == "retinanet, backbone tiny"
    assert facts["trained on"] == "voc:cells, 1000 steps, seed 0"
    assert "cls_loss ghm" in facts["losses"]
    assert "strength 0.25" in facts["losses"]
    assert "None" not in facts["losses"]  # an option that was not given
    assert facts["versions"] == "torch 2.15.0"
    assert facts["checkpoint"] == f"sha256 {training.checkpoint_sha256}"
    told = f"{counted.anchors:,} anchors and {sum(counted.positives):,} positives in training"
    assert facts["evidence"] == f"{told}, {sum(counted.ground_truths):,} held-out boxes"


def test_every_class_with_its_threshold_and_evidence(file):
    title, head, _, *rows = describe(file).partition("\n\n")[2].splitlines()
    assert title == "thresholds by policy 'f1'"
    assert " ".join(head.split()) == "class threshold from positives held-out precision recall"
    for entry, row in zip(file.card.thresholds, rows, strict=True):
        numbers = [f"{entry.threshold:.4f}", entry.source, str(entry.support)]
        numbers += [str(entry.ground_truths), f"{100 * entry.precision:.1f}", "%"]
        assert row.split() == [entry.name, *numbers, f"{100 * entry.recall:.1f}", "%"]


def test_lines_fit_a_terminal(file):
    lines = describe(file).splitlines()[1:]  # the first is a path
    assert max(map(len, lines)) <= LINE


def test_the_other_variant_and_hands_on_thresholds_are_told(file, tmp_path):
    path = tmp_path / "other.onnx"
    write_detector(path, *accept_uint8(onnx.load(file.path), file.card))
    rewrite_thresholds(path, path, {"green": 0.125})
    text = describe(read_detector(path))
    assert parse(text)["input"].startswith("images uint8 [B, height, width, 3] of any size, RGB")
    assert "thresholds by policy 'f1', or by hand (manual)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("green")]
    assert row.split()[:3] == ["green", "0.1250", "manual"]


@pytest.mark.parametrize(
    ("calibration", "told"),
    [
        (
            {
                "precision": "int8",
                "calibration_data": "voc:cells",
                "calibration_split": "train",
                "calibration_images": 64,
            },
            "int8 (calibrated on 64 images of voc:cells, split train): AP 0.499 on 72 images of"
            " voc:cells, split test; 0.512 in float32",
        ),
        (
            {"precision": "fp16"},
            "fp16: AP 0.499 on 72 images of voc:cells, split test; 0.512 in float32",
        ),
    ],
)
def test_what_quantization_cost_is_told(file, calibration, told, facts):
    made = QuantizationCard(
        **calibration,
        test_data="voc:cells",
        test_split="test",
        test_images=72,
        ap_before=0.5123,
        ap_after=0.4987,
    )
    card = file.card.model_copy(update={"quantization": made})
    assert parse(describe(replace(file, card=card)))["quantized"] == told
    assert "quantized" not in facts


def test_json_is_the_card_as_it_is_in_the_file(file, capsys):
    assert main(["inspect", str(file.path), "--json"]) == 0
    printed = capsys.readouterr().out
    entry = onnx.load(file.path).metadata_props[0]
    assert printed == entry.value + "\n"
    assert json.loads(printed)["class_names"] == ["red", "green", "blue"]
