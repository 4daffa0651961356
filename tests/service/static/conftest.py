"""A real browser for the page, and what tests do with it again and again."""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from service.app import create_app, load_model
from service.core.settings import Settings

Row = tuple[str, str, str]  # of the table: class, score and threshold, box


class Screen:
    """A page that somebody looks at; what is not here is Playwright's `Page`."""

    def __init__(self, page: Page, url: str) -> None:
        self._page = page
        self.url = url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._page, name)

    def choose(self, path: Path) -> None:
        """Choose an image, and wait for its answer."""
        self.set_input_files("#file", path)
        expect(self.locator("#view")).not_to_have_attribute("aria-busy", "true")
        expect(self.locator("#boxes")).to_have_attribute("data-boxes", re.compile(r"\d"))
        expect(self.locator("#summary")).not_to_have_text("Looking…")

    def shown(self) -> list[Row]:
        """The table."""
        rows = self.locator("#rows tr").all()
        return [tuple(row.locator("td").all_inner_texts()) for row in rows]

    def expected(self, path: Path, **options: Any) -> list[Row]:
        """The table that the service's own answer makes."""
        content = path.read_bytes()
        response = httpx.post(f"{self.url}/v1/detect", content=content, params=options)
        return as_rows(response.json()["detections"])

    def run_command(self, folder: Path, **environment: str) -> list[Row]:
        """The table that the answer to the page's command makes."""
        command = self.locator("#curl").inner_text()
        done = subprocess.run(
            ["sh", "-c", command.replace("curl ", "curl --silent --show-error ", 1)],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            check=True,
            text=True,
        )
        return as_rows(json.loads(done.stdout)["detections"])

    def pixel(self, x: float, y: float) -> tuple[int, ...]:
        """The canvas's colour at a place of the usual image, red to alpha."""
        read = """([x, y]) => {
            const canvas = document.getElementById("boxes");
            const at = [x * canvas.width / 192, y * canvas.height / 128].map(Math.round);
            return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
        }"""
        return tuple(self.evaluate(read, [x, y]))

    def press_key(self, key: str, times: int = 1) -> None:
        """Press a key."""
        for _ in range(times):
            self.keyboard.press(key)

    def tab_to(self, selector: str) -> None:
        """Go on with the tab key until an element has the focus."""
        for _ in range(40):
            self.press_key("Tab")
            if self.locator(f"{selector}:focus").count():
                return
        raise AssertionError(f"the tab key does not reach {selector}")


def as_rows(detections: list[dict[str, Any]]) -> list[Row]:
    return [
        (
            one["class"],
            f"{one['score']:.3f} ≥ {one['threshold']:.3f}",
            ", ".join(str(math.floor(value + 0.5)) for value in one["box"]),
        )
        for one in detections
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Open no longer than its module: while it is, no test in this thread can run a loop."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium here to look at the page with: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Screen]]:
    """Opens a page; after the test, it has to have been quiet and to have asked nobody else."""
    contexts, complaints, asked, origins = [], [], set(), set()

    def open_page(url: str, **options: Any) -> Screen:
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        origins.add(urlsplit(url).netloc)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if serious(line) else None)
        page.on("request", lambda request: asked.add(urlsplit(request.url)))
        page.goto(url)
        return Screen(page, url)

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {one.netloc for one in asked if one.scheme not in ("blob", "data")} <= origins


def serious(line: Any) -> bool:
    """Whether a line of the console is more than Chromium's own note of a refused request."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


@pytest.fixture
def photo(png: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(png)
    return path


@pytest.fixture(scope="package")
def serve_file(serve: Callable[..., Any]) -> Iterator[Callable[[Path], str]]:
    """Serves a detector's file from then on; returns the address."""
    with ExitStack() as stack:

        def start(path: Path) -> str:
            settings = Settings(model=path, threads=1, provider="cpu")
            model = load_model(settings)
            model.warm_up()
            return stack.enter_context(serve(create_app(settings, model)))

        yield start
