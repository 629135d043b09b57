"""Tables: how leaves, and their counts by kind, are displayed.

A `Table` is plain data: a title, columns, rows of text.  It displays itself in three ways.  As text (`str`), for logs,
pipes and doctests: ASCII lines without color codes, as wide as their content, so a path is never cut and the same table
is the same text on every machine.  As a rich table, in a terminal that uses rich: cells fold if the terminal is narrow,
and if it is too narrow for columns each row is listed on its own; colors follow `NO_COLOR`.  As HTML, in a notebook,
without colors of its own, so it is light or dark like the notebook.

`leaves_table` has a line for each leaf, followed by a line for each kind (which shows kinds that claim nothing);
`kinds_table` is that second part alone.
"""

from __future__ import annotations

import abc
import dataclasses
import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from statewise._src.common.paths import Leaf, format_dtype, format_path, format_shape, format_type

__all__ = [
    "KindCount",
    "Shown",
    "ShownData",
    "Table",
    "count_kinds",
    "count_leaves",
    "format_bytes",
    "format_count",
    "kinds_table",
    "leaf_dict",
    "leaves_table",
    "printable",
    "total_of",
]

# The longest word that a column reserves space for, in letters: `restart=zeros_like`.
_WORD = 18


@runtime_checkable
class HasHandling(Protocol):
    """A kind as tables need it: it describes its handling in a few words."""

    def handling(self) -> str:
        """Returns the handling in a few words."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under named columns; prints as text, as a rich table, and as HTML.

    Attributes:
      title: a line above the table; empty for none.
      columns: the columns' names.
      rows: the cells, one tuple for each row.
      right: the names of the right-aligned columns.
      footer: a last row, separated by a line; None for none.
      below: a second table, displayed under this one; None for none.

    Example:
      >>> from statewise._src.common.tables import Table
      >>> print(Table("leaves", ("path", "elements"), (("kernel", "6"), ("bias", "3")), right=("elements",)))
      leaves
      path    elements
      ----------------
      kernel         6
      bias           3
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    footer: tuple[str, ...] | None = None
    below: Table | None = None

    def __post_init__(self) -> None:
        # A key of a user's dict may contain anything, including line breaks and a terminal's escape codes.
        object.__setattr__(self, "rows", tuple(tuple(map(printable, row)) for row in self.rows))

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """Returns the rows, with the footer as the last one."""
        return (*self.rows, self.footer) if self.footer else self.rows

    def __str__(self) -> str:
        widths = [max(map(cell_len, cells)) for cells in zip(self.columns, *self.lines, strict=True)]

        def written(cells: Sequence[str]) -> str:
            aligned = [
                " " * (width - cell_len(cell)) + cell if column in self.right else set_cell_size(cell, width)
                for column, cell, width in zip(self.columns, cells, widths, strict=True)
            ]
            return "  ".join(aligned).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        text = [*([self.title] if self.title else []), written(self.columns), rule, *map(written, self.rows)]
        if self.footer:
            text += [rule, written(self.footer)]
        if self.below:
            text += ["", str(self.below)]
        return "\n".join(text)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        # Text objects, not strings: a cell such as `[0]` is not markup.  The title is a line of its own, because rich
        # wraps a table's own title to the width of a narrow table.
        if self.title:
            yield Text(self.title, style="bold")
        if self._least() <= options.max_width:
            yield self._in_columns()
        else:
            yield from self._records()
        if self.below:
            yield Text("")
            yield self.below

    def _repr_html_(self) -> str:
        aligns = ["right" if column in self.right else "left" for column in self.columns]

        def row(cells: Sequence[str], tag: str) -> str:
            written = (
                # Code in a cell keeps its indentation.
                f'<{tag} style="text-align:{align};white-space:pre-wrap">{html.escape(cell)}</{tag}>'
                for align, cell in zip(aligns, cells, strict=True)
            )
            return f"<tr>{''.join(written)}</tr>"

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        foot = f"<tfoot>{row(self.footer, 'th')}</tfoot>" if self.footer else ""
        body = "".join(row(cells, "td") for cells in self.rows)
        below = self.below._repr_html_() if self.below else ""
        return f"<table>{caption}<thead>{row(self.columns, 'th')}</thead><tbody>{body}</tbody>{foot}</table>{below}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as plain data: each row as a dict from column to cell."""
        data: dict[str, Any] = {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
        }
        if self.footer:
            data["footer"] = dict(zip(self.columns, self.footer, strict=True))
        if self.below:
            data["below"] = self.below.to_dict()
        return data

    def _least(self) -> int:
        """Returns the width that columns need: for each its longest word, up to a limit, and two spaces in between."""
        columns = zip(self.columns, *self.lines, strict=True)
        words = ([word for cell in column for word in cell.split()] for column in columns)
        needs = [min(max(map(cell_len, column), default=0), _WORD) for column in words]
        return sum(needs) + 2 * (len(needs) - 1)

    def _in_columns(self) -> RichTable:
        """Returns the rows in columns, whose cells fold where they are too wide."""
        footer = self.footer
        table = RichTable(
            box=box.SIMPLE_HEAD, show_footer=footer is not None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for index, column in enumerate(self.columns):
            table.add_column(
                Text(column),
                Text(footer[index] if footer else ""),
                justify="right" if column in self.right else "left",
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _records(self) -> Iterator[Any]:
        """Yields each row as its first cell, followed by the other cells with their names, without empty ones."""
        for first, *others in self.lines:
            if first:
                yield Text(first, style="bold", overflow="fold")
            text = Text(overflow="fold")
            for name, cell in zip(self.columns[1:], others, strict=True):
                if cell not in ("", "-"):
                    text.append(" · " if text else "").append(name, style="dim").append(f" {cell}")
            if text:
                yield Padding(text, (0, 0, 0, 2))


class Shown(abc.ABC):
    """Data that displays itself as a table: as text, as a rich table, as HTML in a notebook."""

    @abc.abstractmethod
    def table(self) -> Table:
        """Returns the data as a table."""

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class ShownData(Shown):
    """A result that is also plain data, which JSON can represent."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain data."""

    def to_json(self) -> str:
        """Returns the result as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def printable(cell: str) -> str:
    """Returns text with escapes for unprintable characters: line breaks, a terminal's codes, marks of direction."""
    if cell.isprintable():
        return cell
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cell)


def format_count(number: int) -> str:
    """Writes a number with separators: `1,234,567`."""
    return f"{number:,}"


def format_bytes(number: int) -> str:
    """Writes a number of bytes: exactly below a kibibyte (`512 B`), then to one decimal (`1.5 KiB`, `2.0 MiB`)."""
    if abs(number) < 1024:
        return f"{number} B"
    size, units = float(number), ("KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        size /= 1024
        # 1023.97 KiB would be rounded to 1024.0 KiB, which is 1.0 MiB.
        if abs(size) < 1023.95 or unit == units[-1]:
            break
    return f"{size:,.1f} {unit}"


@dataclasses.dataclass(frozen=True)
class KindCount:
    """The size of one kind of a model.

    Attributes:
      name: the kind's name.
      leaves: the number of leaves; a tied leaf counts once.
      size: the number of elements, over all its arrays; the column `elements` of a table.
      nbytes: the number of bytes, over all its arrays; the column `bytes` of a table.
      dtypes: the number of leaves of each dtype; `-` stands for leaves without an array, `several` for leaves with a
        tuple or a dict of arrays.
      types: the number of leaves of each type, by the type's name; `Array` is a raw array.
      handling: the kind's handling in a few words, `-` by default.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> count = sw.census(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["params"]
      >>> count.leaves, count.size, count.nbytes, count.dtypes, count.types
      (2, 9, 36, {'float32': 2}, {'Param': 2})
    """

    name: str
    leaves: int
    size: int
    nbytes: int
    dtypes: dict[str, int]
    types: dict[str, int]
    handling: str = "-"


def count_kinds(leaves: Iterable[Leaf], kinds: Mapping[str, HasHandling]) -> tuple[KindCount, ...]:
    """Counts leaves by kind, in the order of the kinds; a kind without leaves is included, with zeros."""
    return count_leaves(leaves, {name: kind.handling() for name, kind in kinds.items()})


def count_leaves(leaves: Iterable[Leaf], handlings: Mapping[str, str]) -> tuple[KindCount, ...]:
    """Counts leaves by kind, where kinds are known only by name and handling, as on disk."""
    groups: dict[str, list[Leaf]] = {name: [] for name in handlings}
    for leaf in leaves:
        groups[leaf.kind or ""].append(leaf)
    return tuple(
        KindCount(
            name=name,
            leaves=len(group),
            size=sum(leaf.size for leaf in group),
            nbytes=sum(leaf.nbytes for leaf in group),
            dtypes=dict(Counter(map(_dtype_of, group))),
            types=dict(Counter(format_type(leaf.type) for leaf in group)),
            handling=handlings[name],
        )
        for name, group in groups.items()
    )


def _dtype_of(leaf: Leaf) -> str:
    return "several" if leaf.dtype is None and leaf.size else format_dtype(leaf.dtype)


def total_of(counts: Sequence[KindCount]) -> KindCount:
    """Returns the sum of all kinds, under the name `total`."""
    return KindCount(
        name="total",
        leaves=sum(count.leaves for count in counts),
        size=sum(count.size for count in counts),
        nbytes=sum(count.nbytes for count in counts),
        dtypes=dict(sum((Counter(count.dtypes) for count in counts), Counter[str]())),
        types=dict(sum((Counter(count.types) for count in counts), Counter[str]())),
        handling="",
    )


def kinds_table(title: str, counts: Sequence[KindCount]) -> Table:
    """Makes a table with a line for each kind: leaves, elements, bytes, dtypes, types and handling; then totals."""

    def row(count: KindCount, dtypes: str, types: str) -> tuple[str, ...]:
        size = (format_count(count.leaves), format_count(count.size), format_bytes(count.nbytes))
        return (count.name, *size, dtypes, types, count.handling)

    return Table(
        title,
        ("kind", "leaves", "elements", "bytes", "dtypes", "types", "handling"),
        tuple(row(count, ", ".join(count.dtypes) or "-", _tally(count.types)) for count in counts),
        right=("leaves", "elements", "bytes"),
        footer=row(total_of(counts), "", ""),
    )


def _tally(names: dict[str, int]) -> str:
    """Returns `Param` for leaves of one type, `Buffer 2, Variable 1` for several."""
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} {format_count(number)}" for name, number in names.items()) or "-"


def leaf_dict(leaf: Leaf) -> dict[str, Any]:
    """Returns a leaf as data that JSON can represent: paths, type and dtype as text, the shape as a list."""
    return {
        "path": format_path(leaf.path),
        "kind": leaf.kind,
        "type": format_type(leaf.type),
        "shape": None if leaf.shape is None else list(leaf.shape),
        "dtype": None if leaf.dtype is None else format_dtype(leaf.dtype),
        "aliases": list(map(format_path, leaf.aliases)),
        "size": leaf.size,
        "nbytes": leaf.nbytes,
    } | ({"note": leaf.note} if leaf.note else {})


def leaves_table(title: str, leaves: Sequence[Leaf], kinds: Mapping[str, HasHandling] | None = None) -> Table:
    """Makes a table with a line for each leaf, and, if the kinds are given, a line for each kind below.

    Args:
      title: the line above the table.
      leaves: the leaves, in the order of display.
      kinds: the kinds, for the part below; every leaf's kind must be among them.

    Returns:
      A table with the columns path, kind (if any leaf has one), type, shape, dtype, aliases (if any leaf has some).

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise._src.common.tables import leaves_table
      >>> print(leaves_table("", sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).leaves))
      path    kind    type   shape   dtype
      --------------------------------------
      bias    params  Param  (3,)    float32
      kernel  params  Param  (2, 3)  float32
    """
    columns: dict[str, list[str]] = {"path": [format_path(leaf.path) for leaf in leaves]}
    if any(leaf.kind is not None for leaf in leaves):
        columns["kind"] = [leaf.kind or "-" for leaf in leaves]
    columns["type"] = [format_type(leaf.type) for leaf in leaves]
    columns["shape"] = [format_shape(leaf.shape) for leaf in leaves]
    columns["dtype"] = [_dtype_of(leaf) for leaf in leaves]
    if any(leaf.aliases for leaf in leaves):
        columns["aliases"] = [", ".join(map(format_path, leaf.aliases)) for leaf in leaves]
    below = kinds_table("kinds", count_kinds(leaves, kinds)) if kinds is not None else None
    return Table(title, tuple(columns), tuple(zip(*columns.values(), strict=True)), below=below)
