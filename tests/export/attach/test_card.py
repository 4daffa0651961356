import json
from pathlib import Path
from typing import Any

import pytest

from export.attach.card import AttachCard
from export.card import CardError

TOLD = {"name": "x", "class_names": ["a", "b"], "thresholds": 0.3, "size": [320, 480]}


def read(folder: Path, **changes: Any) -> AttachCard:
    path = folder / "card.json"
    told = {key: value for key, value in {**TOLD, **changes}.items() if value is not ...}
    path.write_text(json.dumps(told))
    return AttachCard.read(path)


def test_what_is_not_told_has_defaults(tmp_path):
    card = read(tmp_path).detector_card("0" * 64)
    assert card.class_thresholds == pytest.approx([0.3, 0.3], abs=1e-7)  # the nearest float32
    frame = card.preprocessing
    assert (frame.height, frame.width, frame.mean, frame.std) == (320, 480, (0,) * 3, (1,) * 3)
    assert (card.iou_threshold, card.candidates, card.max_detections) == (0.5, 1000, 100)


def test_what_is_told_is_in_the_card(tmp_path):
    told = {"architecture": "ssd", "backbone": "vgg", "data": "coco", "iou_threshold": 0.25}
    told |= {"candidates": 7, "max_detections": 3, "pad_value": 0, "std": [0.5, 0.25, 1]}
    card = read(tmp_path, thresholds={"b": 0.5, "a": 0.25}, **told).detector_card("0" * 64)
    assert card.class_thresholds == [0.25, 0.5]
    assert (card.architecture, card.backbone, card.training.data) == ("ssd", "vgg", "coco")
    assert (card.iou_threshold, card.candidates, card.max_detections) == (0.25, 7, 3)
    assert (card.preprocessing.pad_value, card.preprocessing.std) == (0, (0.5, 0.25, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": ...}, "not valid at name"),
        ({"size": [0, 5]}, "not valid at size.0"),
        ({"thresholds": 1.5}, "not valid at thresholds"),
        ({"thresholds": {"a": 0.5}}, r"thresholds are for \['a'\], classes are \['a', 'b'\]"),
        ({"thresholds": float("nan")}, "not valid at thresholds"),
        ({"resize": "stretch"}, "not valid at resize"),
        ({"colour": "RGB"}, "not valid at colour"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, said):
    with pytest.raises(CardError, match=f"card.json: .*{said}"):
        read(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{"class_names": ["a", "a"]}, {"std": [0, 1, 1]}])
def test_what_the_card_of_a_file_refuses(tmp_path, changes):
    with pytest.raises(CardError, match=r"the card is not valid: .*(repeat|positive)"):
        read(tmp_path, **changes).detector_card("0" * 64)


def test_what_is_no_json(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("{")
    with pytest.raises(CardError, match="not JSON"):
        AttachCard.read(path)
