"""The command that the page shows, run by a shell."""

import pytest
from playwright.sync_api import expect

from ghm_triton.evidence import ClassThreshold

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["photo.png", 'it\'s "my"; photo,1 (ä) $HOME `id`\\.png', "@a.png"]
)
def test_the_command_answers_what_is_shown(visit, live_service, png, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(png)
    page = visit(live_service)
    page.choose(path)
    command = page.locator("#curl")
    assert page.run_command(tmp_path) == page.shown()
    assert "thresholds" not in command.inner_text()
    page.get_by_label("red", exact=True).press("End")
    page.get_by_label("blue", exact=True).press("Home")
    expect(command).to_contain_text('{"red":1,"blue":0}')
    expect(page.locator('li[data-class="blue"] .value')).to_have_text("0.000")
    truth = page.run_command(tmp_path)
    expect(page.locator("#rows tr")).to_have_count(len(truth))
    assert {row[0] for row in truth} == {"green", "blue"}
    # Boxes of equal score may change places between one row and the next.
    assert sorted(page.shown()) == sorted(truth)


def test_names_are_text(visit, write_detector, serve_file, photo):
    """Neither a model nor a class can bring markup, or a shell's commands, into the page."""
    evil = '<img src=x onerror=alert(1)>\'; echo "$(id)"'
    entries = [
        ClassThreshold(name=name, threshold=0.5, source="policy", support=1, ground_truths=1)
        for name in (evil, "green", "blue")
    ]
    path = write_detector(name=evil, class_names=[evil, "green", "blue"], thresholds=entries)
    page = visit(serve_file(path))
    page.choose(photo)
    expect(page.locator("h1")).to_have_text(evil)
    assert evil in [row[0] for row in page.shown()]
    page.get_by_label(evil, exact=True).press("End")
    assert len(page.run_command(photo.parent)) == 2
    assert page.locator("img").count() == 1


def test_copying_the_command(visit, live_service, photo):
    page = visit(live_service, permissions=["clipboard-read", "clipboard-write"])
    page.choose(photo)
    page.locator("#copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#curl").inner_text()
