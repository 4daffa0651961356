"""The table of detections."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.slow


def test_the_table_sorts_by_class_and_by_score(visit, live_service, photo):
    page = visit(live_service)
    page.choose(photo)
    score = page.get_by_role("columnheader", name="Score")
    name = page.get_by_role("columnheader", name="Class")
    expect(score).to_have_attribute("aria-sort", "descending")
    scores = [row[1] for row in page.shown()]
    assert scores == sorted(scores, reverse=True)
    score.get_by_role("button").click()
    expect(score).to_have_attribute("aria-sort", "ascending")
    assert [row[1] for row in page.shown()] == sorted(scores)
    name.get_by_role("button").click()
    expect(name).to_have_attribute("aria-sort", "ascending")
    expect(score).to_have_attribute("aria-sort", "none")
    assert [row[0] for row in page.shown()] == ["red", "green", "blue"]  # the order of labels
    name.get_by_role("button").click()
    assert [row[0] for row in page.shown()] == ["blue", "green", "red"]


def test_a_row_lights_its_box_up_and_a_box_its_row(visit, live_service, photo):
    page = visit(live_service)
    page.choose(photo)
    canvas, rows = page.locator("#boxes"), page.locator("#rows tr")
    for place in (2, 0):
        rows.nth(place).hover()
        expect(canvas).to_have_attribute("data-lit", str(place))
    page.locator("h1").hover()
    expect(canvas).to_have_attribute("data-lit", "")
    size = canvas.bounding_box()
    green = next(i for i, row in enumerate(page.shown()) if row[0] == "green")
    canvas.hover(position={"x": size["width"] * 144 / 192, "y": size["height"] * 48 / 128})
    expect(rows.nth(green)).to_have_class("lit")
    expect(canvas).to_have_attribute("data-lit", str(green))
