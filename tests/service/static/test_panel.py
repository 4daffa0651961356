"""The sliders: what they start at, what moving them does, what is said of it."""

import math

import httpx
import numpy as np
import pytest
from playwright.sync_api import expect

from ghm_triton.evidence import ClassStatistics, ClassThreshold, as_float32

pytestmark = pytest.mark.slow


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
    page.choose(photo)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    slider = page.get_by_label("red", exact=True)
    row = page.locator("li", has=slider)
    expect(row.locator(".passing")).to_contain_text("1 of")
    slider.press("End")
    expect(row).to_have_attribute("data-passing", "0")
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "2")
    assert page.pixel(32, 56)[3] == 0
    assert page.shown() == page.expected(photo, thresholds='{"red": 1.0}')
    slider.fill("0.105")
    slider.press("ArrowLeft")
    expect(row.locator(".value")).to_have_text("0.100")
    truth = page.expected(photo, thresholds='{"red": 0.1}')
    assert page.shown() == truth
    assert len(truth) > 3
    page.get_by_role("button", name="Reset").click()
    assert page.shown() == page.expected(photo)
    expect(row.locator(".value")).to_have_text("0.500")
    expect(slider).to_have_value("0.5")
    assert asked == []


def test_a_threshold_is_compared_as_the_service_compares_it(visit, live_service, photo):
    """In float32: a box whose score is the float32 of a slider's place stands there."""
    page = visit(live_service)
    page.choose(photo)
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


def test_a_score_that_is_its_threshold_stands(
    visit, live_service, write_detector, serve_file, photo
):
    found = httpx.post(f"{live_service}/v1/detect", content=photo.read_bytes()).json()["detections"]
    scores = {one["class"]: one["score"] for one in found}
    entries = [
        ClassThreshold(
            name=name, threshold=scores[name], source="manual", support=1, ground_truths=1
        )
        for name in ("red", "green", "blue")
    ]
    page = visit(serve_file(write_detector(thresholds=entries)))
    page.choose(photo)
    assert len(page.shown()) == 3
    assert page.shown() == page.expected(photo)


@pytest.fixture(scope="module")
def studied(write_detector, serve_file) -> tuple[str, ClassStatistics]:
    """A service whose card has seen many scores, and one class no evidence at all."""
    rng = np.random.default_rng(0)
    histograms = rng.integers(0, 40, (2, 3, 200))
    histograms[:, 2] = 0
    statistics = ClassStatistics(
        ("red", "green", "blue"),
        anchors=10**6,
        positives=[500, 40, 0],
        ground_truths=[9000, 7000, 0],
        positive_scores=histograms[0].tolist(),
        negative_scores=histograms[1].tolist(),
    )
    common = {"support": 1, "ground_truths": 1}
    entries = [
        ClassThreshold(name="red", threshold=0.5, source="manual", precision=0.5, **common),
        ClassThreshold(name="green", threshold=as_float32(1e-4), source="prior", **common),
        ClassThreshold(name="blue", threshold=0.5, source="fallback", support=0, ground_truths=0),
    ]
    return serve_file(write_detector(statistics=statistics, thresholds=entries)), statistics


def test_a_moved_threshold_shows_its_own_evidence(visit, studied):
    url, statistics = studied
    page = visit(url)
    slider = page.get_by_label("red", exact=True)
    row = page.locator("li", has=slider)
    expect(row.locator(".now")).to_be_hidden()
    for presses in (1, 30, 60):  # to 0.505, 0.655, 0.955
        slider.focus()
        page.press_key("ArrowRight", presses)
        at = float(slider.input_value())
        shares = statistics.precision_recall_at(0, at)
        precision, recall = (math.floor(share * 100 + 0.5) for share in shares)
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
    page.choose(photo)
    truth = page.expected(photo)
    expect(page.locator("#rows tr")).to_have_count(len(truth))
    assert [row[::2] for row in page.shown()] == [row[::2] for row in truth]


def test_more_boxes_than_the_model_gives_at_once(visit, write_detector, serve_file, photo):
    """With two at most, green is crowded out of the preview, and comes back when red goes."""
    page = visit(serve_file(write_detector(max_detections=2)))
    page.choose(photo)
    assert {row[0] for row in page.shown()} == {"red", "blue"}
    page.get_by_label("red", exact=True).press("End")
    truth = page.expected(photo, thresholds='{"red": 1.0}')
    assert {row[0] for row in truth} == {"green", "blue"}
    expect(page.locator("#rows tr")).to_have_count(2)
    assert page.shown() == truth
