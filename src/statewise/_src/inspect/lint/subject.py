"""What lint looks at: objects, their leaves by kind, what trains them, and the values that can be read.

However a model was given (an object, several, a plan, a state), rules see it the same way.  Whatever costs time is
worked out when the first rule asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import (
    ArraySpec,
    ModelError,
    ModelGraph,
    arrays_of,
    named,
    raw_value,
    read_graph,
    row_of,
)
from statewise._src.common.paths import Leaf, Path
from statewise._src.common.ties import aliases_of
from statewise._src.core.batches import check_not_batch
from statewise._src.core.model_io import build
from statewise._src.core.plan import Kinds, Plan, State, tables_of
from statewise._src.core.state_data import StateData, check_not_donated
from statewise._src.core.templates import abstract
from statewise._src.filters.explain import is_python
from statewise._src.inspect.lint.read_values import Facts, is_readable, read
from statewise._src.inspect.select.select import check_kinds
from statewise._src.plan.kind import Kind
from statewise._src.plan.match import claim, claimants
from statewise._src.plan.spelled_paths import Reading
from statewise._src.plan.tables import PlanTables
from statewise.errors import DeclarationError, OverlapError, UnclaimedError

__all__ = ["Subject", "look"]


def look(objects: Sequence[Any], kinds: Any, decode_length: int | None, names: tuple[str, ...] = ()) -> Subject:
    """Makes a subject of what was given to `sw.lint`.

    Raises:
      DeclarationError: kinds that are none, or kinds beside a plan or a state.
      StructureError: what was given is no model; a donated state.
    """
    if kinds is not None:
        check_kinds(kinds)
    if len(objects) == 1 and isinstance(objects[0], tuple | list) and not names:
        objects = tuple(objects[0])
    planned = [thing for thing in objects if isinstance(thing, Plan | State)]
    if planned and len(objects) > 1:
        raise ModelError(
            f"A {type(planned[0]).__name__.lower()} is looked at alone: it holds all of its objects.",
            hint="sw.lint(plan)",
        )
    if not planned:
        return Subject(tuple(objects), kinds or Kinds.standard(), kinds is not None, None, decode_length, names)
    state: StateData = planned[0] if isinstance(planned[0], State) else abstract(tables_of(planned[0]))
    plan = state.tables
    if kinds is not None and kinds != plan.kinds:
        raise DeclarationError("A plan is looked at by its own kinds.", hint="sw.lint(model, kinds=kinds)")
    check_not_batch(state)
    if plan.per_device:
        state = _first_of_each(state)
    built = build(state.tables, state, copy=False)
    objects = built if plan.object_count > 1 else (built,)
    return Subject(objects, plan.kinds, True, plan, decode_length, plan.names)


def _first_of_each(state: StateData) -> StateData:
    """A state with one value of each leaf: where each device has its own, that of the first device that is here."""
    plan, plain = state.tables, state.tables.plain
    check_not_donated(state, plan.kinds)
    parts = {kind: plan.unpack(kind, state.part(kind).arrays) for kind in plan.kinds}
    return StateData.of(
        plain,
        [
            [_first(array, spec) for array, spec in zip(parts[kind], specs, strict=True)]
            for kind, specs in plain.specs.items()
        ],
    )


def _first(array: Any, spec: ArraySpec) -> Any:
    if array.shape == spec.shape:
        return array
    if not is_readable(array):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    return array.addressable_shards[0].data[0]


@dataclasses.dataclass(eq=False)
class Subject:
    """What rules look at.

    Attributes:
      objects: the objects; those of a plan are abstract.
      kinds: the kinds.
      declared: whether somebody chose the kinds: they were given, or are a plan's.
      plan: the plan, where there is one.
      decode_length: how many tokens are to be decoded, where it was said.
      names: the objects' names, where they have any.
    """

    objects: tuple[Any, ...]
    kinds: Mapping[str, Kind]
    declared: bool
    plan: PlanTables | None
    decode_length: int | None
    names: tuple[str, ...] = ()
    trainings: Any = None  # what `training.trainings` found, once it was asked

    # --- leaves ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def found(self) -> ModelGraph:
        """The objects, flattened; of a plan the leaves that it knows."""
        found = read_graph(self.objects, self.names)
        if self.plan is None:
            return found
        # Of abstract objects NNX takes shapes in containers (a tuple of raw arrays) for something static.
        known = dict(zip(found.paths, found.leaves, strict=True))
        rows = self.plan.rows
        leaves = tuple(
            known[row.path] if row.path in known else jax.ShapeDtypeStruct(row.specs[0].shape, row.specs[0].dtype)
            for row in rows
        )
        paths = tuple(row.path for row in rows)
        return ModelGraph(self.plan.graphdef, paths, leaves, self.plan.several, self.names)

    @functools.cached_property
    def types(self) -> tuple[type, ...]:
        """The type of each leaf."""
        return tuple(map(compat.variable_type, self.found.leaves))

    @functools.cached_property
    def values(self) -> tuple[Any, ...]:
        """What each leaf holds."""
        return tuple(map(raw_value, self.found.leaves))

    @functools.cached_property
    def position(self) -> dict[Path, int]:
        """The number of the leaf at each path."""
        return {path: number for number, path in enumerate(self.found.paths)}

    @functools.cached_property
    def _claims(self) -> tuple[list[str | None], OverlapError | UnclaimedError | DeclarationError | None]:
        try:
            # What a plan has been made of fits; but for what an earlier `sow` left, which the plan drops.
            return list(claim(self.kinds, self.found, check_paths=self.plan is None)), None
        except (OverlapError, UnclaimedError, DeclarationError) as error:
            claims_of = claimants(self.kinds)
            names = [
                claims_of(self.found.ways(path), leaf)
                for path, leaf in zip(self.found.paths, self.found.leaves, strict=True)
            ]
            return [name[0] if len(name) == 1 else None for name in names], error

    @property
    def claims(self) -> list[str | None]:
        """The kind of each leaf; None where no kind, or more than one, claims it."""
        return self._claims[0]

    @property
    def refused(self) -> OverlapError | UnclaimedError | DeclarationError | None:
        """Why the kinds do not fit the leaves, where they do not."""
        return self._claims[1]

    @functools.cached_property
    def aliases(self) -> dict[Path, tuple[Path, ...]]:
        """The other paths of leaves that several paths reach."""
        return aliases_of(self.found.graphdef, self.found.paths, self.found.several, self.found.names)

    @functools.cached_property
    def reading(self) -> Reading:
        """The leaves as filters that look at paths see them."""
        return Reading(self.found, self.aliases)

    def row(self, number: int, note: str = "") -> Leaf:
        """A leaf as data."""
        path = self.found.paths[number]
        return dataclasses.replace(
            row_of(path, self.found.leaves[number], self.claims[number], note=note),
            aliases=self.aliases.get(path, ()),
        )

    def rows(self, numbers: Sequence[int], note: str = "") -> tuple[Leaf, ...]:
        """Leaves as data."""
        return tuple(self.row(number, note) for number in numbers)

    def of_type(self, *types: type) -> list[int]:
        """The leaves whose type is one of these, or a subclass."""
        known = {cls: issubclass(cls, types) for cls in set(self.types)}
        return [number for number, cls in enumerate(self.types) if known[cls]]

    def dtype(self, number: int) -> Any:
        """The dtype of a leaf that holds one array; None for any other."""
        return getattr(self.values[number], "dtype", None)

    def floating(self, number: int) -> bool:
        """Whether a leaf holds one array of floating-point numbers."""
        dtype = self.dtype(number)
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating)

    def name(self, number: int) -> str:
        """The last key of a leaf's path."""
        return str(self.found.paths[number][-1])

    def target(self, number: int) -> str:
        """What code assigns a leaf to, seen from the module that has it: `self.kernel`, `self.w[0]`."""
        path = self.found.relative(self.found.paths[number])
        named = [at for at, key in enumerate(path) if isinstance(key, str) and key.isidentifier()]
        start = named[-1] if named else 0
        items = "".join(f"[{key!r}]" for key in path[start + bool(named) :])
        text = f"self.{path[start]}{items}" if named else f"model{items}"
        return text if is_python(text) else "leaf"  # the keys of a user's dict may be anything, and read as no code

    # --- values ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def facts(self) -> dict[int, Facts]:
        """What is known of the values of leaves that hold one array, as far as they can be read.

        Moments and the bodies of caches are left out: no rule asks for them.
        """
        untold = {number for number in self.of_type(nnx.OptState) if self.floating(number)}
        untold.update(number for number in self.of_type(nnx.Cache) if self.floating(number))
        return read({number: value for number, value in enumerate(self.values) if number not in untold})

    @functools.cached_property
    def broken(self) -> dict[int, str]:
        """The leaves that hold NaN (`"nan"`), or infinite elements beside finite ones (`"infinite"`).

        What is infinite throughout is meant so: a bound that does not bind, a best value before there is one.
        """
        facts = list(self.facts.items())
        several = {
            (number, at): array
            for number, value in enumerate(self.values)
            if isinstance(value, dict | list | tuple)
            for at, array in enumerate(arrays_of(value)[0])
        }
        facts += [(number, found) for (number, _), found in read(several).items()]
        broken: dict[int, str] = {}
        for number, found in facts:
            if found.nan or broken.get(number) == "nan":
                broken[number] = "nan"
            elif not (found.finite or found.infinite):
                broken[number] = "infinite"
        return broken

    # --- modules -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def nodes(self) -> tuple[tuple[Path, Any], ...]:
        """The modules, optimizers and metrics, each with the first path that reaches it."""
        root = self.objects if self.found.several else self.objects[0]
        return tuple(
            (named(tuple(path), self.names), node)
            for path, node in nnx.iter_graph(root)
            if isinstance(node, nnx.Pytree)
        )

    def below(self, path: Path) -> list[int]:
        """The leaves below a path."""
        return [number for number, other in enumerate(self.found.paths) if other[: len(path)] == path]

    def has(self, cls: type) -> bool:
        """Whether an object of this class, or of a subclass, is among the objects or in them."""
        return any(isinstance(made, type) and issubclass(made, cls) for made in self._made_of[0])

    def has_attribute(self, name: str) -> bool:
        """Whether any module has an attribute of this name."""
        return name in self._made_of[1]

    @functools.cached_property
    def _made_of(self) -> tuple[frozenset[Any], frozenset[Any]]:
        """The classes and the names of attributes in the graph: walking over the modules takes longer."""
        graph = self.found.graphdef
        return (
            frozenset(getattr(node, "type", None) for node in graph.nodes),
            frozenset(name for name, _ in graph.attributes),
        )

    @functools.cached_property
    def averages(self) -> frozenset[int]:
        """The leaves that are an `nnx.EMA`'s copies."""
        if not self.has(nnx.EMA):
            return frozenset()
        copies = {
            id(leaf)
            for _, node in self.nodes
            if isinstance(node, nnx.EMA)
            for leaf in jax.tree.leaves(node.params, is_leaf=compat.is_variable)
        }
        return frozenset(number for number, leaf in enumerate(self.found.leaves) if id(leaf) in copies)

    def statics(self, wanted: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
        """The attributes that are part of the graph, not of the state, and are wanted, each with a path."""
        values = {
            id(value): value
            for name, attribute in self.found.graphdef.attributes
            if (value := getattr(attribute, "value", None)) is not None and not str(name).startswith("_pytree__")
        }
        static = {key for key, value in values.items() if not isinstance(value, _PLAIN) and wanted(value)}
        for path, node in self.nodes if static else ():
            if isinstance(node, nnx.Optimizer):  # an optimizer's functions hold schedules and masks, which stay
                continue
            for name, value in vars(node).items():
                if id(value) in static:
                    yield (*path, name), value


_PLAIN = (bool, int, float, complex, str, bytes, type)
