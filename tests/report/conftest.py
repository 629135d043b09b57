"""Reports to look at, and a browser to open them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

import browsers
import statewise as sw
from reported import Net, many

Open = Callable[..., Page]

browser = browsers.browser  # a fixture


@pytest.fixture(scope="session")
def net() -> sw.results.Report:
    """Of a model of several kinds."""
    return sw.report(Net())


@pytest.fixture(scope="session")
def ten_thousand() -> sw.results.Report:
    """Of a model of ten thousand leaves."""
    return sw.report(many(10_000))


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
