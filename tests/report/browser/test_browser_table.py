"""The table of leaves in a real Chromium: sorting, searching, scrolling, and how few rows are ever in the page."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flax import nnx
from playwright.sync_api import Locator, Page

import statewise as sw
from reported import abstract

Open = Callable[..., Page]
AT_ONCE = 60  # rows that are in the page, at most: what a view of 660 pixels shows, and some around it


def rows(page: Page) -> list[list[str]]:
    return page.locator("#leaves tbody tr:not(.gap)").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def column(page: Page, number: int) -> list[str]:
    return [row[number] for row in rows(page)]


def head(page: Page, title: str) -> Locator:
    return page.locator("#leaves th", has=page.get_by_role("button", name=title, exact=True))


def count(page: Page) -> str:
    return page.locator("#leaves .count").inner_text()


def settled(page: Page) -> None:
    """Waits until what a scroll asked for is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_rows_are_the_leaves_in_their_order(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    leaves = [one.leaf for one in net.leaves]
    assert column(page, 0) == [sw.format_path(leaf.path) for leaf in leaves][: len(rows(page))]
    assert rows(page)[0] == [
        "embed/embedding",
        "params",
        "Param",
        "(50, 16)",
        "float32",
        "800",
        "3.1 KiB",
        "tied/embedding",
    ]
    assert count(page) == f"{len(leaves)} leaves, {net.census.total.nbytes / 1024:.1f} KiB"


def test_a_click_on_a_heading_sorts_up_down_and_not_at_all(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    before = column(page, 0)
    numbers = sorted((one.leaf.size for one in net.leaves), reverse=True)
    elements = head(page, "elements")
    elements.get_by_role("button").click()
    assert elements.get_attribute("aria-sort") == "descending"
    shown = column(page, 5)
    assert shown == [f"{number:,}" for number in numbers][: len(shown)]
    elements.get_by_role("button").click()
    assert elements.get_attribute("aria-sort") == "ascending"
    assert column(page, 5) == [f"{number:,}" for number in reversed(numbers)][: len(shown)]
    elements.get_by_role("button").click()
    assert elements.get_attribute("aria-sort") == "none"
    assert column(page, 0) == before


def test_one_heading_sorts_at_a_time(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    head(page, "bytes").get_by_role("button").click()
    head(page, "kind").get_by_role("button").click()
    sorts = page.locator("#leaves th").evaluate_all("heads => heads.map(head => head.getAttribute('aria-sort'))")
    assert [sort for sort in sorts if sort != "none"] == ["ascending"]
    assert column(page, 1) == sorted(one.leaf.kind for one in net.leaves)[: len(rows(page))]


def test_numbers_in_paths_sort_as_numbers(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    page.locator("#leaves input").fill("up/bias")
    head(page, "path").get_by_role("button").click()
    assert column(page, 0) == [f"layers/{at}/up/bias" for at in range(12)]


def test_a_heading_sorts_by_keyboard_too(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    head(page, "path").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head(page, "path").get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("layers/3/up", ["layers/3/up/bias", "layers/3/up/kernel"]),
        ("LAYERS/3 kernel", ["layers/3/down/kernel", "layers/3/up/kernel"]),
        ("tracker", ["seen"]),
        ("bfloat16", ["half"]),
        ("(50, 16)", ["embed/embedding"]),
        ("tied/", ["embed/embedding"]),
        ("cache 512", ["half"]),
    ],
)
def test_every_word_is_looked_for_in_all_that_a_leaf_says(
    open_page: Open, net: sw.results.Report, text: str, found: list[str]
) -> None:
    page = open_page(net)
    page.locator("#leaves input").fill(text)
    assert column(page, 0) == found
    assert count(page).startswith(f"{len(found)} of {len(net.leaves)} leaf" if len(found) == 1 else f"{len(found)} of")


def test_what_is_nowhere_is_said_and_escape_clears_the_search(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    page.locator("#leaves input").fill("no such leaf")
    assert rows(page) == [["Nothing matches."]]
    assert count(page) == f"0 of {len(net.leaves)} leaves, 0 B"
    page.keyboard.press("Escape")
    assert page.locator("#leaves input").input_value() == ""
    assert count(page).startswith(f"{len(net.leaves)} leaves")


def test_a_kind_can_be_chosen(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    select = page.locator("#leaves select")
    used = [kind.name for kind in net.census.counts if kind.leaves]
    assert select.locator("option").all_inner_texts() == ["All kinds", *used]
    select.select_option("stats")
    assert column(page, 0) == [sw.format_path(one.leaf.path) for one in net.leaves if one.leaf.kind == "stats"]
    page.locator("#leaves input").fill("norm")
    assert column(page, 0) == ["norm/mean", "norm/var"]


def test_a_leaf_that_is_shown_from_elsewhere_is_shown_whatever_is_searched_for(
    open_page: Open, net: sw.results.Report
) -> None:
    page = open_page(net)
    page.locator("#leaves input").fill("kernel")
    page.locator(".finding .link", has_text="running_var").click()
    assert page.locator("#leaves input").input_value() == ""
    assert page.locator("tr.marked .path").inner_text() == "running_var"


def test_a_long_path_keeps_its_end_and_is_copied_whole(open_page: Open) -> None:

    model = abstract({"the_end": (1,)})
    for at in range(30):
        model = nnx.Dict({f"a_long_segment_{at}": model})
    page = open_page(sw.report(model))
    cell = page.locator("#leaves td").first
    assert cell.inner_text() == cell.locator(".path").get_attribute("title")
    end, room = cell.locator(".end").bounding_box(), cell.bounding_box()
    assert end["x"] + end["width"] <= room["x"] + room["width"]
    assert end["x"] >= room["x"]


def test_of_ten_thousand_rows_few_are_in_the_page(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    view = page.locator("#leaves .view")
    assert page.locator("#leaves table").get_attribute("aria-rowcount") == "10001"
    assert view.evaluate("view => view.scrollHeight") == pytest.approx(10_000 * 30, abs=60)
    paths = [sw.format_path(one.leaf.path) for one in ten_thousand.leaves]
    for part in (0, 0.25, 0.5, 1):
        view.evaluate("(view, part) => { view.scrollTop = part * view.scrollHeight }", part)
        settled(page)
        shown = column(page, 0)
        assert 20 <= len(shown) <= AT_ONCE
        first = int(page.locator("#leaves tbody tr:not(.gap)").first.get_attribute("aria-rowindex")) - 2
        assert shown == paths[first : first + len(shown)]
        seen = view.evaluate(
            """view => {
              const box = view.getBoundingClientRect();
              const rows = [...view.querySelectorAll("tbody tr:not(.gap)")].map(row => row.getBoundingClientRect());
              const last = rows[rows.length - 1];
              return [rows[0].top <= box.top + 31 || view.scrollTop === 0, last.bottom >= box.bottom - 31];
            }"""
        )
        assert seen == [True, True], "the rows stand where the view is"
    assert shown[-1] == paths[-1]


def test_a_scroll_makes_no_more_rows_than_are_seen(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    made = page.evaluate(
        """async () => {
          const view = document.querySelector("#leaves .view");
          let made = 0;
          new MutationObserver(records => records.forEach(one => { made += one.addedNodes.length }))
            .observe(view.querySelector("tbody"), { childList: true });
          for (let at = 0; at < 50; at++) view.scrollTop = 37 * at;   // within one frame
          await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
          return made;
        }"""
    )
    assert 20 <= made <= 2 * AT_ONCE


def test_ten_thousand_rows_are_searched_and_sorted(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    page.locator("#leaves input").fill("w7 (8, 13)")
    expected = [
        sw.format_path(one.leaf.path)
        for one in ten_thousand.leaves
        if one.leaf.path[-1] == "w7" and one.leaf.shape == (8, 13)
    ]
    assert count(page).startswith(f"{len(expected)} of 10,000 leaves")
    head(page, "path").get_by_role("button").click()
    assert column(page, 0) == expected[: len(rows(page))]
    assert len(rows(page)) <= AT_ONCE


def test_the_keyboard_scrolls_the_table(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    page.locator("#leaves input").focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className") == "view"
    page.keyboard.press("End")
    settled(page)
    assert column(page, 0)[-1] == sw.format_path(ten_thousand.leaves[-1].leaf.path)
    page.keyboard.press("Home")
    settled(page)
    assert column(page, 0)[0] == sw.format_path(ten_thousand.leaves[0].leaf.path)
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowDown")
    settled(page)
    view = page.locator("#leaves .view")
    assert view.evaluate("view => view.scrollTop") == view.evaluate("view => view.clientHeight") - 90 + 30
