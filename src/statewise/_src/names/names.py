"""`NamesData`: what every leaf of a model is called elsewhere, and which row of it is about which leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.names.layout import Layout
from statewise._src.names.name import Name
from statewise._src.names.template import Template
from statewise.errors import DeclarationError, StructureError

__all__ = ["NamesData", "Row", "check_names", "row_hint"]

Row = Name | None


class NamesData(Mapping[str, Row]):
    """The data of `Names`: a mapping from our paths to their names; immutable, equal by value, hashable."""

    __slots__ = ("_about", "_hash", "_open", "_open_about", "_rows")

    def __init__(self, rows: Mapping[str, Any]) -> None:
        if not isinstance(rows, Mapping):
            raise DeclarationError(
                f"Names are a mapping from our paths to theirs, not {type(rows).__name__}.",
                hint="sw.Names({'embed/embedding': 'model.embed_tokens.weight'})",
            )
        self._rows: dict[str, Row] = {}
        self._open: dict[str, Template] = {}
        # Names without placeholders are looked up: there may be one for each of thousands of arrays.
        self._about: dict[str, list[str]] = {}
        self._open_about: list[tuple[str, Template]] = []
        for path, given in rows.items():
            template = Template.parse(path)
            if "*" in path or any(not key for key in path.split("/")):
                raise DeclarationError(
                    f"{path!r} is not a path of a leaf.", hint="'layers/{i}/kernel', where {i} is any one key"
                )
            name = given if given is None or isinstance(given, Name) else Name(given)
            _check_fields(template, name)
            self._rows[path] = name
            if template.fields:
                self._open[path] = template
            for each in () if name is None else name.templates:
                if each.fields:
                    self._open_about.append((path, each))
                else:
                    self._about.setdefault(each.text, []).append(path)
        self._hash = hash(frozenset(self._rows.items()))

    def __getitem__(self, path: str) -> Row:
        return self._rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NamesData) and self._rows == other._rows

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        rows = [f"    {path!r}: {'None' if name is None else name.code()},\n" for path, name in self._rows.items()]
        return f"sw.Names({{\n{''.join(rows)}}})" if rows else "sw.Names({})"

    def __or__(self, other: Self) -> Self:
        if not isinstance(other, NamesData):
            return NotImplemented
        return type(self)({**self._rows, **other._rows})

    def to_dict(self) -> dict[str, Any]:
        """Returns the names as plain data, for JSON."""
        return {path: None if name is None else name.to_dict() for path, name in self._rows.items()}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Returns the names that `to_dict` wrote.

        Raises:
          DeclarationError: the data is something else.
        """
        if not isinstance(data, Mapping):
            raise DeclarationError("This is not the data of Names.", hint="what names.to_dict() returned")
        return cls({path: None if name is None else Name.from_dict(name) for path, name in data.items()})

    def rows_of(self, path: str) -> list[tuple[str, dict[str, str]]]:
        """Returns the rows that match one of our paths: each with what its placeholders stand for."""
        # Rows without placeholders are looked up: a declaration may have one for each of thousands of leaves.
        exact: list[tuple[str, dict[str, str]]] = [(path, {})] if path in self._rows and path not in self._open else []
        found = ((row, template.match(path)) for row, template in self._open.items())
        return exact + [(row, values) for row, values in found if values is not None]

    def rows_about(self, name: str) -> list[str]:
        """Returns the rows that have this name of the other program among theirs."""
        matching = (row for row, template in self._open_about if template.match(name) is not None)
        return list(dict.fromkeys((*self._about.get(name, ()), *matching)))

    def paths_of(self, name: str) -> list[str]:
        """Returns our paths that a name elsewhere belongs to, by the rows that are about it."""
        matches = ((row, template.match(name)) for row, template in self._open_about)
        filled = (Template.parse(row).fill(values) for row, values in matches if values is not None)
        return [*self._about.get(name, ()), *filled]

    def layouts(
        self, leaf: Leaf, within: tuple[Any, ...], shape: tuple[int, ...], problems: Problems
    ) -> list[tuple[str, Layout]]:
        """Returns where the other program has one array of a leaf, by the leaf's paths: it may have a tied leaf twice.

        Args:
          leaf: the leaf.
          within: the keys of the array within the leaf.
          shape: the array's shape.
          problems: gets what is wrong.

        Returns:
          nothing where a row says that the array is not elsewhere, where no row matches, or where something is wrong.
        """
        found: dict[tuple[tuple[str, ...], ...], tuple[str, Layout]] = {}
        for path in (leaf.path, *leaf.aliases):
            text = format_path(path + within)
            rows = self.rows_of(text)
            if len(rows) > 1:
                listed = ", ".join(repr(row) for row, _ in rows)
                problems.add(leaf, f"is in several rows: {listed}", "names in which one row is about each leaf")
                continue
            for row, values in rows:
                name = self._rows[row]
                if name is None:
                    continue
                try:
                    layout = Layout.of(name, values, shape)
                except ValueError as error:
                    problems.add(leaf, str(error), f"another pattern, or a model of other sizes, in the row {row!r}")
                    continue
                first, known = found.setdefault(layout.parts, (text, layout))
                if known.name != name:
                    fact = f"is {layout.parts[0][0]} by two of its paths, {first} and {text}, in two layouts"
                    problems.add(leaf, fact, "the same pattern in both rows, or one row")
        return list(found.values())

    def knows(self, leaf: Leaf, within: tuple[Any, ...] = ()) -> bool:
        """Returns whether a row is about an array, even one that says that the other program does not have it."""
        return any(self.rows_of(format_path(path + within)) for path in (leaf.path, *leaf.aliases))

    def hint_of(self, path: Path) -> str:
        """Returns the hint for a leaf that has no row: its row, or the prefix that all rows lack."""
        if len(path) > 1 and self.rows_of(format_path(path[1:])):
            prefix = format_path(path[:1])
            return (
                f"the names are of {prefix!r}, one of several objects in the plan: "
                f"sw.Names({{f'{prefix}/{{path}}': name for path, name in names.items()}})"
            )
        return row_hint(path)


def _check_fields(template: Template, name: Row) -> None:
    """Checks that each of our leaves has a name of its own."""
    if name is None:
        return
    lost = sorted({*template.fields} - {*name.templates[0].fields})
    if lost:
        shown = ", ".join(f"{{{field}}}" for field in lost)
        raise DeclarationError(
            f"The leaves {template.text!r} differ in {shown}, which {name.names[0]!r} does not have.",
            hint=f"a name with {shown}: 'model.layers.{shown}.weight'",
        )


def row_hint(path: Path) -> str:
    """Returns the hint to add a row: one for all layers of a list."""
    fields = iter("ijklmnop")
    row = "/".join(f"{{{next(fields, 'n')}}}" if isinstance(key, int) else str(key) for key in path)
    return f"a row in the names, {row!r}: 'its name there'; or None, for what is not there"


def check_names(names: object, hint: str) -> NamesData:
    """Returns the names that were passed, checked.

    Raises:
      StructureError: they are something else.
    """
    if not isinstance(names, NamesData):
        raise StructureError(f"names is {type(names).__name__}, and not sw.Names.", hint=hint)
    return names
