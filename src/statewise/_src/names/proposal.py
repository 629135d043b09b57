"""`NamesProposal`: proposed names as code, with what a reader has to decide or to check as comments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from statewise._src.names.infer import Proposed, propose
from statewise._src.names.name import Name
from statewise._src.names.shapes import Shape
from statewise._src.names.template import Template
from statewise.errors import DeclarationError

__all__ = ["NamesProposal", "proposed_names"]


@dataclasses.dataclass(frozen=True)
class NamesProposal:
    """A proposal of `sw.Names`, as code to read, correct and paste: `str(proposal)`.

    Names cannot be made of it but by a reader, because a proposal can be wrong: two layouts of one shape look the same.

    Attributes:
      code: the code.  Comments are rows that could not be decided, with the names that fit the shape; and what should
        be checked.
      decided: our paths that have a row, with placeholders.
      undecided: those that have not.
      unused: their names that no row is about, with placeholders.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> names = sw.Names({"kernel": sw.Name("proj.weight", "o i -> i o"), "bias": "proj.bias"})
      >>> folder = tempfile.mkdtemp() + "/published"
      >>> print(sw.convert(sw.plan(model).take(model), folder, names=names).ok)
      True
      >>> proposal = sw.Names.infer(sw.plan(model), folder)
      >>> print(proposal)
      names = sw.Names(
          {
              # by its shape, because the names have nothing in common:
              'bias': 'proj.bias',
              # by its shape, because the names have nothing in common:
              'kernel': sw.Name('proj.weight', 'o i -> i o'),
          }
      )
      >>> proposal.undecided
      ()
    """

    code: str
    decided: tuple[str, ...]
    undecided: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return self.code

    def to_dict(self) -> dict[str, Any]:
        """Returns the proposal as plain data."""
        return dataclasses.asdict(self)


def proposed_names(
    leaves: Sequence[tuple[Sequence[tuple[Sequence[str], Shape]], bool]],
    theirs: Mapping[str, Shape],
    known: Mapping[str, Name | None],
) -> NamesProposal:
    """Proposes names.

    Args:
      leaves: for each of our arrays its paths, as keys, of which a tied leaf has several, each with its shape; and
        whether a known row is about it.
      theirs: the shape of each of their arrays that no known row is about.
      known: rows that stay as they are.
    """
    usable = {name: shape for name, shape in theirs.items() if _is_template(name)}
    open_paths = [pair for ways, is_known in leaves if not is_known for pair in ways if _is_path(pair[0])]
    rows, unused = propose(open_paths, list(usable.items()))
    decided = [row.row for row in rows if row.name is not None]
    is_decided = _matcher(decided)
    needed = [
        "/".join(ways[0][0])
        for ways, is_known in leaves
        if not is_known and ways and not any(is_decided("/".join(keys)) for keys, _ in ways)
    ]
    undecided = _undecided(rows, needed)
    open_rows = {row.row for row in undecided}
    lines = [f"        {path!r}: {'None' if name is None else name.code()}," for path, name in known.items()]
    lines += [line for row in rows for line in _lines(row, row.row in open_rows)]
    lost = [*unused, *(name for name in theirs if name not in usable)]
    code = "names = sw.Names(\n    {\n" + "".join(f"{line}\n" for line in lines) + "    }\n)"
    if lost:
        code += "\n# Not used: " + ", ".join(map(repr, lost))
    return NamesProposal(code, tuple(decided), tuple(row.row for row in undecided), tuple(lost))


def _matcher(rows: Iterable[str]) -> Callable[[str], bool]:
    """Returns whether one of some rows is about a path; rows without placeholders are looked up."""
    templates = [Template.parse(row) for row in rows]
    exact = {template.text for template in templates if not template.fields}
    patterns = [template for template in templates if template.fields]
    return lambda path: path in exact or any(template.match(path) is not None for template in patterns)


def _undecided(rows: Iterable[Proposed], needed: Iterable[str]) -> list[Proposed]:
    """Returns the rows without a name that are about a path that needs one."""
    paths = {*needed}

    def is_needed(row: str) -> bool:
        template = Template.parse(row)
        return any(template.match(path) is not None for path in paths) if template.fields else row in paths

    return [row for row in rows if row.name is None and is_needed(row.row)]


def _lines(row: Proposed, is_undecided: bool) -> list[str]:
    if row.name is not None:
        return [*([f"        # {row.note}:"] if row.note else []), f"        {row.row!r}: {row.name.code()},"]
    if not is_undecided:
        return []
    if not row.candidates:
        return [f"        # {row.row!r}: None,  # not one array there fits; None says that they do not have it"]
    why = f"{row.note}: " if row.note else ""
    return [f"        # {row.row!r}: ?  # {why}one of {', '.join(map(repr, row.candidates))}"]


def _is_template(name: str) -> bool:
    try:
        return not Template.parse(name).fields
    except DeclarationError:
        return False


def _is_path(keys: Sequence[str]) -> bool:
    return all(key and not {*key} & {*"{}*/"} for key in keys)
