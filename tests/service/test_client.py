"""The client, against a real service; only the timing of retries is told by a transport."""

import io
import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import anyio
import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from export.card import DetectorCard
from export.file import read_detector
from service.app import create_app
from service.client import AsyncClient, Client, ServiceError, requests
from service.core.settings import Settings
from service.engine.session import ModelError, ServedModel

KINDS = ("sync", "async")


def asker(kind: str, url: str, *given, **options):
    """Calls a method of a client of either kind, from the making of the client to its end."""

    def ask(method: str, *arguments, **keywords):
        if kind == "sync":
            with Client(url, *given, **options) as client:
                return getattr(client, method)(*arguments, **keywords)

        async def run():
            async with AsyncClient(url, *given, **options) as client:
                return await getattr(client, method)(*arguments, **keywords)

        return anyio.run(run)

    return ask


@pytest.fixture(params=KINDS)
def ask(request, live_service):
    return asker(request.param, live_service)


@pytest.fixture
def photo(png, tmp_path):
    path = tmp_path / "a photo.png"
    path.write_bytes(png)
    return path


def answer(url: str, png: bytes, **options) -> dict:
    return httpx.post(f"{url}/v1/detect", content=png, params=options).json()


def refused(action, *arguments, **keywords) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        action(*arguments, **keywords)
    return caught.value


def test_every_kind_of_image_gets_the_services_answer(ask, live_service, photo, png, image):
    body = answer(live_service, png)
    for source in (photo, str(photo), png, bytearray(png), image):
        result = ask("detect", source)
        assert result.to_dict() == {"image": body["image"], "detections": body["detections"]}
        assert (result.model, result.width, result.height) == ("colours", 192, 128)
        assert result.version == body["version"]
        assert set(result.timings) == set(body["timings"])


def test_detections_are_typed_and_say_what_they_passed(ask, png, card):
    result = ask("detect", png)
    assert len(result) == 3
    for found in result:
        assert isinstance(found.box, tuple)
        assert found.class_name == card.class_names[found.label]
        assert found.threshold == card.class_thresholds[found.label]
        assert found.passed


def test_a_list_gets_a_list_in_its_order(ask, png, encode, scene):
    blank = encode(scene(40, 30, {}))
    results = ask("detect", [blank, png, blank])
    assert [len(one) for one in results] == [0, 3, 0]
    assert [one.width for one in results] == [40, 192, 40]
    assert [len(one) for one in ask("detect", (png,))] == [3]


def test_one_bad_image_of_a_list(ask, png):
    pair = [png, b"no image"]
    error = refused(ask, "detect", pair)
    assert (error.status, len(error.request_id)) == (415, 32)
    assert "files[1]" in error.detail
    good, bad = ask("detect", pair, return_errors=True)
    assert len(good) == 3
    assert (bad.status, bad.detail) == (415, error.detail)
    assert refused(ask, "detect", pair[1:], return_errors=True).status == 415  # nothing to answer


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"threshold": 0.95}, {"threshold": "0.95"}),
        ({"thresholds": {"red": 1.0}}, {"thresholds": '{"red": 1.0}'}),
        ({"classes": ["red", "blue"]}, {"classes": "red,blue"}),
        ({"classes": "blue"}, {"classes": "blue"}),
        ({"iou": 0.0, "threshold": 0.01}, {"iou": "0.0", "threshold": "0.01"}),
        ({"max_detections": 1}, {"max_detections": "1"}),
    ],
)
def test_options_reach_the_service(ask, live_service, png, options, sent):
    plain = answer(live_service, png)["detections"]
    truth = answer(live_service, png, **sent)["detections"]
    assert truth != plain
    assert ask("detect", png, **options).to_dict()["detections"] == truth


def test_pillow_images_are_taken_as_they_are_in_memory(ask, image, encode):
    turned = Image.Exif()
    turned[0x0112] = 6
    opened = Image.open(io.BytesIO(encode(image, exif=turned)))
    result = ask("detect", opened)
    assert (result.width, result.height) == opened.size == (192, 128)
    grey = ask("detect", image.convert("L"), threshold=0)
    assert grey.detections[0].score < 0.9  # no colour is left
    assert len(ask("detect", image.convert("CMYK"))) == 3


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (7, TypeError, "got int"),
        ([], ValueError, "empty list"),
        (Image.new("F", (4, 4)), ValueError, "mode F"),
        ("no/such.png", FileNotFoundError, "no/such.png"),
    ],
)
def test_what_is_no_image_is_named_before_anything_is_sent(source, error, message):
    with Client("http://127.0.0.1:1") as client, pytest.raises(error, match=message):
        client.detect(source)


def test_a_class_with_a_comma_goes_alone(png):
    with Client("http://127.0.0.1:1") as client, pytest.raises(ValueError, match="'cat, black'"):
        client.detect(png, classes=["dog", "cat, black"])


def test_and_then_it_reaches_the_service(serve, ready_at, write_detector, card, png):
    names = ["cat, black", "dog", "cow"]
    entries = [
        replace(entry, name=name) for entry, name in zip(card.thresholds, names, strict=True)
    ]
    path = write_detector(class_names=names, thresholds=entries)
    with serve(create_app(Settings(model=path, threads=1, provider="cpu"))) as url:
        for classes in (names[0], names[:1]):
            found = asker("sync", ready_at(url))("detect", png, classes=classes)
            assert [one.class_name for one in found] == names[:1]


def test_errors_are_the_services_own_sentences(ask):
    error = refused(ask, "detect", b"no image")
    assert error.status == 415
    assert "not an image" in error.detail
    assert len(error.request_id) == 32
    assert str(error) == f"415: {error.detail}"
    error = refused(ask, "detect", b"no image", classes="violet")
    assert (error.status, "'violet'" in error.detail) == (422, True)


def test_models_and_the_card(ask, detector, card):
    (model,) = ask("models")
    assert model.name == "colours"
    assert model.class_names == ("red", "green", "blue")
    assert list(model.thresholds.values()) == card.class_thresholds
    assert model.problem is None
    shown = ask("model", "colours")
    assert DetectorCard.model_validate(shown.card) == card
    assert shown.sha256 == model.sha256 == read_detector(detector).sha256
    assert shown.providers == ("CPUExecutionProvider",)
    assert ask("model", "colours", version=shown.version) == shown
    assert "'9'" in refused(ask, "model", "colours", version="9").detail


def test_a_name_is_sent_as_one_part_of_the_path(ask):
    error = refused(ask, "model", "a?b #%41")
    assert error.status == 404
    assert "'a?b #%41'" in error.detail


def test_preview_has_every_box_from_the_floor(ask, png):
    preview = ask("preview", png)
    assert (preview.model, preview.width, preview.height) == ("colours", 192, 128)
    assert [one.class_name for one in preview.classes] == ["red", "green", "blue"]
    assert min(found.score for found in preview.detections) >= preview.floor
    passing = [found for found in preview.detections if found.passed]
    assert [one.to_dict() for one in passing] == ask("detect", png).to_dict()["detections"]
    assert len(passing) < len(preview.detections)
    for one in preview.classes:
        scores = [found.score for found in preview.detections if found.label == one.label]
        assert len(one.counts) == len(preview.steps)
        assert one.counts[0] == sum(score >= preview.steps[0] for score in scores)


def test_a_preview_of_ones_own(ask, png):
    preview = ask("preview", png, floor=0.5, steps=[0.9, 0.75], classes=["red"])
    assert (preview.floor, preview.steps) == (0.5, (0.75, 0.9))
    assert {found.class_name for found in preview.detections} == {"red"}
    assert (preview.truncated, preview.exact_above) == (False, None)
    assert ask("preview", png, floor=0).truncated


def test_several_models(serve, ready_at, write_detector, png, tmp_path):
    for name in ("one", "two"):
        shutil.copy(write_detector(), tmp_path / f"{name}.onnx")
    settings = Settings(models=tmp_path, threads=1, provider="cpu")
    with serve(create_app(settings)) as url:
        for kind in KINDS:
            ask = asker(kind, ready_at(url))
            assert [one.name for one in ask("models")] == ["one", "two"]
            assert refused(ask, "detect", png).status == 422
            assert ask("detect", png, model="two", version="1").model == "two"
            assert ask("preview", png, model="two").model == "two"


def test_tokens(serve, settings, model, png):
    guarded = settings.model_copy(update={"tokens": Settings(tokens="me:secret").tokens})
    with serve(create_app(guarded, model)) as url:
        for kind in KINDS:
            assert refused(asker(kind, url), "detect", png).status == 401
            assert refused(asker(kind, url, "wrong"), "detect", png).status == 401
            assert len(asker(kind, url, "secret")("detect", png)) == 3


class StubbornModel(ServedModel):
    """Loads and does not run."""

    def warm_up(self, options=None):
        raise ModelError("broken")


def test_ready(ask, serve, settings, detector, png):
    assert ask("ready") is True
    broken = StubbornModel(read_detector(detector), provider="cpu")
    with serve(create_app(settings, broken)) as url, socket.create_server(("127.0.0.1", 0)) as idle:
        gone = f"http://127.0.0.1:{idle.getsockname()[1]}"
        idle.close()
        for kind in KINDS:
            assert asker(kind, url)("ready") is False
            assert asker(kind, gone)("ready") is False
            assert refused(asker(kind, gone), "detect", png).status is None
            assert gone in refused(asker(kind, gone), "models").detail


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_does_not_come_in_time(kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = refused(asker(kind, url, timeout=0.05), "models")
    assert error.status is None
    assert "within 0.05 s" in error.detail


def test_another_kind_of_server(serve):
    other = FastAPI()
    other.get("/v1/models")(lambda: {"hello": "world"})
    other.get("/health/ready", status_code=418)(lambda: "teapot")
    with serve(other) as url:
        for kind in KINDS:
            assert "something else" in refused(asker(kind, url), "models").detail
            assert refused(asker(kind, url), "model", "x").detail == "Not Found"
            assert refused(asker(kind, url), "ready").status == 418


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://host:port"])
def test_an_address_that_is_none(url):
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match=r"^url ") as caught:
            client(url)
        assert repr(url) in str(caught.value)


def test_a_prefix_of_the_address_is_kept(serve, settings, model):
    outer = FastAPI()
    outer.mount("/cells", create_app(settings, model))
    with serve(outer) as url:
        error = refused(asker("sync", f"{url}/cells", retries=0), "detect", b"")
    assert error.status in (400, 503)  # ours: a mounted application is not started, hence the 503


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_service_is_asked_again_after_its_time(kind, live_service, png):
    """A transport refuses three times, and then hands over to the real service."""
    refusals = [(429, "2"), (503, "7"), (503, None)]
    bodies, waits = [], []

    def answer(request: httpx.Request) -> httpx.Response:
        boundary = request.headers["Content-Type"].partition("boundary=")[2].encode()
        bodies.append(request.content.replace(boundary, b""))  # drawn anew for each request
        if len(bodies) <= len(refusals):
            status, seconds = refusals[len(bodies) - 1]
            headers = {} if seconds is None else {"Retry-After": seconds}
            return httpx.Response(status, headers=headers, json={"detail": "busy"})
        url = request.url
        real = httpx.post(url, content=request.content, headers=request.headers)
        return httpx.Response(real.status_code, json=real.json())

    async def answer_aside(request):
        return await anyio.to_thread.run_sync(answer, request)

    async def sleep(seconds):
        waits.append(seconds)

    if kind == "sync":
        options = {"transport": httpx.MockTransport(answer), "sleep": waits.append}
    else:
        options = {"transport": httpx.MockTransport(answer_aside), "sleep": sleep}
    assert len(asker(kind, live_service, **options)("detect", png)) == 3
    assert len(set(bodies)) == 1
    assert bodies[0] != b""
    for wait, least in zip(waits, (2, 7, 1), strict=True):
        assert least <= wait <= 1.25 * least
    bodies.clear()
    refusals[:] = [(429, "1")] * 9
    error = refused(asker(kind, live_service, **options, retries=2), "detect", png)
    assert (error.status, error.detail, len(bodies)) == (429, "busy", 3)


def http_date(seconds: int) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("status", "retry_after", "attempt", "least"),
    [
        (503, None, 0, 0.25),
        (503, None, 1, 0.5),
        (429, "soon", 2, 1.0),
        (429, "0", 0, 0),
        (503, http_date(-20), 0, 0),
        (503, "3600", 0, None),  # too long to wait for
        (429, "1", 3, None),  # retried as often as allowed
        *[(status, "1", 0, None) for status in (400, 401, 404, 413, 422, 500, 502, 504)],
    ],
)
def test_the_wait_before_a_retry(status, retry_after, attempt, least):
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    response = httpx.Response(status, headers=headers)
    wait = requests.MODELS.wait(response, attempt, 3)
    # A quarter more at most, so that clients that were refused together do not return together.
    assert wait is None if least is None else least <= wait <= 1.25 * least
    assert requests.READY.wait(response, attempt, 3) is None


def test_a_date_in_the_future_is_waited_for():
    response = httpx.Response(503, headers={"Retry-After": http_date(20)})
    assert 15 <= requests.MODELS.wait(response, 0, 3) <= 25  # dates are in whole seconds


def test_importing_the_client_needs_httpx_alone():
    code = (
        "import sys, json, service.client;"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(json.loads(done.stdout))
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "PIL", "fastapi", "pydantic", "orjson"}
    assert "httpx" in loaded
    assert not loaded & heavy
