import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from export.card import FORMAT_VERSION, CardError, DetectorCard, Preprocessing
from ghm_triton.evidence import ClassStatistics, ClassThreshold, as_float32


def fields(**changes: object) -> dict:
    """The fields of a card as in JSON."""
    thresholds = [
        {
            "name": name,
            "threshold": threshold,
            "source": "policy",
            "support": 10,
            "ground_truths": 5,
            "precision": 0.5,
            "recall": 0.5,
        }
        for name, threshold in (("dog", 0.5), ("cat", 0.25))
    ]
    card = {
        "format_version": 2,
        "name": "pets",
        "architecture": "retinanet",
        "backbone": "resnet18",
        "class_names": ["dog", "cat"],
        "threshold_policy": "f1",
        "thresholds": thresholds,
        "iou_threshold": 0.5,
        "candidates": 1000,
        "max_detections": 100,
        "preprocessing": {"height": 64, "width": 96, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "statistics": {
            "anchors": 100,
            "positives": [1, 2],
            "ground_truths": [1, 2],
            "positive_scores": [[0, 1], [1, 1]],
            "negative_scores": [[0, 1], [1, 1]],
        },
        "training": {
            "data": "pets",
            "losses": {"classification": {"name": "ghm_c", "bins": 30}},
            "seed": 0,
            "steps": 10,
            "versions": {"torch": "2"},
            "checkpoint_sha256": "a" * 64,
        },
    }
    return card | changes


def read(**changes: object) -> DetectorCard:
    return DetectorCard.from_json(json.dumps(fields(**changes)))


def test_a_card_comes_back_from_json_as_it_was():
    card = read()
    assert DetectorCard.from_json(card.to_json()) == card
    assert card.class_thresholds == [0.5, 0.25]


def test_equal_cards_are_equal_bytes():
    backwards = dict(reversed(fields().items()))
    assert DetectorCard.from_json(json.dumps(backwards)).to_json() == read().to_json()


@pytest.mark.parametrize("value", [math.inf, math.nan, {1, 2}])
def test_a_value_that_json_cannot_hold_is_refused(value):
    training = fields()["training"] | {"losses": {"weight": value}}
    with pytest.raises(ValidationError, match="losses must be what JSON can hold"):
        DetectorCard.model_validate(fields(training=training))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(CardError, match="the card is not JSON"):
        DetectorCard.from_json(text)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"card"'])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(CardError, match="the card is not valid at card"):
        DetectorCard.from_json(text)


@given(text=st.text(max_size=50))
def test_any_text_is_a_card_or_a_card_error(text):
    with pytest.raises(CardError):
        DetectorCard.from_json(text)


def test_a_newer_format_is_refused_whatever_else_it_holds():
    with pytest.raises(CardError, match="format_version 3; this package reads up to 2"):
        DetectorCard.from_json('{"format_version": 3, "news": true}')


def test_the_first_format_is_still_read():
    card = read(format_version=1)
    assert (card.format_version, card.input) == (1, "float32")
    assert DetectorCard.from_json(card.to_json()) == card


def test_a_new_card_is_of_the_newest_format():
    newest = {name: value for name, value in fields().items() if name != "format_version"}
    assert DetectorCard.model_validate(newest).format_version == FORMAT_VERSION == 2


def test_images_are_of_a_known_type():
    assert read(input="uint8").input == "uint8"
    with pytest.raises(CardError, match=r"not valid at input: .*'float32' or 'uint8'"):
        read(input="float16")


@pytest.mark.parametrize("version", [0, "1", None])
def test_a_format_that_does_not_exist(version):
    with pytest.raises(CardError, match="not valid at format_version"):
        read(format_version=version)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["dog", "dog"]}, "class names repeat"),
        ({"class_names": ["cat", "dog"]}, r"thresholds are for \['dog', 'cat'\]"),
        ({"class_names": []}, "class_names"),
        ({"iou_threshold": 1.5}, "iou_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"surprise": 1}, "surprise"),
        ({"name": ""}, "name"),
    ],
)
def test_a_card_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(CardError, match=message):
        read(**changes)


def within(part: str, **changes: object) -> dict:
    return {part: fields()[part] | changes}


NESTED: list = []
for _ in range(800):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (within("statistics", positive_scores=[[10**30, 1], [1, 1]]), "integers of 64 bits"),
        (within("statistics", negative_scores=[[2**53 + 1, 1], [1, 1]]), "negative_scores count"),
        (within("statistics", anchors=10**30), "anchors must hold integers of 64 bits"),
        (within("statistics", anchors=[[1000]]), "anchors must be one number"),
        (within("statistics", anchors=2**60), "anchors count to 1152921504606846976; at most"),
        (within("statistics", positives=[math.nan, 1]), "positives must hold integers"),
        (within("preprocessing", height=10**9, width=10**9), "height: .* less than or equal to"),
        (within("preprocessing", height=10**6, width=10**6), "height: .* less than or equal to"),
        (within("preprocessing", height=2**14, width=2**14), "16384 x 16384 are more than"),
        (within("preprocessing", mean=[math.nan, 0, 0]), "preprocessing.mean.0: .* finite"),
        (within("preprocessing", mean=[1e308, 0, 0]), "preprocessing.mean.0"),
        (within("preprocessing", std=[1e-320, 1, 1]), "std must be positive"),
        (within("training", losses={"deep": NESTED}), "nested more than 10 deep"),
        ({"class_names": [str(i) for i in range(10_001)]}, "class_names: .* at most 10000 items"),
        ({"class_names": ["a" * 1001, "b"]}, "class_names.0: .* at most 1000 characters"),
        ({"class_names": ["\ud800", "b"]}, "class_names.0"),
        ({"candidates": 10**30}, "candidates: .* less than or equal to"),
        ({"max_detections": 10**9}, "max_detections: .* less than or equal to"),
        ({"iou_threshold": math.nan}, "iou_threshold: .* finite"),
    ],
)
def test_absurd_values_are_refused_in_one_short_sentence(changes, message):
    with pytest.raises(CardError, match=message) as caught:
        read(**changes)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_card_of_many_megabytes_is_not_parsed():
    with pytest.raises(CardError, match="the card has 33,554,433 characters; at most 33,554,432"):
        DetectorCard.from_json("[" + " " * 2**25)


def test_as_many_classes_as_detectors_have_are_read():
    names = [f"class {i}" for i in range(2000)]
    entries = [{**fields()["thresholds"][0], "name": name} for name in names]
    counts = {name: [1] * 2000 for name in ("positives", "ground_truths")}
    scores = {name: [[1] * 200] * 2000 for name in ("positive_scores", "negative_scores")}
    statistics = {"anchors": 2**53, **counts, **scores}
    card = read(class_names=names, thresholds=entries, statistics=statistics)
    assert DetectorCard.from_json(card.to_json()) == card
    with pytest.raises(CardError, match=r"class names repeat: .*\.\.\. 2000 in all") as caught:
        read(class_names=["dog"] * 2000, thresholds=entries, statistics=statistics)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("missing", sorted(set(fields()) - {"format_version"}))
def test_a_field_that_is_missing_is_named(missing):
    rest = {name: value for name, value in fields().items() if name != missing}
    with pytest.raises(CardError, match=missing):
        DetectorCard.from_json(json.dumps(rest))


def test_statistics_have_one_row_per_class():
    statistics = fields()["statistics"] | {"positives": [1]}
    with pytest.raises(CardError, match=r"statistics: .*positives must be \[2\], got \[1\]"):
        read(statistics=statistics)


def test_statistics_are_of_the_classes_of_the_card_and_a_copy():
    statistics = ClassStatistics(("dog", "cat"), 100, [1, 2])
    card = DetectorCard.model_validate(fields(statistics=statistics))
    statistics.add_labels([1, 1, 1])
    assert card.statistics == ClassStatistics(("dog", "cat"), 100, [1, 2])
    with pytest.raises(ValidationError, match=r"statistics are for \['cat', 'dog'\]"):
        DetectorCard.model_validate(fields(statistics=ClassStatistics(("cat", "dog"))))


def test_class_names_are_written_once():
    card = read()
    assert "class_names" not in json.loads(card.to_json())["statistics"]
    assert card.statistics.class_names == ("dog", "cat")


def threshold(value: float) -> ClassThreshold:
    return ClassThreshold(name="x", threshold=value, source="prior", support=0, ground_truths=0)


def test_a_threshold_is_a_float32():
    assert threshold(as_float32(0.1)).threshold == float(np.float32(0.1))
    with pytest.raises(ValidationError, match="not a float32"):
        threshold(0.1)


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan, math.inf])
def test_a_threshold_is_a_probability(value):
    with pytest.raises(ValidationError):
        threshold(value)


@given(value=st.floats(0, 1))
def test_as_float32_is_numpys(value):
    assert as_float32(value) == float(np.float32(value))


def test_initializers_that_agree_pass():
    read(iou_threshold=0.6).check_initializers([0.5, 0.25], as_float32(0.6))


@pytest.mark.parametrize(
    ("thresholds", "iou", "message"),
    [
        ([0.5], 0.5, "the graph has 1 thresholds, the card 2"),
        ([0.5, 0.25, 0.1], 0.5, "the graph has 3 thresholds, the card 2"),
        ([0.5, np.nextafter(np.float32(0.25), np.float32(1))], 0.5, "class 'cat'"),
        ([math.nan, 0.25], 0.5, "class 'dog': the graph's threshold is nan"),
        ([0.5, 0.25], 0.4, "iou_threshold is 0.4, the card's 0.5"),
        ([0.5, 0.25], math.nan, "iou_threshold is nan"),
    ],
)
def test_initializers_that_differ_are_refused(thresholds, iou, message):
    with pytest.raises(CardError, match=message):
        read().check_initializers(thresholds, iou)


@pytest.mark.parametrize("std", [(0, 1, 1), (1, -1, 1)])
def test_std_is_positive(std):
    with pytest.raises(ValidationError, match="std must be positive"):
        Preprocessing(height=4, width=4, mean=(0, 0, 0), std=std)


@given(width=st.integers(1, 10_000), height=st.integers(1, 10_000))
def test_a_resized_image_fits_and_touches_a_side(width, height):
    new_width, new_height = Preprocessing(
        height=64, width=96, mean=(0, 0, 0), std=(1, 1, 1)
    ).resized(width, height)
    assert 1 <= new_width <= 96
    assert 1 <= new_height <= 64
    assert new_width == 96 or new_height == 64
    # The aspect ratio is kept but for rounding each side to a pixel, at least one.
    scale = min(96 / width, 64 / height)
    assert abs(new_width - max(1, width * scale)) <= 0.5
    assert abs(new_height - max(1, height * scale)) <= 0.5
