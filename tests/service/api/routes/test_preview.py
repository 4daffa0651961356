import base64

import numpy as np
import pytest

from service.core.schema import PreviewResponse

URL = "/v1/thresholds/preview"


def preview(client, png, **options) -> dict:
    response = client.post(URL, content=png, params=options)
    assert response.status_code == 200, response.text
    PreviewResponse.model_validate(response.json())
    return response.json()


def counts(body) -> dict[str, list[int]]:
    return {one["class"]: one["counts"] for one in body["classes"]}


@pytest.mark.parametrize("iou", ["0.1", "0.5"])
def test_counts_are_what_each_threshold_would_find(client, png, iou):
    body = preview(client, png, floor="0.3", iou=iou)
    assert not body["truncated"]
    assert body["exact_above"] is None
    assert body["steps"] == [step / 100 for step in range(30, 101)]
    for place in range(0, 71, 7):
        options = {"threshold": body["steps"][place], "iou": iou}
        found = client.post("/v1/detect", content=png, params=options).json()["detections"]
        for name, numbers in counts(body).items():
            assert numbers[place] == sum(one["class"] == name for one in found)


def test_a_score_at_a_step_counts(client, png):
    scores = [one["score"] for one in preview(client, png)["detections"]]
    top = scores[0]
    above = float(np.nextafter(np.float32(top), np.float32(1)))
    same = top + 1e-12  # the graph compares float32, where it is the score itself
    body = preview(client, png, steps=str([top, same, above]))
    assert sum(numbers[0] for numbers in counts(body).values()) == scores.count(top)
    assert sum(numbers[1] for numbers in counts(body).values()) == scores.count(top)
    assert sum(numbers[2] for numbers in counts(body).values()) == 0


def test_detections_are_those_at_the_floor(client, png):
    body = preview(client, png, floor="0.3", iou="0.5")
    detected = client.post(
        "/v1/detect", content=png, params={"threshold": "0.3", "iou": "0.5"}
    ).json()
    assert body["floor"] == pytest.approx(0.3, abs=1e-7)  # a float32
    assert len(body["detections"]) > 3
    for one in detected["detections"]:
        del one["threshold"]
    assert body["detections"] == detected["detections"]
    assert body["image"] == {"width": 192, "height": 128}


def test_the_files_thresholds_come_along(client, png, card):
    own = {one["class"]: one["threshold"] for one in preview(client, png)["classes"]}
    assert own == dict(zip(card.class_names, card.class_thresholds, strict=True))


def test_what_the_limit_cuts_off_is_said(client, png, card):
    body = preview(client, png, floor="0", iou="1")
    assert body["truncated"]
    assert len(body["detections"]) == card.max_detections
    assert body["exact_above"] == body["detections"][-1]["score"]
    above = [step for step in body["steps"] if step > body["exact_above"]]
    assert above
    found = client.post("/v1/detect", content=png, params={"threshold": above[0], "iou": "1"})
    place = body["steps"].index(above[0])
    exact = sum(numbers[place] for numbers in counts(body).values())
    assert exact == len(found.json()["detections"])


def test_given_steps_are_sorted_and_set_the_floor(client, png):
    body = preview(client, png, steps="[0.75, 0.25, 0.75]")
    assert (body["steps"], body["floor"]) == ([0.25, 0.75], 0.25)


def test_classes_and_json(client, png):
    body = preview(client, png, classes="green")
    assert {one["class"] for one in body["detections"]} == {"green"}
    assert sum(counts(body)["red"]) == 0
    assert counts(body)["green"][0] == len(body["detections"])
    sent = {"image": base64.b64encode(png).decode(), "steps": [0.5], "classes": ["green"]}
    ours = client.post(URL, json=sent).json()
    assert counts(ours) == {"red": [0], "green": [1], "blue": [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "[]"}, "steps is []"),
        ({"steps": "[2]"}, "steps.0 is 2"),
        ({"steps": "0.5"}, "steps is 0.5"),
        ({"steps": "[0.1]", "floor": "0.2"}, "steps holds 0.1, which is below the floor 0.2"),
        ({"floor": "-1"}, "floor is '-1'"),
        ({"classes": "cow"}, "unknown class 'cow'"),
        ({"threshold": "0.5"}, "unknown option 'threshold'; known: model, version, floor, steps"),
        ({"steps": str([0.5] * 1002)}, "steps is [0.5"),
    ],
)
def test_an_option_that_cannot_be_is_422(client, png, options, message, problem):
    assert message in problem(client.post(URL, content=png, params=options), 422)


def test_one_image_alone(client, png, problem):
    assert "one image" in problem(client.post(URL, files={"files": png}), 400)
    problem(client.post(URL, content=png[:99]), 400)
    problem(client.post(URL, content=b"x"), 415)
    problem(client.post(URL, content=png, params={"model": "x"}), 404)
