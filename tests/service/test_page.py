"""The page in a real browser, on a real server. What its files are as answers: routes/test_page."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from export.contract import StatisticsCard, ThresholdCard, as_float32
from export.thresholds import evidence
from service.app import create_app, load_model
from service.settings import Settings

BLUE = (0x00, 0x72, 0xB2)  # the first of the colours: of class "red"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TALL_ENOUGH = 44  # pixels of what a finger is to hit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here to look at the page with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser):
    """Opens a page; after the test, it has to have been quiet and to have asked nobody else."""
    contexts, complaints, asked, origins = [], [], set(), set()

    def open_page(url: str, **options) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        origins.add(urlsplit(url).netloc)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if serious(line) else None)
        page.on("request", lambda request: asked.add(urlsplit(request.url)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {one.netloc for one in asked if one.scheme not in ("blob", "data")} <= origins


def serious(line) -> bool:
    """Whether a line of the console is more than Chromium's own note of a refused request."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


@pytest.fixture
def photo(png: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png)
    return path


def choose(page: Page, path: Path) -> None:
    page.set_input_files("#file", path)
    expect(page.locator("#view")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", re.compile(r"\d"))
    expect(page.locator("#summary")).not_to_have_text("Looking…")


def shown(page: Page) -> list[tuple[str, str, str]]:
    """The table: class, score and threshold, box."""
    rows = page.locator("#rows tr").all()
    return [tuple(row.locator("td").all_inner_texts()) for row in rows]


def as_shown(detections: list[dict]) -> list[tuple[str, str, str]]:
    """What the table should say of the service's answer."""
    return [
        (
            one["class"],
            f"{one['score']:.3f} ≥ {one['threshold']:.3f}",
            ", ".join(str(math.floor(value + 0.5)) for value in one["box"]),
        )
        for one in detections
    ]


def detect(url: str, path: Path, **options) -> list[dict]:
    response = httpx.post(f"{url}/v1/detect", content=path.read_bytes(), params=options)
    return response.json()["detections"]


def press(page: Page, key: str, times: int = 1) -> None:
    for _ in range(times):
        page.keyboard.press(key)


def pixel(page: Page, x: float, y: float) -> tuple[int, ...]:
    """The canvas's colour at a place of the image, red to alpha."""
    return tuple(
        page.evaluate(
            """([x, y]) => {
                const canvas = document.getElementById("boxes");
                const pen = canvas.getContext("2d");
                const at = [x * canvas.width / 192, y * canvas.height / 128].map(Math.round);
                return [...pen.getImageData(...at, 1, 1).data];
            }""",
            [x, y],
        )
    )


# ---------------------------------------------------------------- from an image to boxes


def test_choosing_an_image_shows_what_the_service_detects(visit, live_service, photo):
    page = visit(live_service)
    choose(page, photo)
    truth = detect(live_service, photo)
    assert shown(page) == as_shown(truth)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.locator("#summary")).to_contain_text("3 boxes")
    expect(page.locator("#summary")).to_contain_text("1 green")
    assert page.locator("#photo").get_attribute("alt") == "photo.png"
    assert page.title() == "colours: detector"


def test_boxes_are_drawn_where_they_are(visit, live_service, photo):
    page = visit(live_service)
    choose(page, photo)
    box = next(one["box"] for one in detect(live_service, photo) if one["class"] == "red")
    assert box == [32, 32, 64, 64]
    for x, y in ((32, 56), (64, 56), (48, 64)):  # left, right and lower edge
        assert pixel(page, x, y) == (*BLUE, 255)
    for x, y in ((48, 48), (20, 20), (100, 100)):
        assert pixel(page, x, y)[3] == 0


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
    choose(page, photo)
    choose(page, blank)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "0")
    expect(page.locator("#summary")).to_have_text("No box reaches its threshold.")
    expect(page.locator("#found")).to_be_hidden()
    size = page.locator("#view").bounding_box()
    assert size["width"] / size["height"] == pytest.approx(3, abs=0.02)  # a pixel of the height
    choose(page, photo)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")


def test_what_the_browser_cannot_show_is_detected_all_the_same(
    visit, live_service, image, tmp_path
):
    path = tmp_path / "scan.tiff"
    image.save(path)
    page = visit(live_service)
    choose(page, path)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    expect(page.locator("#photo")).to_have_attribute("alt", re.compile("cannot show"))


def test_a_bad_file_gets_the_services_sentence(visit, live_service, photo, tmp_path):
    notes = tmp_path / "notes.png"
    notes.write_text("no image")
    page = visit(live_service)
    choose(page, photo)
    page.set_input_files("#file", notes)
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("'notes.png': not an image of a kind read here")
    expect(page.locator("#found")).to_be_hidden()
    expect(page.locator("#summary")).to_be_empty()
    choose(page, photo)
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


# ---------------------------------------------------------------- thresholds


def test_sliders_start_at_the_models_thresholds_with_their_evidence(visit, live_service, card):
    page = visit(live_service)
    for entry in card.thresholds:
        slider = page.get_by_label(entry.name)
        assert float(slider.input_value()) == pytest.approx(entry.threshold)
        row = page.locator("li", has=slider)
        expect(row.locator(".value")).to_have_text(f"{entry.threshold:.3f}")
        expect(row).to_contain_text("f1 · precision 90 %, recall 80 %")
        expect(row).to_contain_text("50 held-out boxes · trained on 100 anchors")
    expect(page.get_by_role("button", name="Reset")).to_be_disabled()


def test_moving_a_slider_needs_no_server(visit, live_service, photo):
    page = visit(live_service)
    choose(page, photo)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    slider = page.get_by_label("red", exact=True)
    row = page.locator("li", has=slider)
    expect(row.locator(".passing")).to_contain_text("1 of")
    slider.press("End")
    expect(row).to_have_attribute("data-passing", "0")
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "2")
    assert pixel(page, 32, 56)[3] == 0
    assert shown(page) == as_shown(detect(live_service, photo, thresholds='{"red": 1.0}'))
    slider.fill("0.105")
    slider.press("ArrowLeft")
    expect(row.locator(".value")).to_have_text("0.100")
    truth = as_shown(detect(live_service, photo, thresholds='{"red": 0.1}'))
    assert shown(page) == truth
    assert len(truth) > 3
    page.get_by_role("button", name="Reset").click()
    assert shown(page) == as_shown(detect(live_service, photo))
    expect(row.locator(".value")).to_have_text("0.500")
    assert asked == []


def test_a_threshold_is_compared_as_the_service_compares_it(visit, live_service, photo):
    """In float32: a box whose score is the float32 of a slider's place stands there."""
    page = visit(live_service)
    choose(page, photo)
    compare = """async (scores) => {
        const { Panel } = await import(new URL("static/panel.js", document.baseURI));
        const panel = Object.create(Panel.prototype);
        panel.card = { thresholds: [{ name: "one", threshold: 0.5 }] };
        return scores.map(([typed, score]) => {
            panel.moved = new Map([["one", typed]]);
            return score >= panel.threshold(0);
        });
    }"""
    steps = [k / 200 for k in range(201)]
    below = [float(np.nextafter(np.float32(step), np.float32(-1))) for step in steps]
    assert page.evaluate(compare, [[s, as_float32(s)] for s in steps]) == [True] * 201
    pairs = [[step, less] for step, less in zip(steps, below, strict=True)]
    assert page.evaluate(compare, pairs) == [False] * 201


@pytest.fixture(scope="module")
def studied(write_detector, serve) -> Iterator[tuple[str, StatisticsCard]]:
    """A service whose card has seen many scores, and one class no evidence at all."""
    rng = np.random.default_rng(0)
    histograms = rng.integers(0, 40, (2, 3, 200))
    histograms[:, 2] = 0
    statistics = StatisticsCard(
        anchors=10**6,
        positives=[500, 40, 0],
        ground_truths=[9000, 7000, 0],
        positive_scores=histograms[0].tolist(),
        negative_scores=histograms[1].tolist(),
    )
    common = {"support": 1, "ground_truths": 1}
    entries = [
        ThresholdCard(name="red", threshold=0.5, source="manual", precision=0.5, **common),
        ThresholdCard(name="green", threshold=as_float32(1e-4), source="prior", **common),
        ThresholdCard(name="blue", threshold=0.5, source="fallback", support=0, ground_truths=0),
    ]
    path = write_detector(statistics=statistics, thresholds=entries)
    settings = Settings(model=path, threads=1, provider="cpu")
    model = load_model(settings)
    model.warm_up()
    with serve(create_app(settings, model)) as url:
        yield url, statistics


def test_a_moved_threshold_shows_its_own_evidence(visit, studied):
    url, statistics = studied
    page = visit(url)
    slider = page.get_by_label("red", exact=True)
    row = page.locator("li", has=slider)
    expect(row.locator(".now")).to_be_hidden()
    for presses in (1, 30, 60):  # to 0.505, 0.655, 0.955
        slider.focus()
        press(page, "ArrowRight", presses)
        at = float(slider.input_value())
        known = evidence(statistics, 0, as_float32(at))
        precision, recall = (math.floor(known[key] * 100 + 0.5) for key in ("precision", "recall"))
        expect(row.locator(".now")).to_have_text(
            f"Yours: {at:.3f} · precision {precision} %, recall {recall} %"
        )


def test_where_a_threshold_comes_from_is_said(visit, studied):
    page = visit(studied[0])
    rows = {name: page.locator(f'li[data-class="{name}"]') for name in ("red", "green", "blue")}
    expect(rows["red"]).to_contain_text("Model: 0.500, set by hand · precision 50 %")
    expect(rows["green"]).to_contain_text("Model: 0.00010, f1, lifted to the prior")
    expect(rows["blue"]).to_contain_text("a fallback, for want of evidence")
    expect(rows["blue"]).to_contain_text("0 held-out boxes · trained on 0 anchors")
    page.get_by_label("blue", exact=True).press("End")
    expect(rows["blue"].locator(".value")).to_have_text("1.000")
    expect(rows["blue"].locator(".now")).to_be_hidden()


def test_boxes_below_the_previews_floor_are_fetched(visit, studied, photo):
    """The threshold of green is the prior: lower than any preview begins."""
    url, _ = studied
    page = visit(url)
    choose(page, photo)
    truth = as_shown(detect(url, photo))
    expect(page.locator("#rows tr")).to_have_count(len(truth))
    assert [row[::2] for row in shown(page)] == [row[::2] for row in truth]


def test_more_boxes_than_the_model_gives_at_once(visit, write_detector, serve, photo):
    """With two at most, green is crowded out of the preview, and comes back when red goes."""
    settings = Settings(model=write_detector(max_detections=2), threads=1, provider="cpu")
    model = load_model(settings)
    model.warm_up()
    with serve(create_app(settings, model)) as url:
        page = visit(url)
        choose(page, photo)
        assert {row[0] for row in shown(page)} == {"red", "blue"}
        page.get_by_label("red", exact=True).press("End")
        truth = as_shown(detect(url, photo, thresholds='{"red": 1.0}'))
        assert {row[0] for row in truth} == {"green", "blue"}
        expect(page.locator("#rows tr")).to_have_count(2)
        assert shown(page) == truth
        page.context.close()


# ---------------------------------------------------------------- the table and the command


def test_the_table_sorts_by_class_and_by_score(visit, live_service, photo):
    page = visit(live_service)
    choose(page, photo)
    score = page.get_by_role("columnheader", name="Score")
    name = page.get_by_role("columnheader", name="Class")
    expect(score).to_have_attribute("aria-sort", "descending")
    scores = [row[1] for row in shown(page)]
    assert scores == sorted(scores, reverse=True)
    score.get_by_role("button").click()
    expect(score).to_have_attribute("aria-sort", "ascending")
    assert [row[1] for row in shown(page)] == sorted(scores)
    name.get_by_role("button").click()
    expect(name).to_have_attribute("aria-sort", "ascending")
    expect(score).to_have_attribute("aria-sort", "none")
    assert [row[0] for row in shown(page)] == ["red", "green", "blue"]  # the order of labels
    name.get_by_role("button").click()
    assert [row[0] for row in shown(page)] == ["blue", "green", "red"]


def test_a_row_lights_its_box_up_and_a_box_its_row(visit, live_service, photo):
    page = visit(live_service)
    choose(page, photo)
    canvas, rows = page.locator("#boxes"), page.locator("#rows tr")
    for place in (2, 0):
        rows.nth(place).hover()
        expect(canvas).to_have_attribute("data-lit", str(place))
    page.locator("h1").hover()
    expect(canvas).to_have_attribute("data-lit", "")
    size = canvas.bounding_box()
    green = next(i for i, row in enumerate(shown(page)) if row[0] == "green")
    canvas.hover(position={"x": size["width"] * 144 / 192, "y": size["height"] * 48 / 128})
    expect(rows.nth(green)).to_have_class("lit")
    expect(canvas).to_have_attribute("data-lit", str(green))


def run_shell(command: str, folder: Path, **environment: str) -> list[dict]:
    done = subprocess.run(
        ["sh", "-c", command.replace("curl ", "curl --silent --show-error ", 1)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)["detections"]


@pytest.mark.parametrize(
    "name", ["photo.png", 'it\'s "my"; photo,1 (ä) $HOME `id`\\.png', "@a.png"]
)
def test_the_command_answers_what_is_shown(visit, live_service, png, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(png)
    page = visit(live_service)
    choose(page, path)
    command = page.locator("#curl")
    assert as_shown(run_shell(command.inner_text(), tmp_path)) == shown(page)
    assert "thresholds" not in command.inner_text()
    page.get_by_label("red", exact=True).press("End")
    page.get_by_label("blue", exact=True).press("Home")
    expect(command).to_contain_text('{"red":1,"blue":0}')
    expect(page.locator('li[data-class="blue"] .value')).to_have_text("0.000")
    truth = as_shown(run_shell(command.inner_text(), tmp_path))
    expect(page.locator("#rows tr")).to_have_count(len(truth))
    assert {row[0] for row in truth} == {"green", "blue"}
    # Boxes of equal score may change places between one row and the next.
    assert sorted(shown(page)) == sorted(truth)


def test_names_are_text(visit, write_detector, serve, photo):
    """Neither a model nor a class can bring markup, or a shell's commands, into the page."""
    evil = '<img src=x onerror=alert(1)>\'; echo "$(id)"'
    entries = [
        ThresholdCard(name=name, threshold=0.5, source="policy", support=1, ground_truths=1)
        for name in (evil, "green", "blue")
    ]
    path = write_detector(name=evil, class_names=[evil, "green", "blue"], thresholds=entries)
    settings = Settings(model=path, threads=1, provider="cpu")
    model = load_model(settings)
    model.warm_up()
    with serve(create_app(settings, model)) as url:
        page = visit(url)
        choose(page, photo)
        expect(page.locator("h1")).to_have_text(evil)
        assert evil in [row[0] for row in shown(page)]
        page.get_by_label(evil, exact=True).press("End")
        assert len(run_shell(page.locator("#curl").inner_text(), photo.parent)) == 2
        assert page.locator("img").count() == 1
        page.context.close()


def test_copying_the_command(visit, live_service, photo):
    page = visit(live_service, permissions=["clipboard-read", "clipboard-write"])
    choose(page, photo)
    page.locator("#copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#curl").inner_text()


# ---------------------------------------------------------------- who asks, and for which model


def test_a_token_is_asked_for_and_kept_in_the_tab(visit, serve, settings, model, photo):
    guarded = settings.model_copy(update={"tokens": Settings(tokens="me:secret").tokens})
    with serve(create_app(guarded, model)) as url:
        page = visit(url)
        field = page.get_by_label("This service asks for a token.")
        expect(field).to_be_focused()
        field.fill("wrong")
        press(page, "Enter")
        expect(page.get_by_text("The service does not take this token.")).to_be_visible()
        page.locator("#token").fill("secret")
        page.get_by_role("button", name="Use token").click()
        expect(page.locator("#door")).to_be_hidden()
        choose(page, photo)
        command, token = page.locator("#curl").inner_text(), "secret"
        assert token not in command
        assert as_shown(run_shell(command, photo.parent, GHM_TOKEN=token)) == shown(page)
        kept = page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]")
        assert kept == [0, "", 1]
        page.reload()
        expect(page.locator("#panel")).to_be_visible()
        page.get_by_role("button", name="Forget token").click()
        expect(page.get_by_label("This service asks for a token.")).to_be_visible()
        page.context.close()


def test_several_models_can_be_chosen(visit, serve, write_detector, photo, tmp_path):
    folder = tmp_path / "models"
    strict = [
        ThresholdCard(name=name, threshold=0.9375, source="manual", support=1, ground_truths=1)
        for name in ("red", "green", "blue")
    ]
    (folder / "old").mkdir(parents=True)
    shutil.copy(write_detector(), folder / "plain.onnx")
    shutil.copy(write_detector(), folder / "old" / "1.onnx")
    shutil.copy(write_detector(thresholds=strict), folder / "old" / "2.onnx")
    settings = Settings(models=folder, threads=1, provider="cpu")
    with serve(create_app(settings)) as url:
        page = visit(url)
        choice = page.get_by_label("Model")
        expect(choice.locator("option")).to_have_text(["old, version 1", "old", "plain"])
        for label, boxes, flag in (
            ("old", 2, "model=old"),
            ("old, version 1", 3, "version=1"),
            ("plain", 3, "model=plain"),
        ):
            choice.select_option(label=label)
            choose(page, photo)
            expect(page.locator("#boxes")).to_have_attribute("data-boxes", str(boxes))
            command = page.locator("#curl").inner_text()
            assert flag in command
            assert as_shown(run_shell(command, photo.parent)) == shown(page)
        page.context.close()


# ---------------------------------------------------------------- for everybody


def tab_to(page: Page, selector: str) -> None:
    """Go on with the tab key until an element has the focus."""
    for _ in range(40):
        press(page, "Tab")
        if page.locator(f"{selector}:focus").count():
            return
    raise AssertionError(f"the tab key does not reach {selector}")


def test_the_keyboard_alone_is_enough(visit, live_service, photo):
    page = visit(live_service)
    page.on("filechooser", lambda chooser: None)  # so that Chromium opens no dialog, from here on
    expect(page.locator("#panel")).to_be_visible()
    tab_to(page, "#file")
    outline = "document.getElementById('drop')"
    assert page.evaluate(f"getComputedStyle({outline}).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        press(page, "Enter")
    chooser.value.set_files(photo)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    tab_to(page, "#class-0")
    press(page, "End")
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "2")
    expect(page.get_by_role("status")).to_contain_text("2 boxes")
    tab_to(page, "[data-sort=class]")
    press(page, "Enter")
    tab_to(page, "#rows tr")
    lit = page.locator("#boxes")
    expect(lit).to_have_attribute("data-lit", re.compile(r"\d"))
    first = lit.get_attribute("data-lit")
    press(page, "ArrowDown")
    expect(lit).not_to_have_attribute("data-lit", first)
    press(page, "Home")
    expect(lit).to_have_attribute("data-lit", first)
    tab_to(page, "#copy")
    press(page, "Enter")
    expect(page.get_by_role("status")).to_have_text("Copied")


NAMELESS = """() => [...document.querySelectorAll("input, button, select, canvas, img, a, pre")]
    .filter((one) => one.offsetParent !== null && !one.ariaHidden)
    .filter((one) => !(one.labels?.[0]?.textContent || one.textContent || one.alt
        || one.getAttribute("aria-label") || "").trim())
    .map((one) => one.outerHTML)"""

# The ratio of WCAG between each visible text and what is behind it, where that is one colour.
CONTRASTS = """() => {
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => parts(colour).slice(0, 3)
        .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if ((parts(colour)[3] ?? 1) === 1) return colour;
        }
    };
    return [...document.querySelectorAll("body *")]
        .filter((one) => one.checkVisibility() && !one.closest(".unseen, noscript, canvas"))
        .filter((one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((one) => {
            const [a, b] = [light(getComputedStyle(one).color), light(behind(one))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.outerHTML.slice(0, 80)];
        });
}"""

ENOUGH = 4.5  # WCAG 2 AA, of text of ordinary size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(visit, live_service, photo, scheme):
    page = visit(live_service, color_scheme=scheme)
    choose(page, photo)
    page.get_by_label("red", exact=True).press("Home")
    assert page.evaluate(NAMELESS) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [one for one in contrasts if one[0] < ENOUGH] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = int(re.findall(r"\d+", paper)[0])
    assert (lightness > 200) == (scheme == "light")
    headings = page.evaluate("[...document.querySelectorAll('h1, h2')].map((h) => h.tagName)")
    assert headings == ["H1", "H2", "H2", "H2"]
    assert page.evaluate("document.documentElement.lang") == "en"


def test_labels_on_boxes_can_be_read(visit, live_service):
    page = visit(live_service)
    ratios = page.evaluate(
        """async () => {
            const { colourOf, inkOn } = await import(new URL("static/boxes.js", document.baseURI));
            const light = (colour) => {
                const long = colour.length === 4 ? colour.replace(/[0-9a-f]/g, "$&$&") : colour;
                return [1, 3, 5].map((at) => parseInt(long.slice(at, at + 2), 16) / 255)
                    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
            };
            return [0, 1, 2, 3, 4, 5, 6].map((label) => {
                const [a, b] = [light(colourOf(label)), light(inkOn(colourOf(label)))];
                return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
        }"""
    )
    assert min(ratios) > ENOUGH


TARGETS = """() => [...document.querySelectorAll("button, .button, select, input, nav a, #drop")]
    .filter((one) => one.checkVisibility() && !one.matches(".unseen"))
    .map((one) => [one.outerHTML.slice(0, 60), one.getBoundingClientRect()])
    .filter(([, { width, height }]) => width < 44 || height < 44)
    .map(([html, { width, height }]) => [html, width, height])"""


def test_a_phone_shows_it_all_without_scrolling_sideways(visit, live_service, image, tmp_path):
    path = tmp_path / f"{'a-long-name-of-a-photo-' * 6}.png"
    image.save(path)
    page = visit(live_service, **PHONE)
    wide = "document.documentElement.scrollWidth"
    expect(page.locator("#panel")).to_be_visible()
    expect(page.get_by_text("Take a picture")).to_be_visible()
    assert page.evaluate(wide) == PHONE["viewport"]["width"]
    assert page.evaluate(TARGETS) == []
    choose(page, path)
    expect(page.get_by_text("Another image")).to_be_visible()
    assert page.evaluate(wide) == PHONE["viewport"]["width"]
    assert page.evaluate(TARGETS) == []
    canvas = page.locator("#boxes")
    size = canvas.bounding_box()
    canvas.tap(position={"x": size["width"] * 48 / 192, "y": size["height"] * 48 / 128})
    expect(page.locator("#rows tr.lit")).to_contain_text("red")
    # The picture stays in sight beside the last slider.
    page.get_by_label("blue", exact=True).scroll_into_view_if_needed()
    expect(canvas).to_be_in_viewport(ratio=0.9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"viewport": {"width": 1280, "height": 900}}),
        ("dark", {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"}),
        ("phone", {**PHONE, "device_scale_factor": 2}),
    ],
)
def test_pictures_of_the_page(visit, live_service, photo, tmp_path, name, options):
    """To look at: in the folder that GHM_SCREENSHOTS names."""
    folder = Path(os.environ.get("GHM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page = visit(live_service, **options)
    choose(page, photo)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    with Image.open(folder / f"{name}.png") as picture:
        width = options["viewport"]["width"] * options.get("device_scale_factor", 1)
        assert picture.width == width
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 20  # not blank
