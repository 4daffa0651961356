"""The page from an image to its boxes, for whoever asks and whichever model answers."""

import base64
import re
import shutil
from contextlib import suppress

import httpx
import pytest
from playwright.sync_api import Error, expect

from ghm_triton.evidence import ClassThreshold
from service.app import create_app
from service.core.settings import Settings

pytestmark = pytest.mark.slow

BLUE = (0x00, 0x72, 0xB2)  # the first of the colours: of class "red"


def test_choosing_an_image_shows_what_the_service_detects(visit, live_service, photo):
    page = visit(live_service)
    page.choose(photo)
    assert page.shown() == page.expected(photo)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.locator("#summary")).to_contain_text("3 boxes")
    expect(page.locator("#summary")).to_contain_text("1 × green")
    assert page.locator("#photo").get_attribute("alt") == "photo.png"
    assert page.title() == "colours: detector"


def test_boxes_are_drawn_where_they_are(visit, live_service, photo):
    page = visit(live_service)
    page.choose(photo)
    assert {row[0]: row[2] for row in page.shown()}["red"] == "32, 32, 64, 64"
    for x, y in ((32, 56), (64, 56), (48, 64)):  # left, right and lower edge
        assert page.pixel(x, y) == (*BLUE, 255)
    for x, y in ((48, 48), (20, 20), (100, 100)):
        assert page.pixel(x, y)[3] == 0


GIVE = """([content, name, event]) => {
    const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type: "image/png" }));
    const options = { bubbles: true, cancelable: true };
    document.body.dispatchEvent(event === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: data })
        : new DragEvent(event, { ...options, dataTransfer: data }));
}"""


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(visit, live_service, png, event):
    page = visit(live_service)
    expect(page.locator("#panel")).to_be_visible()
    page.evaluate(GIVE, [base64.b64encode(png).decode(), "given.png", event])
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.locator("#curl")).to_contain_text("file=@given.png")


def test_another_image_takes_the_place_of_the_first(visit, live_service, photo, scene, tmp_path):
    blank = tmp_path / "blank.png"
    scene(300, 100, {}).save(blank)
    page = visit(live_service)
    page.choose(photo)
    page.choose(blank)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "0")
    expect(page.locator("#summary")).to_have_text("No box reaches its threshold.")
    expect(page.locator("#found")).to_be_hidden()
    size = page.locator("#view").bounding_box()
    assert size["width"] / size["height"] == pytest.approx(3, abs=0.02)  # a pixel of the height
    page.choose(photo)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")


def test_an_answer_that_comes_too_late_is_not_shown(visit, live_service, photo, scene, tmp_path):
    blank = tmp_path / "blank.png"
    scene(300, 100, {}).save(blank)
    page = visit(live_service)
    page.choose(photo)
    held = []  # the first question, on its way to the service

    def hold(route):
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/preview", hold)
    page.set_input_files("#file", photo)
    expect(page.locator("#summary")).to_have_text("Looking…")
    page.get_by_label("red", exact=True).press("End")  # nor is the last one's drawn meanwhile
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "0")
    page.choose(blank)
    expect(page.locator("#summary")).to_have_text("No box reaches its threshold.")
    with suppress(Error):  # the page has given it up
        held[0].continue_()
    page.evaluate("fetch('health/live')")  # a round to the service, after the late answer
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "0")
    expect(page.locator("#curl")).to_contain_text("blank.png")


def test_an_image_may_come_before_the_model_is_known(visit, live_service, photo):
    page = visit("about:blank")
    page = visit(live_service)
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.set_input_files("#file", photo)
    expect(page.locator("#summary")).to_have_text("Looking…")
    held[0].continue_()
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    assert len(held) == 1


def test_what_the_browser_cannot_show_is_detected_all_the_same(
    visit, live_service, image, tmp_path
):
    path = tmp_path / "scan.tiff"
    image.save(path)
    page = visit(live_service)
    page.choose(path)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.locator("#photo")).to_have_attribute("alt", re.compile("cannot show"))


def test_a_bad_file_gets_the_services_sentence(visit, live_service, photo, tmp_path):
    notes = tmp_path / "notes.png"
    notes.write_text("no image")
    page = visit(live_service)
    page.choose(photo)
    page.set_input_files("#file", notes)
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("'notes.png': not an image of a kind read here")
    expect(page.locator("#found")).to_be_hidden()
    expect(page.locator("#summary")).to_be_empty()
    page.choose(photo)
    expect(problem).to_be_hidden()


def test_a_service_that_has_gone_is_said_and_asked_again(visit, live_service, photo):
    page = visit(live_service)
    expect(page.locator("#panel")).to_be_visible()
    page.context.set_offline(True)
    page.set_input_files("#file", photo)
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_token_is_asked_for_and_kept_in_the_tab(visit, serve, settings, model, photo):
    guarded = settings.model_copy(update={"tokens": Settings(tokens="me:secret").tokens})
    with serve(create_app(guarded, model)) as url:
        page = visit(url)
        field = page.get_by_label("This service asks for a token.")
        expect(field).to_be_focused()
        field.fill("wrong")
        page.press_key("Enter")
        expect(page.get_by_text("The service does not take this token.")).to_be_visible()
        page.locator("#token").fill("secret")
        page.get_by_role("button", name="Use token").click()
        expect(page.locator("#door")).to_be_hidden()
        page.choose(photo)
        command, token = page.locator("#curl").inner_text(), "secret"
        assert token not in command
        assert page.run_command(photo.parent, GHM_TOKEN=token) == page.shown()
        kept = page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]")
        assert kept == [0, "", 1]
        page.reload()
        expect(page.locator("#panel")).to_be_visible()
        page.get_by_role("button", name="Forget token").click()
        expect(page.get_by_label("This service asks for a token.")).to_be_visible()


def test_several_models_can_be_chosen(visit, serve, ready_at, write_detector, photo, tmp_path):
    folder = tmp_path / "models"
    strict = [
        ClassThreshold(name=name, threshold=0.9375, source="manual", support=1, ground_truths=1)
        for name in ("red", "green", "blue")
    ]
    (folder / "old").mkdir(parents=True)
    shutil.copy(write_detector(), folder / "plain.onnx")
    shutil.copy(write_detector(), folder / "old" / "1.onnx")
    shutil.copy(write_detector(thresholds=strict), folder / "old" / "2.onnx")
    settings = Settings(models=folder, threads=1, provider="cpu")
    with serve(create_app(settings)) as url:
        page = visit(ready_at(url))
        choice = page.get_by_label("Model")
        expect(choice.locator("option")).to_have_text(["old, version 1", "old", "plain"])
        for label, boxes, flag in (
            ("old", 2, "model=old"),
            ("old, version 1", 3, "version=1"),
            ("plain", 3, "model=plain"),
        ):
            choice.select_option(label=label)
            page.choose(photo)
            expect(page.locator("#boxes")).to_have_attribute("data-boxes", str(boxes))
            command = page.locator("#curl").inner_text()
            assert flag in command
            assert page.run_command(photo.parent) == page.shown()


def test_a_model_that_was_replaced_shows_its_own_thresholds(
    visit, serve, ready_at, write_detector, photo, tmp_path
):
    thresholds = [
        ClassThreshold(name=name, threshold=0.9375, source="manual", support=1, ground_truths=1)
        for name in ("red", "green", "blue")
    ]
    path = tmp_path / "model.onnx"
    shutil.copy(write_detector(), path)
    settings = Settings(model=path, model_control=True, threads=1, provider="cpu")
    with serve(create_app(settings)) as url:
        page = visit(ready_at(url))
        page.choose(photo)
        expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
        shutil.copy(write_detector(thresholds=thresholds), path)
        assert httpx.post(f"{url}/v1/models/colours/reload").status_code == 200
        page.choose(photo)
        expect(page.locator("#boxes")).to_have_attribute("data-boxes", "2")
        expect(page.locator('li[data-class="red"] .value')).to_have_text("0.938")
        assert page.shown() == page.expected(photo)
