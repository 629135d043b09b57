"""A real Chromium, driven by Playwright's protocol, for the tests of the page.

The browser is the machine's own: `STATEWISE_CHROMIUM` names one, or it is found on the path; none is downloaded.  One
browser serves a file of tests and no more: while it runs, Playwright holds this thread's event loop, which others need.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import statewise as sw
from reported import Net, many

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WITHOUT = (
    "there is no Chromium: `make browser-tests` as root, or `apt-get install chromium`, or name one: "
    "STATEWISE_CHROMIUM=/path/to/chrome"
)

Open = Callable[..., Page]


def chromium() -> str | None:
    """The path of a browser; None where there is none."""
    found = (shutil.which(name) for name in NAMES)
    return os.environ.get("STATEWISE_CHROMIUM") or next(filter(None, found), None)


@pytest.fixture(scope="session")
def net() -> sw.results.Report:
    """Of a model of several kinds."""
    return sw.report(Net())


@pytest.fixture(scope="session")
def ten_thousand() -> sw.results.Report:
    """Of a model of ten thousand leaves."""
    return sw.report(many(10_000))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    if path is None:
        pytest.skip(WITHOUT)
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers and root do not have; all it opens here is a page of ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def said() -> list[str]:
    """What a page writes to its console; at the end of a test it must be empty."""
    return []


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path, said: list[str]) -> Iterator[Open]:
    """Opens a report's page from a file, without a network; it must fetch nothing, and write nothing to the console."""
    asked: list[str] = []
    contexts = []

    def open_page(report: sw.results.Report, *, scheme: str = "light", width: int = 1280, height: int = 900) -> Page:
        file = tmp_path / "report.html"
        report.write(file)
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce", offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} <= {(tmp_path / "report.html").as_uri()}
