"""Rules of constants: leaves that follow from the configuration of a model, and that no checkpoint needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from statewise._src.common import compat
from statewise._src.common.problems import counted
from statewise._src.filters.combinators import predicate
from statewise._src.filters.primitives import Path as Glob
from statewise._src.inspect.kind_hints import kind_apart
from statewise._src.inspect.lint.finding import Found, Rules
from statewise._src.inspect.lint.subject import Subject

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
    # By kind, and by what the tables are computed from: the function in the hint has one frequency.
    groups: dict[tuple[str, float], list[int]] = {}
    numbers = {id(leaf): number for number, leaf in enumerate(subject.graph.leaves)}
    for _, rope in subject.nodes_of(compat.RoPE) if compat.RoPE is not None else ():
        for table in (getattr(rope, name, None) for name in _TABLES):
            number = numbers.get(id(table))
            name = None if number is None else subject.claims[number]
            if number is not None and name is not None and subject.kinds[name].saved:
                group = groups.setdefault((name, float(rope.theta)), [])
                if number not in group:
                    group.append(number)
    for (name, theta), tables in groups.items():
        yield Found(
            f"The kind {name!r} is saved, and holds {counted(len(tables), 'table', 'tables')} of nnx.RoPE.",
            subject.rows(sorted(tables)),
            _hint(subject, name, theta, tables),
        )


def _hint(subject: Subject, kind: str, theta: float, tables: Sequence[int]) -> str:
    """Returns code that declares tables constants, which a restore computes for the shape that the model has."""
    handling = "frozen=True, saved=False, restart=table"
    declaration, _ = kind_apart(subject.kinds, kind, "constants", _filter(subject, tables), handling)
    # The broadcast is for tables of layers that `nnx.vmap` stacked, which have one more axis.
    return (
        "def table(array, path):\n"
        f"    rope = nnx.RoPE({theta!r}, embedding_size=2 * array.shape[-1], max_seq_len=array.shape[-2])\n"
        "    return jnp.broadcast_to(getattr(rope, path[-1])[...], array.shape).astype(array.dtype)\n"
        f"{declaration}"
    )


def _filter(subject: Subject, tables: Sequence[int]) -> str:
    """Returns a filter as code, by name if no other leaf has the name of a table, else by path."""
    names = sorted({subject.name(number) for number in tables}, key=_TABLES.index)
    matches: Any = predicate(tuple(Glob(f"**/{name}") for name in names))
    paths = [subject.graph.relative(path) for path in subject.paths]
    if {number for number, path in enumerate(paths) if matches(path, None)} == set(tables):
        patterns = [f"sw.Path({'**/' + name!r})" for name in names]
        return " | ".join(patterns)
    return f"sw.Where(lambda path, leaf: path in {[paths[number] for number in tables]!r})"
