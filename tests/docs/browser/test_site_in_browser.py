"""The site in a browser: what a page loads, how it fits a narrow window, search, copy buttons, dark and light."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
PAGES = ("index", "start", "api", "performance", "museum/index", "notebooks/train-break-resume", "project/contributing")


@pytest.fixture
def page(browser: Browser, site: Path) -> Iterator[Page]:
    """A wide window; every request that leaves the site's folder fails the test."""
    context = browser.new_context(viewport=WIDE, color_scheme="light")
    outside: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: outside.append(request.url))
    yield page
    context.close()
    assert [url for url in outside if not url.startswith((site.as_uri(), "data:", "blob:"))] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_window_does_not_scroll_sideways(page: Page, site: Path, name: str) -> None:
    page.set_viewport_size(NARROW)
    page.goto((site / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]


def test_the_home_page_is_one_screen(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    cards = page.locator(".home .grid.cards > ul > li")
    assert cards.count() == 6
    last = cards.last.bounding_box()
    assert last is not None
    assert last["y"] + last["height"] <= WIDE["height"]
    expect(page.locator(".home code")).to_contain_text("UndeclaredWriteError")


def test_the_search_works_without_a_server(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    page.locator(".md-search__input").fill("restart a cache")
    expect(page.locator(".md-search-result__item").first).to_be_visible()
    assert "restart" in page.locator(".md-search-result__list").inner_text().lower()


def test_the_palette_follows_the_reader_and_its_toggle(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    body = page.locator("body")
    expect(body).to_have_attribute("data-md-color-scheme", "default")
    page.get_by_title("Switch to dark").click()
    expect(body).to_have_attribute("data-md-color-scheme", "slate")


def test_a_copied_session_is_what_was_typed(page: Page, site: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto((site / "index.html").as_uri())
    page.locator(".home .md-clipboard, .home .md-code__button").first.click()
    expect(page.locator(".md-dialog, [data-md-component=dialog]").first).to_contain_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "sw.plan(model).take(model)" in copied
    assert ">>>" not in copied
    assert "Traceback" not in copied
