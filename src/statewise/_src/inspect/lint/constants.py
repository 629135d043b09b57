"""Rules of constants: leaves that follow from the configuration of a model, and that no checkpoint needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.common.problems import counted
from statewise._src.filters.combinators import predicate
from statewise._src.filters.primitives import Path as Glob
from statewise._src.inspect.kind_hints import kind_apart
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.kind import Kind

__all__ = ["RULES"]

RULES = Rules()

# The attributes of `nnx.RoPE` that hold its tables; both are None for a layer that was made without a length.
_TABLES = ("cached_sin", "cached_cos")


@RULES.rule(
    "constant-saved",
    "the configuration determines it, so checkpoints carry it needlessly, and a model of another length rejects them",
)
def constant_saved(subject: Subject) -> Iterator[Found]:
    """Finds the tables of `nnx.RoPE` in kinds that are saved."""
    # By kind; and for each table what it is computed from.
    groups: dict[str, dict[int, float]] = {}
    numbers = {id(leaf): number for number, leaf in enumerate(subject.graph.leaves)}
    for _, rope in subject.nodes_of(compat.RoPE) if compat.RoPE is not None else ():
        for table in (getattr(rope, name, None) for name in _TABLES):
            number = numbers.get(id(table))
            name = None if number is None else subject.claims[number]
            if number is not None and name is not None and subject.kinds[name].saved:
                groups.setdefault(name, {}).setdefault(number, float(rope.theta))
    taken = dict(subject.kinds)
    for name, tables in groups.items():
        hint, own = _hint(subject, taken, name, tables)
        # The next hint is for the declaration that this one makes.
        taken[own] = taken[name]
        yield Found(
            f"The kind {name!r} is saved, and holds {counted(len(tables), 'table', 'tables')} of nnx.RoPE.",
            subject.rows(sorted(tables)),
            hint,
        )


def _hint(subject: Subject, kinds: Mapping[str, Kind], kind: str, tables: Mapping[int, float]) -> tuple[str, str]:
    """Returns code that declares tables constants, which a restore computes for the shape that the model has.

    Args:
      subject: the subject.
      kinds: the declaration, with the kinds that other hints add.
      kind: the kind that holds the tables.
      tables: the number of each, and its frequency.

    Returns:
      the code, and the name of the new kind.
    """
    handling = "frozen=True, saved=False, restart=table"
    declaration, own = kind_apart(kinds, kind, "constants", _filter(subject, list(tables)), handling)
    thetas = {subject.paths[number]: theta for number, theta in tables.items()}
    several, theta = "", repr(next(iter(tables.values())))
    if len({*tables.values()}) > 1:
        several, theta = f"thetas = {thetas!r}\n", "thetas[path]"
    # The broadcast is for tables of layers that `nnx.vmap` stacked, which have one more axis.
    code = (
        f"{several}"
        "def table(array, path):\n"
        f"    rope = nnx.RoPE({theta}, embedding_size=2 * array.shape[-1], max_seq_len=array.shape[-2])\n"
        "    return jnp.broadcast_to(getattr(rope, path[-1])[...], array.shape).astype(array.dtype)\n"
        f"{declaration}"
    )
    return code, own


def _filter(subject: Subject, tables: Sequence[int]) -> str:
    """Returns a filter as code, by name if no other leaf has the name of a table, else by path."""
    names = sorted({subject.name(number) for number in tables}, key=_TABLES.index)
    matches: Any = predicate(tuple(Glob(f"**/{name}") for name in names))
    paths = [subject.graph.relative(path) for path in subject.paths]
    if {number for number, path in enumerate(paths) if matches(path, None)} == set(tables):
        patterns = [f"sw.Path({'**/' + name!r})" for name in names]
        return " | ".join(patterns)
    return f"sw.Where(lambda path, leaf: path in {[paths[number] for number in tables]!r})"
