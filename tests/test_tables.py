"""Tables as text, in terminals of any width, as HTML and as data; and the counts by kind that they show."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

import statewise.tables
from statewise.kinds import Kind, Kinds
from statewise.paths import Leaf
from statewise.tables import Table, count_kinds, format_bytes, format_count, leaf_dict, leaves_table, total_of

F32 = jnp.dtype("float32")
LONG = tuple(f"a_rather_long_segment_{i}" for i in range(12))


def leaf(path: tuple[object, ...] = ("a", 0), kind: str | None = None, **other: object) -> Leaf:
    facts = {"type": nnx.Param, "shape": (2, 3), "dtype": F32, "elements": 6, "nbytes": 24} | other
    return Leaf(path=path, kind=kind, **facts)


def rendered(table: Table, width: int, **options: object) -> str:
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
    letters = sorted("".join(LONG) + "/" * 11 + "12" + "path" + "leaves")
    assert sorted(shown.replace(" ", "")) == letters
    assert all(len(line) <= width for line in rendered(table, width).splitlines())


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
        leaf(kind="rest", type=nnx.Cache, shape=None, dtype=None, elements=0, nbytes=0),
        leaf(kind="rest", type=jax.Array, shape=None, dtype=None),
    ]
    params, rest, none = count_kinds(rows, kinds)
    assert (params.leaves, params.elements, params.bytes, params.dtypes) == (1, 6, 24, {"float32": 1})
    assert rest.dtypes == {"-": 1, "several": 1}
    assert rest.types == {"Cache": 1, "Array": 1}
    assert (none.leaves, none.dtypes) == (0, {})
    total = total_of((params, rest, none))
    assert (total.leaves, total.elements, total.bytes) == (3, 12, 48)
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
        "elements": 6,
        "bytes": 24,
        "note": "odd",
    }
    assert leaf_dict(leaf(shape=None, dtype=None))["shape"] is None


def test_a_thousand_rows_are_quick_enough_to_print() -> None:
    rows = [leaf(("layers", i, "kernel"), "params") for i in range(5000)]
    assert len(str(leaves_table("plan", rows, Kinds(params=Kind(nnx.Param)))).splitlines()) > 5000


def test_rich_is_imported_only_to_print() -> None:
    tree = ast.parse(Path(statewise.tables.__file__).read_text(encoding="utf-8"))
    assert not [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) and "rich" in ast.dump(node)
    ]
