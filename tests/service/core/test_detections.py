import json

import numpy as np
import pytest

from service.core.detections import DetectOptions, read_options, resolve

URL = "/v1/detect"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "1.5"}, "threshold is '1.5'"),
        ({"threshold": "nan"}, "threshold is 'nan'"),
        ({"threshold": "high"}, "threshold is 'high'"),
        ({"threshold": ""}, "threshold is ''"),
        ({"iou": "-1"}, "iou is '-1'"),
        ({"max_detections": "0"}, "max_detections is '0'"),
        ({"max_detections": "21"}, "at most 20"),
        ({"thresholds": "{"}, "thresholds is '{'"),
        ({"thresholds": "[1]"}, "thresholds is [1]"),
        ({"thresholds": '{"red": 2}'}, "thresholds.'red' is 2"),
        ({"thresholds": '{"cow": 0.5}'}, "unknown class 'cow'; this model knows: red, green, blue"),
        ({"classes": "red,cow"}, "unknown class 'cow'; this model knows: red, green, blue"),
        ({"classes": ""}, "unknown class ''"),
        (
            {"treshold": "0.5"},
            "unknown option 'treshold'; known: model, version, threshold, thresholds",
        ),
        ({"thresholds": str([1] * 10_001)}, "Input has more than 10000 entries"),
        ({f"o{n}": "1" for n in range(65)}, "more than 64 options"),
        ({"format": "xml"}, "format is 'xml'"),
        ({"image_ids": "[1]"}, "goes with format=coco alone"),
        ({"image_ids": "[1, 2]", "format": "coco"}, "image_ids holds 2 for 1 images"),
        ({"image_ids": "[1.5]", "format": "coco"}, "image_ids.0 is 1.5"),
        ({"image_ids": "[true]", "format": "coco"}, "image_ids.0 is True"),
        ([("iou", "0.1"), ("iou", "0.2")], "'iou' is given twice"),
    ],
)
def test_an_option_that_cannot_be_is_422_and_named(client, png, options, message, problem):
    assert message in problem(client.post(URL, content=png, params=options), 422)


def test_a_long_value_is_quoted_in_short(client, png, problem):
    detail = problem(client.post(URL, content=png, params={"classes": "x" * 5000}), 422)
    assert len(detail) < 300


@pytest.mark.parametrize(
    ("given", "shipped"),
    [
        ({}, True),
        ({"max_detections": "1"}, True),
        ({"iou": "0.3"}, False),
        ({"threshold": "0.5"}, False),
        ({"classes": "red"}, False),
    ],
)
def test_what_is_wanted_is_as_shipped_or_not(card, given, shipped):
    assert (
        resolve(read_options(given.items(), DetectOptions), card).is_shipped_with(card) is shipped
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        # The scores are 0.98, 0.93 and 0.98; the thresholds of the file 0.5, 0.6 and 0.7.
        ({"threshold": 0.95}, {"red", "blue"}),
        ({"thresholds": '{"green": 0.99}'}, {"red", "blue"}),
        ({"threshold": 0.999, "thresholds": '{"green": 0.1}'}, {"green"}),
        ({"classes": "red, blue"}, {"red", "blue"}),
        ({"classes": "green"}, {"green"}),
        # Reds by the dozen, each better than any green, would fill the answer.
        ({"threshold": 0, "iou": 1, "classes": "green"}, {"green"}),
    ],
)
def test_thresholds_and_classes(client, png, card, options, found):
    detections = client.post(URL, content=png, params=options).json()["detections"]
    assert {one["class"] for one in detections} == found
    by_class = json.loads(options.get("thresholds", "{}"))
    for one in detections:
        own = card.class_thresholds[one["label"]]
        expected = by_class.get(one["class"], options.get("threshold", own))
        assert one["threshold"] == float(np.float32(expected))
    if options.get("iou") == 1:
        assert len(detections) == card.max_detections


def test_a_threshold_is_reached_at_equality(client, png):
    def classes(**options):
        answer = client.post(URL, content=png, params=options).json()
        return {one["class"]: one["score"] for one in answer["detections"]}

    score = classes()["green"]
    assert "green" in classes(threshold=score)
    above = float(np.nextafter(np.float32(score), np.float32(1)))
    assert "green" not in classes(threshold=above)


def test_iou_and_max_detections(client, png):
    few, many, best = (
        client.post(URL, content=png, params={"threshold": 0.1, **options}).json()["detections"]
        for options in ({"iou": 0.1}, {"iou": 0.5}, {"iou": 0.5, "max_detections": 2})
    )
    assert len(few) < len(many)
    assert best == many[:2]
