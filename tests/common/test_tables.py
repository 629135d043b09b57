"""Tables as text, in terminals of any width, as HTML and as data; and the counts by kind that they show."""

from __future__ import annotations

import io
import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import statewise as sw
import statewise._src.common.tables
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import (
    Table,
    count_kinds,
    format_bytes,
    format_count,
    kinds_table,
    leaf_dict,
    leaves_table,
    total_of,
)
from statewise._src.core.plan import Kinds
from statewise._src.plan.kind import Kind

F32 = jnp.dtype("float32")
LONG = tuple(f"a_rather_long_segment_{i}" for i in range(12))


def leaf(path: tuple[object, ...] = ("a", 0), kind: str | None = None, **other: object) -> Leaf:
    facts = {"type": nnx.Param, "shape": (2, 3), "dtype": F32, "size": 6, "nbytes": 24} | other
    return Leaf(path=path, kind=kind, **facts)


def rendered(table: object, width: int, **options: object) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(table)
    return out.getvalue()


def test_text_is_as_wide_as_its_content_and_never_cuts_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = str(leaves_table("plan", [leaf(LONG), leaf(("b",))]))
    assert "/".join(LONG) in text
    assert text.isascii()
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("width", [8, 20, 40, 80, 300])
def test_a_narrow_terminal_folds_and_loses_nothing(width: int) -> None:
    table = Table("", ("path", "leaves"), (("/".join(LONG), "12"),), right=("leaves",))
    shown = "".join(line for line in rendered(table, width).splitlines() if "─" not in line)
    letters = Counter("/".join(LONG) + "12" + "leaves")
    # The name of the first column stands above it only where there are columns.
    assert Counter(shown.replace(" ", "")) == letters + Counter("path" if width >= 40 else "")
    assert all(len(line) <= width for line in rendered(table, width).splitlines())


def test_where_columns_have_no_room_each_row_stands_by_itself() -> None:
    table = kinds_table("census", count_kinds([leaf(kind="params")], Kinds(params=Kind(nnx.Param), no=Kind("none"))))
    assert [line.rstrip() for line in rendered(table, 40).splitlines()] == [
        "census",
        "params",
        "  leaves 1 · elements 6 · bytes 24 B ·",
        "  dtypes float32 · types Param",
        "no",
        "  leaves 0 · elements 0 · bytes 0 B",
        "total",
        "  leaves 1 · elements 6 · bytes 24 B",
    ]
    assert "dtypes   types" in rendered(table, 80)


def shown_things() -> list[object]:
    """One of each thing that shows itself by a table."""
    model = nnx.Dict(kernel=nnx.Param(jnp.zeros((2, 3))), running_var=nnx.BatchStat(jnp.zeros(3)))
    other = nnx.Dict(kernel=nnx.Param(jnp.ones((2, 3))), running_var=nnx.BatchStat(jnp.zeros(3)))
    plan = sw.plan(model)
    audit = sw.audit(sw.step(lambda model: model.kernel.sum()), plan.abstract())
    things = [sw.census(model), plan, audit, sw.diff(model, other), sw.lint(model)]
    return [*things, sw.memory(plan, {"data": 2}), sw.report(model), sw.explain(model, nnx.Param)]


@pytest.mark.parametrize("width", [20, 40, 80])
def test_everything_that_is_shown_fits_a_terminal_and_keeps_its_words(width: int) -> None:
    for thing in shown_things():
        out = io.StringIO()
        Console(file=out, width=width, force_terminal=True, no_color=True).print(thing)
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.getvalue().splitlines()]
        assert max(map(len, lines)) <= width, type(thing)
        assert not re.search(r"\x1b\[[0-9;]*(3|4|9|10)[0-9]m", out.getvalue()), "no colours"
        text = "".join(lines).replace(" ", "")
        assert any(name in text for name in ("kernel", "params", "running_var")), type(thing)


def test_in_a_terminal_of_80_columns_no_word_is_broken() -> None:
    for thing in shown_things():
        if not isinstance(thing, sw.results.Findings | sw.results.Audit):  # sentences, and more columns than that
            known = set(re.findall(r"[\w.]+", str(thing)))
            words = set(re.findall(r"[\w.]+", rendered(thing, 80)))
            assert words <= known, type(thing)


def test_in_a_notebook_everything_is_escaped_and_takes_the_notebooks_colours() -> None:
    evil = "</td><script>harmed=1</script><b>"
    model, other = (nnx.Dict({evil: nnx.BatchStat(jnp.full(3, x)), "var": nnx.BatchStat(jnp.zeros(2))}) for x in (0, 1))
    plan = sw.plan(model)
    audit = sw.audit(sw.step(lambda model: model[evil].sum()), plan.abstract())
    things = [sw.census(model), plan, audit.by_leaf("stats"), sw.diff(model, other), sw.lint(model)]
    for thing in [*things, audit, sw.memory(plan, {"data": 2}), sw.report(model), sw.explain(model, nnx.Param)]:
        page = thing._repr_html_()
        assert "<script" not in page
        assert "<b>" not in page
        assert page.count("<td") == page.count("</td>")
        assert not re.search(r"colou?r|background|#[0-9a-f]{3}|rgb", re.sub(r">[^<]*<", "><", page)), type(thing)
    assert "&lt;script&gt;" in plan._repr_html_()


def test_code_in_a_notebook_keeps_its_indentation() -> None:
    assert "white-space:pre-wrap" in Table("", ("hint",), (("    indented",),))._repr_html_()


def test_no_color_means_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("a title", ("path",), (("a",),))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in rendered(table, 80, force_terminal=True)


def test_cells_are_text_not_markup() -> None:
    cells = ("[bold]x[/bold]", "<b>&", "\x1b[31mred\n")
    table = Table("[t]", ("[c]", "<d>", "e"), (cells,), footer=("", "<f>", ""))
    for text in (str(table), rendered(table, 100)):
        assert "[bold]x[/bold]" in text
        assert "\\x1b[31mred\\n" in text
        assert "[t]" in text
        assert "[c]" in text
    page = table._repr_html_()
    assert "&lt;b&gt;&amp;" in page
    assert "&lt;d&gt;" in page
    assert "&lt;f&gt;" in page
    assert "<b>" not in page


def test_wide_characters_keep_columns_straight() -> None:
    lines = str(Table("", ("path", "n"), (("層/重み", "1"), ("a", "2")), right=("n",))).splitlines()
    assert lines[2:] == ["層/重み  1", "a        2"]


def test_data_of_a_table_is_json_and_nested_tables_follow() -> None:
    inner = Table("kinds", ("kind", "leaves"), (("a", "1"),), right=("leaves",), footer=("total", "1"))
    table = Table("plan", ("path",), (("x",),), below=inner)
    assert json.loads(json.dumps(table.to_dict())) == {
        "title": "plan",
        "columns": ["path"],
        "rows": [{"path": "x"}],
        "below": {
            "title": "kinds",
            "columns": ["kind", "leaves"],
            "rows": [{"kind": "a", "leaves": "1"}],
            "footer": {"kind": "total", "leaves": "1"},
        },
    }
    assert str(table).endswith("total       1")
    assert "total" in rendered(table, 60)
    assert table._repr_html_().count("<table>") == 2


def test_an_empty_table_has_its_columns() -> None:
    assert str(leaves_table("plan", [])).splitlines() == ["plan", "path  type  shape  dtype", "-" * 24]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (3 * 1024**6, "3,072.0 PiB"),
    ],
)
def test_bytes_for_people(number: int, text: str) -> None:
    assert format_bytes(number) == text


def test_counts_for_people() -> None:
    assert format_count(1234567) == "1,234,567"


def test_kind_and_alias_columns_stand_only_where_they_say_something() -> None:
    assert leaves_table("", [leaf()]).columns == ("path", "type", "shape", "dtype")
    table = leaves_table("", [leaf(kind="params", aliases=(("b",), ("c", 1)))])
    assert table.columns == ("path", "kind", "type", "shape", "dtype", "aliases")
    assert table.rows == (("a/0", "params", "Param", "(2, 3)", "float32", "b, c/1"),)


def test_a_kind_without_leaves_is_seen() -> None:
    kinds = Kinds(params=Kind(nnx.Param), cache=Kind(nnx.Cache, saved=False, restart=jnp.zeros_like))
    text = str(leaves_table("plan", [leaf(kind="params")], kinds))
    line = next(line for line in text.splitlines() if line.startswith("cache"))
    assert line.split() == ["cache", "0", "0", "0", "B", "-", "-", "not", "saved,", "restart=zeros_like"]


def test_counts_add_up() -> None:
    kinds = Kinds(params=Kind(nnx.Param), rest=Kind(...), none=Kind("nothing"))
    rows = [
        leaf(kind="params"),
        leaf(kind="rest", type=nnx.Cache, shape=None, dtype=None, size=0, nbytes=0),
        leaf(kind="rest", type=jax.Array, shape=None, dtype=None),
    ]
    params, rest, none = count_kinds(rows, kinds)
    assert (params.leaves, params.size, params.nbytes, params.dtypes) == (1, 6, 24, {"float32": 1})
    assert rest.dtypes == {"-": 1, "several": 1}
    assert rest.types == {"Cache": 1, "Array": 1}
    assert (none.leaves, none.dtypes) == (0, {})
    total = total_of((params, rest, none))
    assert (total.leaves, total.size, total.nbytes) == (3, 12, 48)
    assert total.types == {"Param": 1, "Cache": 1, "Array": 1}


def test_a_leaf_as_data_is_json() -> None:
    data = leaf_dict(leaf(("layers", 0, ("t", 1)), "params", dtype=jax.random.key(0).dtype, note="odd"))
    assert json.loads(json.dumps(data)) == {
        "path": "layers/0/('t', 1)",
        "kind": "params",
        "type": "Param",
        "shape": [2, 3],
        "dtype": "key<fry>",
        "aliases": [],
        "size": 6,
        "nbytes": 24,
        "note": "odd",
    }
    assert leaf_dict(leaf(shape=None, dtype=None))["shape"] is None


def test_a_thousand_rows_are_quick_enough_to_print() -> None:
    rows = [leaf(("layers", i, "kernel"), "params") for i in range(5000)]
    assert len(str(leaves_table("plan", rows, Kinds(params=Kind(nnx.Param)))).splitlines()) > 5000
