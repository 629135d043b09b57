"""The subject of lint: objects, their leaves by kind, and the values that can be read.

However a model is passed (an object, several, a plan, a state), rules see it the same way.  Anything that takes time
is computed when the first rule needs it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.ties import aliases_of
from statewise._src.core.batches import check_not_batch
from statewise._src.core.model_io import build
from statewise._src.core.plan import Plan, State, tables_in, tables_of
from statewise._src.core.state_data import StateData, check_not_donated
from statewise._src.core.templates import abstract
from statewise._src.filters.explain import is_python
from statewise._src.inspect.lint.read_values import Facts, is_readable, read
from statewise._src.inspect.select.select import chosen_kinds, objects_of
from statewise._src.plan.kind import Kind
from statewise._src.plan.match import claim, claimants
from statewise._src.plan.spelled_paths import Reading
from statewise._src.plan.tables import PlanTables
from statewise._src.step.definition import Definition
from statewise.errors import DeclarationError, OverlapError, UnclaimedError

__all__ = ["Subject", "subject_of"]


def subject_of(
    objects: Sequence[object],
    kinds: object,
    decode_length: int | None,
    names: tuple[str, ...] = (),
    steps: tuple[Definition, ...] = (),
) -> Subject:
    """Makes a subject of the arguments of `sw.lint`.

    Raises:
      DeclarationError: `kinds` is not a `Kinds`, or is passed beside a plan or a state.
      StructureError: an object is not a model; a donated state.
    """
    if len(objects) == 1 and not names:
        objects = objects_of(objects[0])
    planned = next((item for item in objects if isinstance(item, Plan | State)), None)
    if planned is not None and len(objects) > 1:
        raise ModelError(
            f"A {type(planned).__name__.lower()} is inspected alone: it contains all of its objects.",
            hint="sw.lint(plan)",
        )
    declared = chosen_kinds(kinds, tables_in(planned), "sw.lint(model, kinds=kinds)")
    if planned is None:
        return Subject(tuple(objects), declared, kinds is not None, None, decode_length, names, steps)
    state: StateData = planned if isinstance(planned, State) else abstract(tables_of(planned))
    plan = state.tables
    check_not_batch(state)
    if plan.per_device:
        state = _first_of_each(state)
    # Rules look at objects, whatever was passed; no array is copied for them.
    built = build(state.tables, state, copy=False)
    objects = built if plan.object_count > 1 else (built,)
    return Subject(objects, declared, True, plan, decode_length, plan.names, steps)


def _first_of_each(state: StateData) -> StateData:
    """Returns a state with one value of each leaf: of a value per device, that of the first device in this process."""
    plan, plain = state.tables, state.tables.plain
    check_not_donated(state, plan.kinds)
    arrays = {kind: plan.unpack(kind, state.part(kind).arrays) for kind in plan.kinds}
    return StateData.of(plain, [list(map(_first, arrays[kind], specs)) for kind, specs in plain.specs.items()])


def _first(array: Any, spec: ArraySpec) -> Any:
    if array.shape == spec.shape:
        return array
    if not is_readable(array):
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    return array.addressable_shards[0].data[0]


@dataclasses.dataclass(eq=False)
class Subject:
    """The subject that rules inspect.

    Attributes:
      objects: the objects; those of a plan are abstract.
      kinds: the kinds.
      declared: whether the kinds were chosen by the user: they were passed, or are those of a plan.
      plan: the plan, if there is one.
      decode_length: the number of tokens to decode, if it is known.
      names: the objects' names, if they have any.
      steps: the steps that run on them, as they are defined.
      ensemble: a state of an ensemble, for the rules that compare its members; those of one model then do not apply.
    """

    objects: tuple[object, ...]
    kinds: Mapping[str, Kind]
    declared: bool
    plan: PlanTables | None
    decode_length: int | None
    names: tuple[str, ...] = ()
    steps: tuple[Definition, ...] = ()
    ensemble: State | None = None
    trainings: list[Any] | None = None  # the result of `training.trainings`, once it has been called

    # --- leaves ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def graph(self) -> ModelGraph:
        """Returns the objects, flattened; for a plan, with the leaves that the plan knows."""
        graph = read_graph(self.objects, self.names)
        if self.plan is None:
            return graph
        # In abstract objects, NNX treats shapes in containers (a tuple of raw arrays) as static.
        known = dict(zip(graph.paths, graph.leaves, strict=True))
        paths = tuple(row.path for row in self.plan.rows)
        leaves = tuple(
            known[row.path] if row.path in known else jax.ShapeDtypeStruct(row.specs[0].shape, row.specs[0].dtype)
            for row in self.plan.rows
        )
        return ModelGraph(self.plan.graphdef, paths, leaves, self.plan.several, self.names)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Returns the path of each leaf."""
        return self.graph.paths

    @functools.cached_property
    def types(self) -> tuple[type, ...]:
        """Returns the type of each leaf."""
        return tuple(map(compat.variable_type, self.graph.leaves))

    @functools.cached_property
    def values(self) -> tuple[Any, ...]:
        """Returns the value of each leaf."""
        return tuple(map(raw_value, self.graph.leaves))

    @functools.cached_property
    def arrays(self) -> tuple[tuple[int, Any], ...]:
        """Returns all arrays in the values, each with the number of its leaf."""
        return tuple((number, array) for number, value in enumerate(self.values) for array in arrays_of(value)[0])

    @functools.cached_property
    def position(self) -> dict[Path, int]:
        """Returns the number of the leaf at each path."""
        return {path: number for number, path in enumerate(self.paths)}

    @functools.cached_property
    def _claims(self) -> tuple[list[str | None], OverlapError | UnclaimedError | DeclarationError | None]:
        try:
            # A plan's kinds fit its leaves, but the leaves that an earlier `sow` left, which the plan excludes, may be
            # all that a path in them matches.
            return list(claim(self.kinds, self.graph, check_paths=self.plan is None)), None
        except (OverlapError, UnclaimedError, DeclarationError) as error:
            claims_of, ways = claimants(self.kinds), self.graph.ways
            claims = [claims_of(ways(path), leaf) for path, leaf in zip(self.paths, self.graph.leaves, strict=True)]
            return [names[0] if len(names) == 1 else None for names in claims], error

    @property
    def claims(self) -> list[str | None]:
        """Returns the name of each leaf's kind; None if no kind, or more than one, claims it."""
        return self._claims[0]

    @property
    def refusal(self) -> OverlapError | UnclaimedError | DeclarationError | None:
        """Returns the reason why the kinds do not fit the leaves, if they do not."""
        return self._claims[1]

    def kind(self, number: int) -> Kind | None:
        """Returns a leaf's kind; None if no kind, or more than one, claims it."""
        name = self.claims[number]
        return None if name is None else self.kinds[name]

    def is_frozen(self, number: int) -> bool:
        """Returns whether a leaf's kind is frozen."""
        kind = self.kind(number)
        return kind is not None and kind.frozen

    @functools.cached_property
    def aliases(self) -> dict[Path, tuple[Path, ...]]:
        """Returns the other paths of leaves that several paths reach."""
        return aliases_of(self.graph.graphdef, self.paths, self.graph.several, self.graph.names)

    @functools.cached_property
    def reading(self) -> Reading:
        """Returns the leaves as seen by filters that look at paths."""
        return Reading(self.graph, self.aliases)

    def row(self, number: int, note: str = "") -> Leaf:
        """Returns a leaf as data."""
        path = self.paths[number]
        row = row_of(path, self.graph.leaves[number], self.claims[number], note=note)
        return dataclasses.replace(row, aliases=self.aliases.get(path, ()))

    def rows(self, numbers: Iterable[int]) -> tuple[Leaf, ...]:
        """Returns leaves as data."""
        return tuple(map(self.row, numbers))

    def repeats(self, groups: Iterable[Sequence[int]], note: str) -> tuple[Leaf, ...]:
        """Returns all but the first leaf of each group as data; `{}` in the note is the path of the first."""
        return tuple(
            self.row(number, note=note.format(format_path(self.paths[first])))
            for first, *others in groups
            for number in others
        )

    def of_type(self, *types: type) -> list[int]:
        """Returns the leaves whose type is one of these, or a subclass."""
        known = {cls: issubclass(cls, types) for cls in set(self.types)}
        return [number for number, cls in enumerate(self.types) if known[cls]]

    def dtype(self, number: int) -> Any:
        """Returns the dtype of a leaf that holds one array; None for any other."""
        return getattr(self.values[number], "dtype", None)

    def is_inexact(self, number: int) -> bool:
        """Returns whether a leaf holds one array of floating-point or complex numbers, or anything but one array."""
        dtype = self.dtype(number)
        return dtype is None or jnp.issubdtype(dtype, jnp.inexact)

    def is_floating(self, number: int) -> bool:
        """Returns whether a leaf holds one array of floating-point numbers."""
        dtype = self.dtype(number)
        return dtype is not None and jnp.issubdtype(dtype, jnp.floating)

    def name(self, number: int) -> str:
        """Returns the last key of a leaf's path."""
        return str(self.paths[number][-1])

    def target(self, number: int) -> str:
        """Returns the code for a leaf on the left of an assignment, inside its module: `self.kernel`, `self.w[0]`."""
        path = self.graph.relative(self.paths[number])
        # The attribute is the last key that can be one; the keys after it are items.
        start = max(
            (index for index, key in enumerate(path) if isinstance(key, str) and key.isidentifier()), default=-1
        )
        items = "".join(f"[{key!r}]" for key in path[start + 1 :])
        text = f"self.{path[start]}{items}" if start >= 0 else f"model{items}"
        return text if is_python(text) else "leaf"  # a key of a user's dict may be anything, whatever its repr

    # --- values ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def facts(self) -> dict[int, Facts]:
        """Returns the known facts about the values of leaves that hold one array, if they can be read.

        Moments and the contents of caches are excluded: no rule needs them.
        """
        excluded = set(filter(self.is_floating, self.of_type(nnx.OptState, nnx.Cache)))
        return read({number: value for number, value in enumerate(self.values) if number not in excluded})

    def small_value(self, number: int | None) -> np.ndarray | None:
        """Returns the value of a leaf if it is one small array that can be read; None for no leaf."""
        facts = None if number is None else self.facts.get(number)
        return None if facts is None else facts.value

    def is_zero(self, number: int) -> bool:
        """Returns whether a leaf is known to be all zeros."""
        facts = self.facts.get(number)
        return facts is not None and facts.zero

    @functools.cached_property
    def broken(self) -> dict[int, str]:
        """Returns the leaves that contain NaN (`"nan"`), or infinite elements beside finite ones (`"infinite"`).

        An array that is infinite throughout is intended: a bound without effect, a best value before there is one.
        """
        # A leaf with several arrays has no facts of its own: each array has.
        several = {
            (number, index): array
            for index, (number, array) in enumerate(self.arrays)
            if isinstance(self.values[number], dict | list | tuple)
        }
        facts_of = [*self.facts.items(), *((number, facts) for (number, _), facts in read(several).items())]
        broken: dict[int, str] = {}
        for number, facts in facts_of:
            if facts.nan or broken.get(number) == "nan":
                broken[number] = "nan"
            elif not (facts.finite or facts.infinite):
                broken[number] = "infinite"
        return broken

    # --- modules -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def nodes(self) -> tuple[tuple[Path, Any], ...]:
        """Returns the modules, optimizers and metrics, each with the first path that reaches it."""
        nodes = nnx.iter_graph(self.objects if self.graph.several else self.objects[0], graph=True)
        return tuple((named(tuple(path), self.names), node) for path, node in nodes if isinstance(node, nnx.Pytree))

    @functools.cached_property
    def _classes(self) -> frozenset[Any]:
        return frozenset(getattr(node, "type", None) for node in self.graph.graphdef.nodes)

    def nodes_of(self, cls: type) -> list[tuple[Path, Any]]:
        """Returns the objects of a class, or of a subclass, each with the first path that reaches it."""
        # The graph definition lists the classes; walking over the modules takes longer.
        if not any(isinstance(known, type) and issubclass(known, cls) for known in self._classes):
            return []
        return [(path, node) for path, node in self.nodes if isinstance(node, cls)]

    @functools.cached_property
    def _attributes(self) -> frozenset[Any]:
        return frozenset(name for name, _ in self.graph.graphdef.attributes)

    def values_of_attribute(self, name: str) -> dict[Path, Any]:
        """Returns the values of an attribute, by the path of each module that has it."""
        if name not in self._attributes:
            return {}
        return {path: vars(node)[name] for path, node in self.nodes if name in vars(node)}

    def below(self, path: Path) -> list[int]:
        """Returns the leaves below a path."""
        return [number for number, other in enumerate(self.paths) if other[: len(path)] == path]

    @functools.cached_property
    def averages(self) -> frozenset[int]:
        """Returns the leaves that are the copies of an `nnx.EMA`."""
        averages = self.nodes_of(nnx.EMA)
        copies = {id(leaf) for _, ema in averages for leaf in jax.tree.leaves(ema.params, is_leaf=compat.is_variable)}
        return frozenset(number for number, leaf in enumerate(self.graph.leaves) if id(leaf) in copies)

    def statics(self, wanted: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
        """Yields the wanted attributes that are part of the graph, not of the state, each with a path."""
        values = {
            id(value): value
            for name, attribute in self.graph.graphdef.attributes
            if (value := getattr(attribute, "value", None)) is not None and not str(name).startswith("_pytree__")
        }
        static = {key for key, value in values.items() if not isinstance(value, _PLAIN) and wanted(value)}
        for path, node in self.nodes if static else ():
            if isinstance(node, nnx.Optimizer):  # an optimizer's functions contain schedules and masks, which is fine
                continue
            for name, value in vars(node).items():
                if id(value) in static:
                    yield (*path, name), value


_PLAIN = (bool, int, float, complex, str, bytes, type)
