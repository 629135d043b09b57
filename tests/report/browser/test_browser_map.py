"""The map in a real Chromium: zooming by mouse and by keyboard, what a cell's size says, and how little is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from playwright.sync_api import Locator, Page
from safetensors.numpy import save_file

import statewise as sw
from reported import abstract

Open = Callable[..., Page]


def names(page: Page) -> list[str]:
    """The outer cells, the largest first."""
    return page.locator("#treemap > .cell").evaluate_all(
        "cells => cells.map(cell => cell.getAttribute('aria-label').split(', ')[0])"
    )


def crumbs(page: Page) -> list[str]:
    return page.locator("#crumbs button").all_inner_texts()


def focused(page: Page) -> str:
    return page.evaluate("(document.activeElement.getAttribute('aria-label') || '').split(', ')[0]")


def cell(page: Page, name: str) -> Locator:
    return page.locator(f"#treemap > .cell[aria-label^='{name}, ']")


def box(page: Page, name: str) -> dict[str, float]:
    return cell(page, name).bounding_box()


def test_a_cell_for_each_kind_as_large_as_it_has_bytes(open_page: Open) -> None:
    sizes = {"a": 4096, "b": 2048, "c": 1024, "d": 512}
    page = open_page(
        sw.report(nnx.Dict({name: abstract({"x": (size,), "y": (size,)}) for name, size in sizes.items()}))
    )
    assert names(page) == ["a", "b", "c", "d"]
    areas = {name: box(page, name)["width"] * box(page, name)["height"] for name in sizes}
    whole = sum(areas.values())
    assert {name: round(15 * area / whole) for name, area in areas.items()} == {"a": 8, "b": 4, "c": 2, "d": 1}


def test_cells_lie_side_by_side_and_fill_the_map(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    whole = page.locator("#treemap").bounding_box()
    boxes = [one.bounding_box() for one in page.locator("#treemap > .cell").all()]
    assert sum(one["width"] * one["height"] for one in boxes) == pytest.approx(
        whole["width"] * whole["height"], rel=1e-3
    )
    for at, one in enumerate(boxes):
        for other in boxes[:at]:
            apart = (
                one["x"] + one["width"] <= other["x"] + 0.5,
                other["x"] + other["width"] <= one["x"] + 0.5,
                one["y"] + one["height"] <= other["y"] + 0.5,
                other["y"] + other["height"] <= one["y"] + 0.5,
            )
            assert any(apart)


def test_a_click_zooms_in_and_the_trail_leads_back(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    assert crumbs(page) == ["all"]
    cell(page, "params").click()
    assert crumbs(page) == ["all", "params"]
    assert "layers" in names(page)
    cell(page, "layers").click()
    assert sorted(names(page), key=int) == [str(at) for at in range(12)]
    assert crumbs(page) == ["all", "params", "layers"]
    page.locator("#crumbs button", has_text="params").click()
    assert crumbs(page) == ["all", "params"]


def test_what_a_click_within_a_cell_means_is_that_cell(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    inner = page.locator("#treemap > .cell[aria-label^='params, '] .cell .cell").first
    inner.click()
    assert crumbs(page) == ["all", "params"]


def test_the_keyboard_alone_zooms_in_and_out(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    cell(page, "params").focus()
    page.keyboard.press("Enter")
    assert crumbs(page) == ["all", "params"]
    assert focused(page) == names(page)[0]
    while focused(page) != "layers":
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert crumbs(page) == ["all", "params", "layers"]
    assert page.locator("#spoken").inner_text().startswith("params/layers: 48 leaves · ")
    page.keyboard.press("Escape")
    assert (crumbs(page), focused(page)) == (["all", "params"], "layers")
    page.keyboard.press("Escape")
    assert (crumbs(page), focused(page)) == (["all"], "params")
    page.keyboard.press("Escape")
    assert crumbs(page) == ["all"]


def test_the_tab_key_comes_to_one_cell_and_goes_on(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    assert page.locator("#treemap [tabindex='0']").count() == 1
    page.locator("#map-list").focus()
    page.keyboard.press("Tab")
    first = focused(page)
    assert first in names(page)
    page.keyboard.press("End")
    last = focused(page)
    assert last == names(page)[-1] != first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#treemap')") is None
    page.keyboard.press("Shift+Tab")
    assert focused(page) == last
    page.keyboard.press("Home")
    assert focused(page) == first


def test_arrow_keys_go_to_the_cell_that_lies_there(open_page: Open) -> None:
    page = open_page(sw.report(abstract({f"w{at}": (1000,) for at in range(16)})))
    assert len(names(page)) == 16
    cell(page, "w0").focus()
    seen = ["w0"]
    for key, axis, sign in (
        ("ArrowRight", "x", 1),
        ("ArrowDown", "y", 1),
        ("ArrowLeft", "x", -1),
        ("ArrowUp", "y", -1),
    ):
        before = box(page, focused(page))
        page.keyboard.press(key)
        after = box(page, focused(page))
        assert sign * (after[axis] - before[axis]) > 0, key
        seen.append(focused(page))
    assert seen[0] == seen[-1]
    page.keyboard.press("ArrowUp")
    assert focused(page) == "w0"  # there is nothing above


def test_every_cell_can_be_reached_by_arrow_keys(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    cell(page, "params").click()
    reached, todo = {names(page)[0]}, [names(page)[0]]
    while todo:
        start = todo.pop()
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            cell(page, start).focus()
            page.keyboard.press(key)
            if focused(page) not in reached:
                reached.add(focused(page))
                todo.append(focused(page))
    assert reached == set(names(page))


def test_enter_on_a_leaf_shows_it_in_the_table(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    cell(page, "700").or_(page.locator("#treemap > .cell").first).first.focus()
    while page.locator("tr.marked").count() == 0:
        page.keyboard.press("Enter")
    path = page.locator("tr.marked .path").inner_text()
    assert path in {sw.format_path(one.leaf.path) for one in ten_thousand.leaves}
    assert page.evaluate("document.activeElement.className") == "view"
    assert page.locator("tr.marked").evaluate(
        """row => {
          const view = row.closest(".view").getBoundingClientRect();
          const seen = row.getBoundingClientRect();
          return seen.top >= view.top && seen.bottom <= view.bottom && seen.top >= 0 && seen.bottom <= innerHeight;
        }"""
    )


def test_cells_say_what_they_are_to_those_who_do_not_see_them(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    params = net.census["params"]
    share = 100 * params.nbytes / net.census.total.nbytes
    assert cell(page, "params").get_attribute("role") == "button"
    assert cell(page, "params").get_attribute("aria-label") == (
        f"params, {params.leaves} leaves · {params.nbytes / 1024:.1f} KiB · {share:.1f} %, Enter zooms in"
    )
    assert page.locator("#treemap").get_attribute("aria-label").startswith("Map of all, ")


def test_the_line_below_tells_what_the_pointer_is_on(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    page.locator(".cell.leaf", has_text="embedding").first.hover()
    assert page.locator("#readout").inner_text().startswith("params/embed/embedding params · Param(50, 16) float32 · ")


def test_sizes_by_elements_and_by_device_are_others(open_page: Open) -> None:
    model = nnx.Dict(wide=nnx.Param(jnp.zeros(3000, jnp.float32)), half=nnx.Cache(jnp.zeros(4000, jnp.bfloat16)))
    kinds = sw.Kinds(p=sw.Kind(nnx.Param, placement=sw.Sharded("data")), c=sw.Kind(nnx.Cache))
    page = open_page(sw.report(model, kinds=kinds, mesh={"data": 4}))
    order = {"Bytes": ["p/wide", "c/half"], "Elements": ["c/half", "p/wide"], "Per device": ["c/half", "p/wide"]}
    assert names(page) == order["Bytes"]
    for name in ("Elements", "Bytes", "Per device"):
        button = page.locator("#map-size").get_by_role("button", name=name)
        button.click()
        assert names(page) == order[name]
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("#map-size [aria-pressed=true]").count() == 1


def test_grouped_by_path_the_kinds_of_a_module_stand_together(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    page.get_by_role("button", name="By path").click()
    assert "layers" in names(page)
    cell(page, "layers").click()
    cell(page, "3").click()
    assert {"up", "down"} <= set(names(page))
    assert crumbs(page) == ["all", "layers", "3"]


def test_a_path_that_begins_with_its_kind_says_it_once(open_page: Open) -> None:
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    page = open_page(sw.report(sw.plan(model, optimizers={"params": optax.adam(0.1)})))
    assert any(name.startswith("optimizer/params/0") for name in names(page))


def test_the_leaves_of_a_cell_can_be_listed(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    cell(page, "params").click()
    cell(page, "layers").click()
    page.get_by_role("button", name="List these leaves").click()
    count = page.locator("#leaves .count")
    total = len(net.leaves)
    assert count.inner_text().startswith(f"48 of {total} leaves")
    chip = page.locator("#leaves .chip")
    assert chip.inner_text() == "params/layers ✕"
    chip.click()
    assert count.inner_text().startswith(f"{total} leaves")
    assert not chip.is_visible()


def test_what_has_no_bytes_is_said(open_page: Open) -> None:
    page = open_page(sw.report(abstract({"none": (0,), "nothing": (0, 3)})))
    assert page.locator("#treemap").inner_text() == "Nothing here has any bytes."
    page.locator("#map-list").click()


def test_a_key_with_a_slash_is_one_key(open_page: Open) -> None:
    model = nnx.Dict({"a/b": abstract({"x": (100,), "y": (100,)}), "a": abstract({"b": (100,), "c": (100,)})})
    page = open_page(sw.report(model))
    assert sorted(names(page)) == ["a", "a/b"]


def test_one_path_can_be_a_leaf_and_a_group(open_page: Open, tmp_path: Path) -> None:
    save_file({"a": np.zeros(9), "a.b": np.zeros(9), "a.c": np.zeros(9)}, tmp_path / "x.safetensors")
    page = open_page(sw.report(tmp_path / "x.safetensors"))
    assert names(page) == ["a", "a"]


def test_ten_thousand_leaves_are_few_elements(open_page: Open, ten_thousand: sw.results.Report) -> None:
    page = open_page(ten_thousand)
    assert ten_thousand.census.total.leaves == 10_000
    page.get_by_role("button", name="By path").click()
    for _ in range(3):
        assert 10 <= page.locator("#treemap .cell").count() <= 900
        assert page.evaluate("document.querySelectorAll('*').length") < 5000
        page.locator("#treemap > .cell").first.click()


def test_ten_thousand_leaves_side_by_side_stand_in_ranges(open_page: Open) -> None:
    page = open_page(sw.report(abstract({f"w{at:05}": (64,) for at in range(10_000)})))
    assert sorted(names(page)) == [f"w{at:05} … w{at + 99:05}" for at in range(0, 10_000, 100)]
    assert page.locator("#treemap .cell").count() <= 900
    cell(page, "w01200 … w01299").click()
    assert sorted(names(page)) == [f"w{at:05}" for at in range(1200, 1300)]
    assert page.locator("#spoken").inner_text().startswith("w01200 … w01299: 100 leaves · ")
    cell(page, "w01250").hover()
    assert page.locator("#readout").inner_text().startswith("w01250 params · ")  # a range is no part of a path
    page.locator("#treemap > .cell").first.focus()
    page.keyboard.press("Escape")
    assert crumbs(page) == ["all"]
    assert focused(page) == "w01200 … w01299"


def test_what_is_too_small_to_see_is_one_cell_that_opens(open_page: Open) -> None:
    small = {f"small{at:02}": (1,) for at in range(50)}
    page = open_page(sw.report(abstract({"large": (1 << 20,), "other": (1 << 18,), **small})))
    assert names(page) == ["large", "other", "50 more"]
    assert box(page, "50 more")["width"] > 20
    cell(page, "50 more").click()
    assert sorted(names(page)) == sorted(small)
    page.locator("#treemap > .cell").first.focus()
    page.keyboard.press("Escape")
    assert (crumbs(page), focused(page)) == (["all"], "50 more")


def test_the_map_follows_the_window(open_page: Open, net: sw.results.Report) -> None:
    page = open_page(net)
    wide = box(page, "params")["width"]
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_function(
        "() => [...document.querySelectorAll('#treemap > .cell')].every(c => c.offsetLeft + c.offsetWidth <= 501)"
    )
    assert box(page, "params")["width"] < wide
