"""The plan: kinds resolved against one model, each leaf in exactly one kind.

This is the only place that matches filters to leaves; everything after it reads plans.  A plan is all static:
the graph definition, one row for each leaf (path, kind, type, shapes and dtypes), and the optimizers.  It
holds no array, is hashable, and equal plans are one object, so that a state can carry its plan as the static
part of a pytree and JAX compares two of them by identity.

The rows come in the order of NNX's flat leaves.  A state groups arrays by kind; `spans` says which arrays of
which kind make up each leaf, and so how to go from one to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from statewise.aliases import aliases_of
from statewise.claims import claim
from statewise.errors import KindError, StructureError
from statewise.intern import intern
from statewise.kinds import Kind, Kinds, unknown_kind
from statewise.moments import Group, check_optimizers
from statewise.paths import Leaf, format_path
from statewise.rows import Row, Span, drop_sown, rows_of
from statewise.scan import ONE, Spec, make_leaf, scan
from statewise.tables import Table, leaves_table

if TYPE_CHECKING:
    import statewise.state

__all__ = ["Plan", "make_plan", "plan"]

OPTIMIZER = "optimizer"


def plan(*objects: Any, optimizers: Mapping[Any, Any] | Any = None) -> Plan:
    """Plans a model by the standard kinds: `Kinds.standard().plan(...)`.

    Args:
      *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
      optimizers: from a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.

    Returns:
      the plan.

    Raises:
      ContestedError: leaves that two of the standard kinds claim (a type that derives from both).
      KindError: optimizers for a kind that is not there, frozen, empty, claimed twice, or not made of floats.
      StructureError: no objects, no leaves, a class instead of an instance.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> [(leaf.kind, sw.format_path(leaf.path)) for leaf in sw.plan(model).leaves]
      [('params', 'bias'), ('stats', 'mean'), ('params', 'scale'), ('stats', 'var')]
    """
    return make_plan(Kinds.standard(), objects, optimizers)


def make_plan(kinds: Kinds, objects: Sequence[Any], optimizers: Mapping[Any, Any] | Any) -> Plan:
    """Resolves kinds against objects; see `Kinds.plan`."""
    _check_keys(optimizers)
    found = scan(objects)
    if () in found.paths:
        name = type(objects[0]).__name__
        raise StructureError(
            f"Object 0 is a {name} on its own, which has no path.",
            mend=f"put it into a dict: {{'{name.lower()}': ...}}",
        )
    if not found.leaves:
        names = " and ".join(type(thing).__name__ for thing in objects)
        raise StructureError(
            f"There are no leaves: no Variable and no array anywhere in {names}.",
            mend="assign the model's Variables before planning it",
        )
    claims = claim(kinds, found)
    found, claims, dropped = drop_sown(kinds, objects, found, claims)
    if not found.leaves:
        raise StructureError(
            "There are no leaves but those that an earlier `sow` left.",
            leaves=dropped,
            mend="assign the model's Variables before planning it",
        )
    rows = rows_of(found, claims)
    groups = check_optimizers(kinds, rows, optimizers or {})
    if groups and OPTIMIZER not in kinds:
        kinds = kinds | Kinds(**{OPTIMIZER: Kind(nnx.OptState)})
    return intern(Plan(kinds, found.graphdef, rows, groups, len(objects), dropped))


def _check_keys(optimizers: Any) -> None:
    mend = "optimizers={'params': optax.adamw(3e-4)}"
    if optimizers is not None and not isinstance(optimizers, Mapping):
        raise KindError(f"optimizers={type(optimizers).__name__}(...) does not say which kinds it updates.", mend=mend)
    for key in optimizers or ():
        if not all(isinstance(name, str) for name in (key if isinstance(key, tuple) else (key,))):
            raise KindError(f"{key!r} names no kind, and is no tuple of names.", mend=mend)


class Plan:
    """Kinds and optimizers resolved against one model: each leaf in exactly one kind.

    Made by `Kinds.plan` or `statewise.plan`.  Static, hashable, without arrays; equal plans are one object.

    Attributes:
      kinds: the declaration, with the kind `optimizer` added where the plan has optimizers.
      leaves: one `Leaf` for each leaf of the model, then one for each array of optimizer state.
      dropped: leaves that an earlier `sow` left in the model and that are no part of a state.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> plan is sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
      True
      >>> [str(leaf) for leaf in plan["params"]]
      ['bias: Param(3,) float32  kind=params', 'kernel: Param(2, 3) float32  kind=params']
    """

    def __init__(
        self,
        kinds: Kinds,
        graphdef: Any,
        rows: tuple[Row, ...],
        groups: tuple[Group, ...],
        objects: int,
        dropped: tuple[Leaf, ...] = (),
    ) -> None:
        self.kinds = kinds
        self.dropped = dropped
        self._graphdef = graphdef
        self._rows = rows
        self._groups = groups
        self._objects = objects
        self._several = objects > 1

    # --- looking ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The rows, as data: path, kind, type, shape, dtype, aliases, elements, bytes."""
        aliases = aliases_of(self._graphdef, [row.path for row in self._rows], self._several)
        mine = [
            make_leaf(row.path, row.type, row.specs, row.structure is ONE, row.kind, aliases.get(row.path, ()))
            for row in self._rows
        ]
        moments = [
            make_leaf((OPTIMIZER, group.label, *path), jax.Array, [spec], True, OPTIMIZER)
            for group in self._groups
            for path, spec in zip(group.layout.paths, group.layout.specs, strict=True)
        ]
        return tuple(mine + moments)

    def __getitem__(self, kind: str) -> tuple[Leaf, ...]:
        if kind not in self.kinds:
            raise unknown_kind(kind, self.kinds)
        return tuple(leaf for leaf in self.leaves if leaf.kind == kind)

    def __contains__(self, kind: object) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Any:
        return iter(self.kinds)

    @property
    def optimizers(self) -> dict[tuple[str, ...], Any]:
        """The optimizers, by the kinds that each updates."""
        return {group.kinds: group.tx for group in self._groups}

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}={len(specs)}" for kind, specs in self._specs.items() if specs)
        return f"Plan({counts})"

    def table(self) -> Table:
        """The plan as a table: one line for each leaf."""
        return leaves_table("plan", self.leaves, self.kinds)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    # Identity is equality: `make_plan` gives out one object for equal plans.

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __copy__(self) -> Plan:
        return self

    # --- making states ---------------------------------------------------------------------------------------

    def take(self, *objects: Any, mesh: Any = None, copy: bool = True) -> statewise.state.State:
        """Takes the arrays out of the objects into a state.

        Args:
          *objects: the objects that were planned, or others of the same structure, shapes and dtypes.
          mesh: not part of this version.
          copy: copies each array, so that the objects stay usable.  False shares the arrays until a step donates
            them, for models that fill the device; two leaves that share one array are told apart all the same.

        Returns:
          a state of this plan, with fresh optimizer state.

        Raises:
          StructureError: the objects are not what was planned; every difference is listed.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(model).take(model)
          >>> state["params"]["kernel"].shape
          (2, 3)
        """
        from statewise.exchange import take

        return take(self, objects, mesh=mesh, copy=copy)

    def put(self, state: statewise.state.State | Any, *objects: Any, copy: bool = True) -> None:
        """Puts a state's arrays back into the objects.

        Args:
          state: a state of this plan.
          *objects: the objects that were planned, or others of the same structure.
          copy: copies each array, so that a later step, which donates the state's, leaves the objects whole.

        Raises:
          StructureError: another plan's state, a spent one, or objects that do not fit; nothing was put then.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.put(plan.take(model), model)
        """
        from statewise.exchange import put

        put(self, state, objects, copy=copy)

    def build(self, state: statewise.state.State | Any, *, copy: bool = True) -> Any:
        """Makes new objects with a state's arrays.

        Args:
          state: a state of this plan.
          copy: copies each array, so that a later step leaves the objects whole.

        Returns:
          the object, or a tuple of them where several were planned.

        Raises:
          StructureError: another plan's state, or a spent one.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.build(plan.take(model)).kernel.shape
          (2, 3)
        """
        from statewise.exchange import build

        return build(self, state, copy=copy)

    def abstract(self) -> statewise.state.State:
        """A state of this plan that holds shapes and dtypes instead of arrays.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).abstract()["params"]["kernel"]
          ShapeDtypeStruct(shape=(2, 3), dtype=float32)
        """
        from statewise.state import State

        return State.of(
            self, [[jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in part] for part in self._specs.values()]
        )

    def axes(self, **kinds: Any) -> statewise.state.State:
        """A state of axes instead of arrays, as `jax.vmap` takes it for `in_axes` and `out_axes`.

        Args:
          **kinds: the mapped axis of each kind's arrays, or None; kinds that are not named are not mapped.

        Raises:
          KindError: a kind that is not there.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
          >>> plan.axes(stats=0)["stats"]["mean"]
          0
        """
        from statewise.state import State

        for kind, axis in kinds.items():
            if kind not in self.kinds:
                raise unknown_kind(kind, self.kinds)
            if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
                raise KindError(f"{kind}={axis!r} is no axis.", kind=kind, mend=f"plan.axes({kind}=0)")
        return State.of(self, [[kinds.get(kind)] * len(part) for kind, part in self._specs.items()])

    # --- the static tables that states and steps read ----------------------------------------------------------

    @functools.cached_property
    def _specs(self) -> dict[str, tuple[Spec, ...]]:
        """Shape and dtype of each array of each kind's part, in the order in which a state holds them."""
        parts: dict[str, list[Spec]] = {kind: [] for kind in self.kinds}
        for row in self._rows:
            parts[row.kind].extend(row.specs)
        for group in self._groups:
            parts[OPTIMIZER].extend(group.layout.specs)
        return {kind: tuple(part) for kind, part in parts.items()}

    @functools.cached_property
    def _spans(self) -> tuple[Span, ...]:
        """For each row, in order, where its arrays stand in its kind's part."""
        used = dict.fromkeys(self.kinds, 0)
        spans = []
        for row in self._rows:
            start = used[row.kind]
            used[row.kind] = start + len(row.specs)
            spans.append(Span(row.kind, start, used[row.kind], row.structure))
        return tuple(spans)

    @functools.cached_property
    def _moment_spans(self) -> tuple[tuple[int, int], ...]:
        """For each optimizer, where its state's arrays stand in the part of kind `optimizer`."""
        start = sum(len(row.specs) for row in self._rows if row.kind == OPTIMIZER)
        spans = []
        for group in self._groups:
            spans.append((start, start + len(group.layout.specs)))
            start = spans[-1][1]
        return tuple(spans)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        """The position of each kind."""
        return {kind: position for position, kind in enumerate(self.kinds)}

    @functools.cached_property
    def _sizes(self) -> tuple[int, ...]:
        """How many arrays each kind's part has."""
        return tuple(map(len, self._specs.values()))

    @functools.cached_property
    def _keys(self) -> tuple[Any, ...]:
        """A key for each array of a state as a pytree: kind and path, made unique where paths only look alike."""
        moments = {leaf.path for leaf in self.leaves[len(self._rows) :]}
        names: dict[str, None] = {}
        for kind, leaves in self._row_of_array.items():
            for leaf in leaves:
                # The paths of optimizer state say already whose it is.
                path = leaf.path if leaf.path in moments else (kind, *leaf.path)
                name = plain = format_path(path)
                again = 1
                while name in names:
                    again += 1
                    name = f"{plain}#{again}"
                names[name] = None
        return tuple(map(jax.tree_util.DictKey, names))

    @functools.cached_property
    def _row_of_array(self) -> dict[str, list[Leaf]]:
        """For each kind, the leaf that each array of its part belongs to."""
        rows: dict[str, list[Leaf]] = {kind: [] for kind in self.kinds}
        arrays = [len(row.specs) for row in self._rows] + [1] * (len(self.leaves) - len(self._rows))
        for leaf, count in zip(self.leaves, arrays, strict=True):
            rows[leaf.kind or ""].extend([leaf] * count)
        return rows

    def _with_specs(self, specs: Mapping[str, Sequence[Spec]]) -> Plan:
        """This plan with other shapes or dtypes in the rows of the model."""
        rows = [
            row._replace(specs=tuple(specs[span.kind][span.start : span.stop])) if span.kind in specs else row
            for row, span in zip(self._rows, self._spans, strict=True)
        ]
        groups = tuple(
            group.with_specs(specs[OPTIMIZER][start:stop]) if OPTIMIZER in specs else group
            for group, (start, stop) in zip(self._groups, self._moment_spans, strict=True)
        )
        return intern(Plan(self.kinds, self._graphdef, tuple(rows), groups, self._objects, self.dropped))
