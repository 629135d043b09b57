"""The page in a real Chromium: it opens without a word, in light and dark, narrow and wide, and shows what is there."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import pytest
from flax import nnx
from playwright.sync_api import Page

import statewise as sw
from reported import HOSTILE, Net, abstract, hostile
from statewise._src.common.tables import format_bytes, printable

Open = Callable[..., Page]

SIZES = [0, 1, 1023, 1024, 1536, 1024**2 - 52, 1024**2 - 51, 1024**2, 123_456_789, 1024**6 * 3]

# One of each sort of text.
TEXTS = [
    "h1",
    "#subtitle",
    "#tiles a:not(.warn)",
    "#tiles a.warn",
    "#nav a",
    ".cell.leaf > .name",
    ".cell.group > .name",
    "#crumbs button",
    ".choices button[aria-pressed=true]",
    "#kinds-table td",
    "#kinds-table tr.none td",
    ".tag.strong",
    "#memory-bar span",
    ".finding h3 code",
    ".big td",
    ".big th button",
    ".path .front",
    ".link",
    ".count",
]


@pytest.fixture(scope="module")
def report() -> sw.results.Report:
    other = Net()
    other.layers[3].up.kernel[...] += 0.5
    return sw.report(Net(), other, mesh={"data": 4, "model": 2})


def texts(page: Page, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def rows(page: Page, table: str = "#leaves") -> list[list[str]]:
    return page.locator(f"{table} tbody tr:not(.gap)").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def contrast(page: Page, selector: str) -> float:
    """The contrast of an element's text to what is behind it, as WCAG counts it: at least 4.5 is asked of text."""
    return page.locator(selector).first.evaluate(
        """element => {
          const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const seen = (colour) => {
            context.clearRect(0, 0, 1, 1);
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
          };
          const light = (colour) => {
            const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            const [r, g, b] = seen(colour).map((value) => linear(value / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let behind = element;
          while (seen(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
          const text = light(getComputedStyle(element).color);
          const back = light(getComputedStyle(behind).backgroundColor);
          return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
        }"""
    )


def test_the_page_opens_and_says_what_it_is_about(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report)
    assert page.title() == "Net · Statewise"
    assert page.locator("h1").inner_text() == "Net"
    assert page.locator("#subtitle").inner_text().startswith("a model · statewise ")
    total = report.census.total
    assert texts(page, "#tiles li") == [
        f"{total.leaves} leaves",
        f"{total.size:,} elements",
        f"{format_bytes(total.nbytes)} in total",
        f"{format_bytes(report.memory.total)} on each of 8 devices",
        "2 findings",
        "1 leaf differs",
    ]
    sections = ["Map", "Kinds", "Memory per device", "Findings", "Differences", "Leaves"]
    assert texts(page, "#nav a") == texts(page, "h2") == sections


def test_a_part_that_there_is_not_is_not_shown(open_page: Open) -> None:
    page = open_page(sw.report(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    assert texts(page, "#nav a") == ["Map", "Kinds", "Findings", "Leaves"]
    assert not page.locator("#memory").is_visible()
    assert not page.locator("#difference").is_visible()
    assert texts(page, "#findings-list") == ["No findings."]


def test_kinds_are_those_of_the_census_with_their_treatment(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report)
    assert [row[:4] for row in rows(page, "#kinds-table")] == [
        [kind.name, f"{kind.leaves:,}", f"{kind.size:,}", format_bytes(kind.nbytes)] for kind in report.census.counts
    ]
    cache = page.locator("#kinds-table tbody tr", has_text="cache")
    assert cache.locator(".tag").all_inner_texts() == ["not saved", "restart=zeros_like"]


def test_a_comma_within_a_treatment_parts_nothing(open_page: Open) -> None:
    kinds = sw.Kinds(weights=sw.Kind(nnx.Param, frozen=True, placement=sw.Sharded("data", None)))
    page = open_page(sw.report(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), kinds=kinds))
    assert page.locator("#kinds-table .tag").all_inner_texts() == ["frozen", "placement=Sharded('data', None)"]


def test_memory_of_each_device_is_shown_with_what_is_not_in_it(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report)
    assert "Activations are not included" in page.locator("#memory-note").inner_text()
    assert [(row[0], row[3]) for row in rows(page, "#memory-table")] == [
        (kind.name, format_bytes(kind.per_device)) for kind in report.memory.kinds if kind.arrays
    ]
    widths = page.locator("#memory-bar span").evaluate_all("parts => parts.map(part => part.offsetWidth)")
    assert len(widths) == sum(kind.per_device > 0 for kind in report.memory.kinds)
    assert max(widths) == widths[0]


def test_copies_in_a_compute_dtype_have_a_line_and_a_part_of_the_bar(open_page: Open) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"))
    page = open_page(sw.report(nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0)), kinds=kinds, mesh={"data": 2}))
    assert [(row[0], row[3]) for row in rows(page, "#memory-table")] == [
        ("params", "2.0 KiB"),
        ("params in bfloat16", "1.0 KiB"),
    ]
    assert page.locator("#kinds-table .tag").all_inner_texts() == ["compute=bfloat16"]
    widths = page.locator("#memory-bar span").evaluate_all("parts => parts.map(part => part.offsetWidth)")
    assert abs(widths[0] - 2 * widths[1]) <= 30  # with their paddings


def test_findings_say_why_and_how_to_hint_and_lead_to_their_leaves(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report)
    cards = page.locator(".finding")
    for finding, card in zip(report.findings, cards.all(), strict=True):
        assert card.locator("h3").inner_text() == finding.code
        assert card.locator(".fact").inner_text() == finding.message
        assert finding.why in card.inner_text()
        assert card.locator("pre").inner_text() == finding.hint
    cards.first.get_by_role("button", name="running_var").click()
    assert texts(page, "tr.marked .path") == ["running_var"]


def test_a_finding_of_many_leaves_shows_more_when_asked(open_page: Open) -> None:
    model = nnx.Dict({f"norm{number}": nnx.Dict(var=nnx.BatchStat(jnp.zeros(2))) for number in range(130)})
    card = open_page(sw.report(model)).locator(".finding").first
    assert card.locator(".link").count() == 10
    card.get_by_role("button", name="120 more").click()
    assert card.locator(".link").count() == 110
    card.get_by_role("button", name="20 more").click()
    assert card.locator(".link").count() == 130
    assert card.get_by_role("button", name="more").count() == 0


def test_what_differs_is_shown_with_the_largest_difference(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report)
    assert page.locator("#difference-note").inner_text().startswith("From a model (Net) to a model (Net).")
    assert page.locator("#difference .count").inner_text() == "1 leaf"
    assert rows(page, "#difference-table") == [
        ["layers/3/up/kernel", "params", "value", report.diff.leaves[0].why, "0.5000"]
    ]


def test_two_that_are_the_same(open_page: Open) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    page = open_page(sw.report(model, model))
    assert page.locator("#difference-table").inner_text() == "No leaf differs."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_chosen(open_page: Open, report: sw.results.Report, scheme: str) -> None:
    page = open_page(report, scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    back = "getComputedStyle(document.documentElement).backgroundColor"
    seen = {scheme: page.evaluate(back)}
    button = page.locator("#theme")
    assert button.inner_text() == "Theme: Auto"
    for _ in range(1 if other == "light" else 2):
        button.click()
    assert button.inner_text() == f"Theme: {other.capitalize()}"
    seen[other] = page.evaluate(back)
    assert seen == {"light": "rgb(251, 251, 250)", "dark": "rgb(22, 24, 27)"}
    for _ in range(20):  # the browser keeps what a page stores a moment later, on a busy machine after a reload
        page.reload()
        if button.inner_text() != "Theme: Auto":
            break
        page.wait_for_timeout(250)
    assert (button.inner_text(), page.evaluate(back)) == (f"Theme: {other.capitalize()}", seen[other])
    while button.inner_text() != "Theme: Auto":
        button.click()
    assert page.evaluate(back) == seen[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page: Open, report: sw.results.Report, scheme: str) -> None:
    page = open_page(report, scheme=scheme)
    found = {selector: contrast(page, selector) for selector in TEXTS}
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}


def test_a_narrow_window_scrolls_in_one_direction_only(open_page: Open, report: sw.results.Report) -> None:
    page = open_page(report, width=360, height=640)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.locator("#leaves .view").evaluate(
        "view => [view.scrollWidth > view.clientWidth, view.clientWidth < 360]"
    )
    assert wide == [True, True]
    assert page.locator("#treemap > .cell").count() > 1


def test_names_that_are_markup_do_no_harm(open_page: Open) -> None:
    page = open_page(hostile())
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0
    assert page.locator("#leaves td .path").first.inner_text() == f"{HOSTILE}/{HOSTILE}"
    assert rows(page)[0][2] == HOSTILE
    page.locator("#treemap > .cell").first.click()
    page.locator("#leaves input").fill("harmed")
    assert page.evaluate("window.harmed") is None


def test_no_script_but_the_pages_own_can_run(open_page: Open, report: sw.results.Report, said: list[str]) -> None:
    page = open_page(report)
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.harmed = 1";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<button id=rule onclick='window.harmed = 1'>rule</button>");
        }"""
    )
    page.locator("#rule").click()
    assert page.evaluate("window.harmed") is None
    refused = [line for line in said if "Content Security Policy" in line]
    assert len(refused) == len(said) > 0
    said.clear()


def test_bytes_are_written_as_in_tables(open_page: Open) -> None:
    page = open_page(sw.report(abstract({f"w{size:020}": (size,) for size in SIZES}, jnp.int8)))
    shown = {row[0]: row[6] for row in rows(page)}
    assert shown == {f"w{size:020}": format_bytes(size) for size in SIZES}


def test_what_is_not_printable_is_written_as_in_tables(open_page: Open) -> None:
    names = [
        "a\nb",
        "\t",
        "\x1b[31m",
        "\u202egnp",
        "\u2028",
        "\xa0",
        "層/重み",
        "\U000e0001",
        "e\u0301",
        "\ud800",
        "a b",
    ]
    page = open_page(sw.report(abstract({f"{at:02}{name}": (1,) for at, name in enumerate(names)})))
    shown = page.locator("#leaves td .path").all_text_contents()
    assert shown == [printable(f"{at:02}{name}") for at, name in enumerate(names)]
