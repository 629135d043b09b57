"""Filters applied to a model: which leaves a filter matches, how many, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, overload

from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nested_state import nested
from statewise._src.common.nnx_graph import ModelError, ModelGraph, read_graph, row_of
from statewise._src.common.paths import Leaf, Path, format_type
from statewise._src.common.tables import ShownData, Table, leaf_dict, leaves_table
from statewise._src.core.plan import Kinds, Plan
from statewise._src.filters.combinators import Filter, describe, predicate
from statewise._src.filters.explain import explain_leaf, type_only
from statewise._src.plan.spelled_paths import Reading
from statewise._src.plan.tables import PlanTables
from statewise.errors import DeclarationError

__all__ = ["Explanation", "check_kinds", "chosen_kinds", "count", "explain", "graph_of", "objects_of", "select"]


def graph_of(model: object) -> ModelGraph:
    """Flattens a model, or a tuple or list of objects, as it is, so that merging returns the same container."""
    several = isinstance(model, (tuple, list))
    for position, item in enumerate(objects_of(model) if several else ()):
        if isinstance(item, type):
            raise ModelError(
                f"Object {position} is the class {item.__name__}, not an instance of it.",
                hint=f"{item.__name__}(..., rngs=nnx.Rngs(0))",
            )
    graph = read_graph((model,))
    if () in graph.paths:
        single = f"a single {format_type(model.var_type)}" if isinstance(model, nnx.Variable) else None
        raise ModelError(
            f"This is {single or type(model).__name__}, which holds no leaves at paths.",
            hint="pass a module, or {'name': variable}",
        )
    # To `read_graph` a tuple is one object; filters see paths relative to each of its items.
    return graph._replace(several=several)


def objects_of(model: object) -> tuple[object, ...]:
    """Returns the objects in a tuple or list; any other model alone."""
    return tuple(model) if isinstance(model, (tuple, list)) else (model,)


def check_kinds(kinds: object) -> Kinds:
    """Returns a `Kinds`; checks that it is one.

    Raises:
      DeclarationError: it is not.
    """
    if not isinstance(kinds, Kinds):
        name = kinds.__name__ if isinstance(kinds, type) else type(kinds).__name__
        raise DeclarationError(f"{name} is not a Kinds.", hint="sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))")
    return kinds


def chosen_kinds(kinds: object, planned: PlanTables | None, hint: str) -> Kinds:
    """Returns the kinds to use: those of a plan, those passed, or the standard ones.

    Args:
      kinds: the kinds passed, if any.
      planned: the plan, if there is one.
      hint: what to write instead of other kinds beside a plan.

    Raises:
      DeclarationError: what was passed is not a `Kinds`, or the plan has other kinds.
    """
    given = None if kinds is None else check_kinds(kinds)
    if planned is None:
        return Kinds.standard() if given is None else given
    own = Plan.of(planned).kinds
    if given is not None and given != own:
        raise DeclarationError("A plan, or the plan of a state, has its own kinds.", hint=hint)
    return own


def _leaves(model: object, *filters: object) -> Iterator[tuple[Path, Path, Any]]:
    """Yields each leaf: its path, its path as these filters see it, and the leaf.

    Raises:
      FilterError: a path in a filter could mean one leaf or another.
    """
    graph = graph_of(model)
    if all(map(type_only, filters)):
        seen = tuple(map(graph.relative, graph.paths))  # no filter reads it: other paths need not be looked for
    else:
        reading = Reading(graph)
        for filter in filters:
            reading.check(filter)
        seen = reading.ways
    yield from zip(graph.paths, seen, graph.leaves, strict=True)


def select(model: object, filter: Filter) -> compat.NestedState:
    """Returns the leaves that a filter matches, by path: live Variables, as `nnx.state` returns them.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      filter: any NNX filter, or one of Statewise's.

    Returns:
      the matching leaves in the container of `nnx.state`, empty if there are none.

    Raises:
      FilterError: it is not a filter, or has a path that could mean one leaf or another.
      StructureError: `model` is not a module or another object with leaves.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> sorted(sw.select(model, nnx.BatchStat))
      ['mean', 'var']
    """
    matches = predicate(filter)
    selected: list[Any] = [(path, leaf) for path, seen, leaf in _leaves(model, filter) if matches(seen, leaf)]
    return nested(selected)


@overload
def count(model: object) -> int: ...
@overload
def count(model: object, filter: Filter, /) -> int: ...
@overload
def count(model: object, first: Filter, second: Filter, /, *filters: Filter) -> tuple[int, ...]: ...
def count(model: object, *filters: Filter) -> int | tuple[int, ...]:
    """Counts the leaves that each filter matches.  A tied leaf counts once; a raw array is a leaf.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      *filters: each is counted independently: a leaf that two of them match counts in both.

    Returns:
      the number of leaves for one filter, a tuple of numbers for several, the number of all leaves for none.

    Raises:
      FilterError: one is not a filter, or has a path that could mean one leaf or another.
      StructureError: `model` is not a module or another object with leaves.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> sw.count(model), sw.count(model, nnx.Param), sw.count(model, nnx.Variable, nnx.BatchStat)
      (4, 2, (4, 2))
    """
    matchers = [predicate(filter) for filter in filters]
    if not matchers:
        return len(graph_of(model).leaves)
    leaves = list(_leaves(model, *filters))
    counts = tuple(sum(matches(seen, leaf) for _, seen, leaf in leaves) for matches in matchers)
    return counts if len(counts) > 1 else counts[0]


@dataclasses.dataclass(frozen=True)
class Explanation(ShownData):
    """How a filter decides on each leaf of a model; prints as a table.

    Attributes:
      filter: the filter, as text.
      leaves: every leaf of the model.
      matched: for each leaf, whether the filter matches it.
      by: for each leaf, the part of the filter that decided.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> print(sw.explain(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param & sw.Path("ker*")))
      Param & Path('ker*')
      path    type   shape   dtype    matched  by
      -------------------------------------------------------------
      bias    Param  (3,)    float32  no       Path('ker*')
      kernel  Param  (2, 3)  float32  yes      Param & Path('ker*')
      -------------------------------------------------------------
      total                           1 of 2
    """

    filter: str
    leaves: tuple[Leaf, ...]
    matched: tuple[bool, ...]
    by: tuple[str, ...]

    def table(self) -> Table:
        """Returns the explanation as a table: one line for each leaf."""
        table = leaves_table(self.filter, self.leaves)
        columns = (*table.columns, "matched", "by")
        facts = zip(table.rows, self.matched, self.by, strict=True)
        rows = tuple((*row, "yes" if matched else "no", by) for row, matched, by in facts)
        footer = ("total", "", "", "", f"{sum(self.matched)} of {len(self.leaves)}", "")
        return dataclasses.replace(table, columns=columns, rows=rows, footer=footer)

    def to_dict(self) -> dict[str, Any]:
        """Returns the explanation as plain data."""
        rows = zip(self.leaves, self.matched, self.by, strict=True)
        return {
            "filter": self.filter,
            "leaves": [{**leaf_dict(leaf), "matched": matched, "by": by} for leaf, matched, by in rows],
        }


def explain(model: object, filter: Filter) -> Explanation:
    """Explains for every leaf whether a filter matches it, and which part of the filter decided that.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      filter: any NNX filter, or one of Statewise's.

    Returns:
      an `Explanation`, which prints as a table.

    Raises:
      FilterError: it is not a filter, or has a path that could mean one leaf or another.
      StructureError: `model` is not a module or another object with leaves.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> sw.explain(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ~sw.Path("bias")).matched
      (False, True)
    """
    text = describe(filter)
    answers = [(row_of(path, leaf), *explain_leaf(filter, seen, leaf)) for path, seen, leaf in _leaves(model, filter)]
    leaves, matched, by = zip(*answers, strict=True) if answers else ((), (), ())
    return Explanation(text, leaves, matched, by)
