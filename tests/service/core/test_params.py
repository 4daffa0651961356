import json

import numpy as np
import pytest

from service.core.params import DetectOptions, read_options, resolve

URL = "/v1/detect"


def send(client, png, **options):
    """One image with options in the query."""
    response = client.post(URL, content=png, params=options)
    assert response.status_code == 200, response.text
    return response.json()


def boxes(body) -> dict[str, list[float]]:
    return {found["class"]: found["box"] for found in body["detections"]}


def test_one_threshold_for_all(client, png):
    # 0.98, 0.93 and 0.98 are the scores.
    body = send(client, png, threshold=0.95)
    assert set(boxes(body)) == {"red", "blue"}
    exact = float(np.float32(0.95))
    assert {found["threshold"] for found in body["detections"]} == {exact}


def test_a_threshold_is_reached_at_equality(client, png):
    score = next(f["score"] for f in send(client, png)["detections"] if f["class"] == "green")
    assert "green" in boxes(send(client, png, threshold=score))
    above = float(np.nextafter(np.float32(score), np.float32(1)))
    assert "green" not in boxes(send(client, png, threshold=above))


def test_thresholds_by_class_leave_the_others_alone(client, png, card):
    body = send(client, png, thresholds=json.dumps({"green": 0.99}))
    assert set(boxes(body)) == {"red", "blue"}
    assert body["detections"][0]["threshold"] in card.class_thresholds
    body = send(client, png, threshold=0.999, thresholds=json.dumps({"green": 0.1}))
    assert set(boxes(body)) == {"green"}


def test_classes_filter(client, png):
    assert set(boxes(send(client, png, classes="red, blue"))) == {"red", "blue"}
    assert set(boxes(send(client, png, classes="green"))) == {"green"}


def test_classes_left_out_take_no_place(client, png, card):
    # Reds by the dozen, each better than any green, would fill the answer.
    body = send(client, png, threshold=0.0, iou=1, classes="green")
    assert len(body["detections"]) == card.max_detections
    assert {found["class"] for found in body["detections"]} == {"green"}


def test_iou(client, png):
    few = send(client, png, threshold=0.1, iou=0.1)["detections"]
    many = send(client, png, threshold=0.1, iou=0.5)["detections"]
    assert len(few) < len(many)


def test_max_detections_keeps_the_best(client, png):
    everything = send(client, png, threshold=0.1)["detections"]
    assert send(client, png, threshold=0.1, max_detections=2)["detections"] == everything[:2]


def test_options_as_form_fields(client, png):
    form = {"threshold": "0.95", "classes": "red,green"}
    body = client.post(URL, files={"file": ("a.png", png)}, data=form).json()
    assert set(boxes(body)) == {"red"}


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


def test_an_option_in_query_and_form_is_422(client, png, problem):
    files = {"file": ("a.png", png)}
    response = client.post(URL, files=files, data={"iou": "0.5"}, params={"iou": "0.6"})
    assert "'iou' is given twice" in problem(response, 422)


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
