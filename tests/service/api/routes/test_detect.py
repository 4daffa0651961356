import base64
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ghm_triton.images.decode import decode
from service.api.routes.detect import JPEG, PNG, preferred_type
from service.core.schema import DetectManyResponse, DetectResponse, PreviewResponse
from service.images import letterbox

URL = "/v1/detect"
PREVIEW = "/v1/thresholds/preview"


def send(client, png, **options):
    """One image with options in the query."""
    response = client.post(URL, content=png, params=options)
    assert response.status_code == 200, response.text
    return response.json()


def boxes(body) -> dict[str, list[float]]:
    return {found["class"]: found["box"] for found in body["detections"]}


def test_raw_body(client, png, card):
    response = client.post(URL, content=png, headers={"Content-Type": "image/png"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    DetectResponse.model_validate(body)
    assert body["model"] == "colours"
    assert body["image"] == {"width": 192, "height": 128}
    assert boxes(body) == {
        "red": [32, 32, 64, 64],
        "green": [128, 32, 160, 64],
        "blue": [64, 80, 96, 112],
    }
    for found in body["detections"]:
        assert found["threshold"] == card.class_thresholds[found["label"]]
        assert found["class"] == card.class_names[found["label"]]
        assert found["score"] >= found["threshold"]
    timings = body["timings"]
    parts = timings["read_ms"] + timings["decode_ms"] + timings["inference_ms"]
    assert 0 < parts <= timings["total_ms"] + 0.002  # each is rounded to a thousandth


def test_the_service_answers_what_the_model_says(client, model, png, card):
    row, geometry = letterbox(decode(png, 10**6), card.preprocessing)
    truth = model.detect(row[None])[0]
    found = send(client, png)["detections"]
    assert [one["score"] for one in found] == truth.scores.tolist()
    assert [one["label"] for one in found] == truth.labels.tolist()
    expected = geometry.to_image(truth.boxes)
    # Boxes are answered to a thousandth of a pixel.
    np.testing.assert_allclose([one["box"] for one in found], expected, atol=0.0005 + 1e-12)


def test_files_are_a_list_in_order(client, encode, scene, png):
    other = encode(scene(96, 64, {(0, 0, 16, 16): "#ff0000"}), "JPEG", quality=95)
    files = [("files", ("a.png", png)), ("files", ("b.jpg", other)), ("files", ("c.png", png))]
    body = client.post(URL, files=files).json()
    DetectManyResponse.model_validate(body)
    first, second, third = body["results"]
    assert boxes(first) == boxes(third) == boxes(send(client, png))
    assert second["image"] == {"width": 96, "height": 64}
    assert boxes(second) == {"red": [0, 0, 16, 16]}


def test_upright_pixels_are_answered_in(client, encode, image):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    body = send(client, turned)
    assert body["image"] == {"width": 192, "height": 128}
    assert boxes(body)["red"] == [32, 32, 64, 64]


def test_nothing_found_is_an_empty_list(client, encode, scene):
    assert send(client, encode(scene(50, 50, {})))["detections"] == []


def test_an_image_that_cannot_be_read_has_an_error_in_its_place(client, png):
    files = [("files", ("a.png", png)), ("files", ("b.png", b"nonsense")), ("files", ("c", png))]
    response = client.post(URL, files=files)
    assert response.status_code == 200
    DetectManyResponse.model_validate(response.json())
    first, second, third = response.json()["results"]
    assert boxes(first) == boxes(third) == boxes(send(client, png))
    assert second["error"]["status"] == 415
    assert second["error"]["title"] == "Unsupported Media Type"
    assert second["error"]["detail"].startswith("files[1] 'b.png': not an image")


def test_where_no_image_can_be_read_the_request_fails_as_the_first(client, png, problem):
    files = [("files", ("a.png", png[:99])), ("files", ("b.png", b"nonsense"))]
    assert "files[0] 'a.png': the PNG image" in problem(client.post(URL, files=files), 400)
    assert "files[0] 'b.png'" in problem(client.post(URL, files=files[1:]), 415)


def test_the_model_may_be_named(client, png, problem):
    assert send(client, png, model="colours", version="1")["version"] == "1"
    assert "'x'" in problem(client.post(URL, content=png, params={"model": "x"}), 404)
    response = client.post(URL, content=png, params={"version": "2"})
    assert "no version '2'" in problem(response, 404)


def test_of_several_models_one_is_named(tmp_path, detector, serve_with, png, problem):
    (tmp_path / "a.onnx").write_bytes(detector.read_bytes())
    (tmp_path / "b").mkdir()
    for version in ("1", "2"):
        (tmp_path / "b" / f"{version}.onnx").write_bytes(detector.read_bytes())
    with serve_with(None, model=None, models=tmp_path) as client:
        while client.get("/health/ready").status_code != 200:
            pass
        assert "a, b" in problem(client.post(URL, content=png), 422)
        body = send(client, png, model="b")
        assert (body["model"], body["version"]) == ("b", "2")
        form = {"model": "b", "version": "1"}
        body = client.post(URL, files={"file": png}, data=form).json()
        assert (body["model"], body["version"]) == ("b", "1")
        assert send(client, png, model="a")["model"] == "a"


def test_coco_results(client, png):
    files = [("files", png), ("files", png)]
    body = client.post(URL, files=files, data={"format": "coco"}).json()
    (first, *_), number = send(client, png)["detections"], 3
    x1, y1, x2, y2 = first["box"]
    expected = {
        "image_id": 0,
        "category_id": first["label"] + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": first["score"],
    }
    assert body[0] == expected
    assert [one["image_id"] for one in body] == [0] * number + [1] * number
    named = send(client, png, format="coco", image_ids='["photo"]')
    assert [one["image_id"] for one in named] == ["photo"] * number


def test_coco_results_of_a_damaged_image_are_none(client, png, problem):
    files = [("files", ("a", png)), ("files", ("b", png[:99]))]
    detail = problem(client.post(URL, files=files, params={"format": "coco"}), 400)
    assert detail.startswith("files[1] 'b'")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [("*/*", "PNG"), ("image/png;q=0.5, image/*", "JPEG")],
)
def test_a_drawn_image(client, png, image, accept, kind):
    headers = {"Accept": accept}
    response = client.post(URL, content=png, params={"format": "image"}, headers=headers)
    assert response.headers["content-type"] == f"image/{kind.lower()}"
    assert response.headers["x-detections"] == "3"
    drawing = Image.open(io.BytesIO(response.content))
    assert (drawing.format, drawing.size) == (kind, (576, 384))  # small ones are enlarged
    none = client.post(URL, content=png, params={"format": "image", "threshold": "1"})
    assert none.headers["x-detections"] == "0"
    assert none.content != response.content


def test_a_list_is_not_drawn(client, png, problem):
    response = client.post(URL, files={"files": png}, params={"format": "image"})
    assert "format is 'image'" in problem(response, 422)


@pytest.mark.parametrize(
    ("limits", "detail"),
    [
        ({"max_decoded_bytes": 2 * 2**20 + 1000}, "decoding its 192 x 128 pixels takes"),
        ({"max_pixels": 5000}, "the image is 192 x 128 pixels; at most 5000"),
    ],
)
def test_an_image_beyond_the_limits_is_413(serve_with, png, problem, limits, detail):
    with serve_with(**limits) as client:
        assert problem(client.post(URL, content=png), 413).startswith(f"the body: {detail}")


def test_before_the_model_is_ready_503(serve_with, problem):
    response = serve_with(None).post(URL, content=b"x")  # not started, so nothing is loaded
    assert "not ready: the model is not loaded" in problem(response, 503)
    assert response.headers["retry-after"] == "1"


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0"]),
    tail=st.binary(max_size=200),
    query=st.dictionaries(
        st.sampled_from(["threshold", "thresholds", "classes", "iou", "max_detections", "x"]),
        st.text(max_size=20),
        max_size=2,
    ),
)
def test_no_bytes_and_no_options_break_the_service(client, head, tail, query):
    response = client.post(URL, content=head + tail, params=query)
    assert response.status_code in (200, 400, 413, 415, 422), response.text


def test_both_variants_of_a_detector_answer_alike(client, serve_with, uint8_model, encode, image):
    sizes = [(192, 128), (96, 64), (77, 233), (640, 480), (50, 40)]
    files = [("files", encode(image.resize(size))) for size in sizes]  # of many sizes, one batch
    options = {"threshold": "0.05", "iou": "0.9"}
    with serve_with(uint8_model) as other:
        answers = [one.post("/v1/detect", files=files, data=options) for one in (client, other)]
    ours, theirs = (answer.json()["results"] for answer in answers)
    assert sum(len(result["detections"]) for result in ours) > 20
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["image"] == its["image"]
        for a, b in zip(mine["detections"], its["detections"], strict=True):
            assert a.pop("score") == pytest.approx(b.pop("score"), abs=1e-6)  # float32
            assert a == b


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", PNG),
        ("*/*", PNG),
        ("image/*", PNG),
        ("image/png, image/jpeg", PNG),
        ("image/jpeg", JPEG),
        ("IMAGE/JPEG", JPEG),
        ("image/jpeg, */*;q=0.8", JPEG),
        ("image/png;q=0.9, image/jpeg;q=0.8", PNG),
        ("image/png;q=0, */*", JPEG),
        ("image/jpeg;q=high", PNG),
    ],
)
def test_jpeg_where_accept_prefers_it(accept, kind):
    assert preferred_type(accept) == kind


def preview(client, png, **options) -> dict:
    response = client.post(PREVIEW, content=png, params=options)
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
        found = send(client, png, threshold=body["steps"][place], iou=iou)["detections"]
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


def test_detections_are_those_at_the_floor(client, png, card):
    body = preview(client, png, floor="0.3", iou="0.5")
    detected = send(client, png, threshold="0.3", iou="0.5")
    assert body["floor"] == pytest.approx(0.3, abs=1e-7)  # a float32
    assert len(body["detections"]) > 3
    for one in detected["detections"]:
        del one["threshold"]
    assert body["detections"] == detected["detections"]
    assert body["image"] == {"width": 192, "height": 128}
    shipped = {one["class"]: one["threshold"] for one in body["classes"]}
    assert shipped == dict(zip(card.class_names, card.class_thresholds, strict=True))


def test_what_the_limit_cuts_off_is_said(client, png, card):
    body = preview(client, png, floor="0", iou="1")
    assert body["truncated"]
    assert len(body["detections"]) == card.max_detections
    assert body["exact_above"] == body["detections"][-1]["score"]
    above = [step for step in body["steps"] if step > body["exact_above"]]
    assert above
    found = send(client, png, threshold=above[0], iou="1")["detections"]
    place = body["steps"].index(above[0])
    exact = sum(numbers[place] for numbers in counts(body).values())
    assert exact == len(found)


def test_given_steps_are_sorted_and_set_the_floor(client, png):
    body = preview(client, png, steps="[0.75, 0.25, 0.75]")
    assert (body["steps"], body["floor"]) == ([0.25, 0.75], 0.25)


def test_preview_of_classes_and_from_json(client, png):
    body = preview(client, png, classes="green")
    assert {one["class"] for one in body["detections"]} == {"green"}
    assert sum(counts(body)["red"]) == 0
    assert counts(body)["green"][0] == len(body["detections"])
    sent = {"image": base64.b64encode(png).decode(), "steps": [0.5], "classes": ["green"]}
    ours = client.post(PREVIEW, json=sent).json()
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
def test_a_preview_option_that_cannot_be_is_422(client, png, options, message, problem):
    assert message in problem(client.post(PREVIEW, content=png, params=options), 422)


def test_a_preview_is_of_one_image(client, png, problem):
    assert "one image" in problem(client.post(PREVIEW, files={"files": png}), 400)
    problem(client.post(PREVIEW, content=png[:99]), 400)
    problem(client.post(PREVIEW, content=b"x"), 415)
    problem(client.post(PREVIEW, content=png, params={"model": "x"}), 404)
