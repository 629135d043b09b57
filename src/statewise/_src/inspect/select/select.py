"""Looking at a model by filters: which leaves a filter means, how many they are, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, overload

from flax import nnx

from statewise._src.common.nnx_graph import ModelError, ModelGraph, read_graph, row_of
from statewise._src.common.paths import Leaf, Path, format_dtype, format_path, format_shape, format_type
from statewise._src.common.tables import Shown, Table, leaf_dict
from statewise._src.core.plan import Kinds
from statewise._src.filters.combinators import Filter, describe, predicate
from statewise._src.filters.explain import explain_leaf, type_only
from statewise._src.plan.spelled_paths import Reading
from statewise.errors import DeclarationError

__all__ = ["Explanation", "check_kinds", "count", "explain", "look", "select"]


def look(model: Any) -> ModelGraph:
    """Flattens a model, or a tuple or list of objects, as it is, so that merging gives the same container back."""
    several = isinstance(model, (tuple, list))
    for position, thing in enumerate(model if several else ()):
        if isinstance(thing, type):
            raise ModelError(
                f"Object {position} is the class {thing.__name__}, not an instance of it.",
                hint=f"{thing.__name__}(..., rngs=nnx.Rngs(0))",
            )
    found = read_graph((model,))
    if () in found.paths:
        raise ModelError(
            f"This is {_named(model)}, which holds no leaves at paths.", hint="pass a module, or {'name': variable}"
        )
    return found._replace(several=several)


def check_kinds(kinds: Any) -> None:
    """Refuses what is no `Kinds`."""
    if not isinstance(kinds, Kinds):
        name = kinds.__name__ if isinstance(kinds, type) else type(kinds).__name__
        raise DeclarationError(f"{name} is no Kinds.", hint="sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))")


def _named(thing: Any) -> str:
    return f"a single {format_type(thing.var_type)}" if isinstance(thing, nnx.Variable) else type(thing).__name__


def _seen(found: ModelGraph, *filters: object) -> Sequence[Path]:
    """Each leaf's path as these filters see it; a path in them that could mean one leaf or another is refused."""
    if all(map(type_only, filters)):
        return [found.relative(path) for path in found.paths]
    reading = Reading(found)
    for filter in filters:
        reading.check(filter)
    return reading.ways


def select(model: object, filter: Filter) -> nnx.State[Any, Any]:
    """The leaves that a filter means, by path: live Variables, as `nnx.state` gives them.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      filter: any NNX filter, or one of ours.

    Returns:
      an `nnx.State` of the matching leaves, empty if there are none.

    Raises:
      FilterError: the filter is none, or spells a path that could mean one leaf or another.
      StructureError: the model is none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> sorted(sw.select(model, nnx.BatchStat))
      ['mean', 'var']
    """
    matches = predicate(filter)
    found = look(model)
    chosen: list[Any] = [
        (path, leaf)
        for path, seen, leaf in zip(found.paths, _seen(found, filter), found.leaves, strict=True)
        if matches(seen, leaf)
    ]
    return nnx.from_flat_state(chosen)


@overload
def count(model: object) -> int: ...
@overload
def count(model: object, filter: Filter, /) -> int: ...
@overload
def count(model: object, first: Filter, second: Filter, /, *filters: Filter) -> tuple[int, ...]: ...
def count(model: object, *filters: Filter) -> int | tuple[int, ...]:
    """How many leaves each filter means.  A tied leaf counts once; a raw array is a leaf.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      *filters: each is counted by itself: a leaf that two of them mean counts in both.

    Returns:
      the number of leaves for one filter, a tuple of numbers for several, that of all leaves for none.

    Raises:
      FilterError: a filter is none, or spells a path that could mean one leaf or another.
      StructureError: the model is none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> sw.count(model), sw.count(model, nnx.Param), sw.count(model, nnx.Variable, nnx.BatchStat)
      (4, 2, (4, 2))
    """
    matchers = [predicate(filter) for filter in filters]
    found = look(model)
    if not matchers:
        return len(found.leaves)
    keyed = list(zip(_seen(found, *filters), found.leaves, strict=True))
    counts = tuple(sum(matches(path, leaf) for path, leaf in keyed) for matches in matchers)
    return counts if len(counts) > 1 else counts[0]


@dataclasses.dataclass(frozen=True)
class Explanation(Shown):
    """What a filter makes of each leaf of a model; prints as a table.

    Attributes:
      filter: the filter, as text.
      leaves: every leaf of the model.
      matched: for each leaf, whether the filter means it.
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
        """The explanation as a table: one line for each leaf."""
        rows = tuple(
            (
                format_path(leaf.path),
                format_type(leaf.type),
                format_shape(leaf.shape),
                format_dtype(leaf.dtype),
                "yes" if matched else "no",
                by,
            )
            for leaf, matched, by in zip(self.leaves, self.matched, self.by, strict=True)
        )
        return Table(
            self.filter,
            ("path", "type", "shape", "dtype", "matched", "by"),
            rows,
            footer=("total", "", "", "", f"{sum(self.matched)} of {len(self.leaves)}", ""),
        )

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return {
            "filter": self.filter,
            "leaves": [
                {**leaf_dict(leaf), "matched": matched, "by": by}
                for leaf, matched, by in zip(self.leaves, self.matched, self.by, strict=True)
            ],
        }

    def to_json(self) -> str:
        """The explanation as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def explain(model: object, filter: Filter) -> Explanation:
    """Tells for every leaf whether a filter means it, and which part of the filter decided that.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      filter: any NNX filter, or one of ours.

    Returns:
      an `Explanation`, which prints as a table.

    Raises:
      FilterError: the filter is none, or spells a path that could mean one leaf or another.
      StructureError: the model is none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> sw.explain(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ~sw.Path("bias")).matched
      (False, True)
    """
    text = describe(filter)
    found = look(model)
    answers = [explain_leaf(filter, seen, leaf) for seen, leaf in zip(_seen(found, filter), found.leaves, strict=True)]
    return Explanation(
        filter=text,
        leaves=tuple(row_of(path, leaf) for path, leaf in zip(found.paths, found.leaves, strict=True)),
        matched=tuple(matched for matched, _ in answers),
        by=tuple(by for _, by in answers),
    )
