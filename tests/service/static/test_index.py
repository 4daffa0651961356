"""The page for everybody: keyboard alone, screen readers, little light, small screens."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def test_the_keyboard_alone_is_enough(visit, live_service, photo):
    page = visit(live_service)
    page.on("filechooser", lambda _: None)  # so that Chromium opens no dialog from here on
    expect(page.locator("#panel")).to_be_visible()
    page.tab_to("#file")
    outline = "document.getElementById('drop')"
    assert page.evaluate(f"getComputedStyle({outline}).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.press_key("Enter")
    chooser.value.set_files(photo)
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "3")
    page.tab_to("#class-0")
    page.press_key("End")
    expect(page.locator("#boxes")).to_have_attribute("data-boxes", "2")
    expect(page.get_by_role("status")).to_contain_text("2 boxes")
    page.tab_to("[data-sort=class]")
    page.press_key("Enter")
    page.tab_to("#rows tr")
    lit = page.locator("#boxes")
    expect(lit).to_have_attribute("data-lit", re.compile(r"\d"))
    first = lit.get_attribute("data-lit")
    page.press_key("ArrowDown")
    expect(lit).not_to_have_attribute("data-lit", first)
    page.press_key("Home")
    expect(lit).to_have_attribute("data-lit", first)
    page.tab_to("#copy")
    page.press_key("Enter")
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
    page.choose(photo)
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
    page.choose(path)
    for button in ("Another image", "Take a picture"):
        expect(page.get_by_text(button)).to_be_visible()
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
    page.choose(photo)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    with Image.open(folder / f"{name}.png") as picture:
        width = options["viewport"]["width"] * options.get("device_scale_factor", 1)
        assert picture.width == width
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 20  # not blank
