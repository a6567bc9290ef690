"""The page of the studio, asked as a browser asks it; and in a browser, where there is one."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="extra studio is not installed")
pytest.importorskip("gradio_client", reason="extra studio is not installed")

from erasure.pipelines import StableDiffusionErasurePipeline
from erasure.serving.limits import Limits
from erasure.serving.server import running
from erasure.studio.page import application
from erasure.studio.session import Studio


@pytest.fixture
def address(tiny_pipe: Any) -> Iterator[str]:
    drawn = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    drawn.set_progress_bar_config(disable=True)
    with application(Studio(["tiny"], lambda name: drawn, Limits())) as app, running(app, patience=1) as found:
        yield found


def test_the_page_shows_errors_and_keeps_people_apart(address: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    first, second = (Client(address, verbose=False, analytics_enabled=False) for _ in range(2))
    with pytest.raises(AppError, match="nothing to erase"):
        first.predict("", "uce", "", api_name="/erase")
    first.predict("cat", "uce", "", api_name="/erase")
    before, after, said = first.predict("a photo of a cat", 0, 1, api_name="/compare")
    assert "cat-uce" in said
    assert Path(before).read_bytes() != Path(after).read_bytes()
    before, after, said = second.predict("a photo of a cat", 0, 1, api_name="/compare")
    assert "No erasure is in force" in said
    assert Path(before).read_bytes() == Path(after).read_bytes()
    with pytest.raises(AppError, match="there is no picture"):
        first.predict(None, "", "", False, False, 0, api_name="/remove")
    with pytest.raises(AppError, match="not there any more"):
        second.predict(0.5, api_name="/strength_1")


def test_the_page_forbids_other_servers(address: str) -> None:
    answer = urllib.request.urlopen(address)
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "fonts.googleapis.com" not in answer.read().decode()


def test_in_a_browser(address: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    elsewhere: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 420, "height": 850})
        page.set_default_timeout(120_000)
        page.on("request", lambda asked: elsewhere.append(asked.url))
        page.goto(address)
        erase = page.get_by_role("button", name="Erase", exact=True)
        erase.click()
        page.get_by_text("nothing to erase").wait_for()
        page.get_by_label("Concepts to erase").fill("cat")
        erase.click()
        page.get_by_role("button", name="Take off").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        page.set_viewport_size({"width": 1280, "height": 900})
        for tab, shown in (("Remove objects", "Paint over what is to go"), ("Erase and compare", "Concepts to erase")):
            page.get_by_role("tab", name=tab).click()
            page.get_by_text(shown).first.wait_for()
            box = page.locator(".gradio-container").first.bounding_box()
            assert box is not None
            assert box["width"] > 1000, f"{tab} uses the width of a desk"
        browser.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
