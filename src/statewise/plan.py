"""The plan: kinds resolved against one model, each leaf in exactly one kind.

This is the only place that matches filters to leaves; everything after it reads plans.  A plan is all static:
the graph definition, one row for each leaf (path, kind, type, shapes and dtypes), and the optimizers.  It
holds no array, is hashable, and equal plans are one object, so that a state can carry its plan as the static
part of a pytree and JAX compares two of them by identity.

The rows come in the order of NNX's flat leaves.  A state groups arrays by kind; `spans` says which arrays of
which kind make up each leaf, and so how to go from one to the other.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from flax import nnx

from statewise import _compat
from statewise.claims import claim
from statewise.errors import KindError, StructureError
from statewise.kinds import Kind, Kinds, unknown_kind
from statewise.moments import Group, check_optimizers
from statewise.paths import Leaf, Path, format_path
from statewise.scan import ONE, Scan, Spec, arrays_of, make_leaf, raw_value, rebuild, row_of, scan, spec_of
from statewise.tables import Table, leaves_table

if TYPE_CHECKING:
    import statewise.state

__all__ = ["Plan", "Row", "make_plan", "plan"]

OPTIMIZER = "optimizer"


class Row(NamedTuple):
    """One leaf, static: what a plan knows of it.

    Attributes:
      path: its first path.
      kind: the name of its kind.
      type: the Variable's type, `jax.Array` for a raw array.
      specs: shape and dtype of each array in its value; one for nearly every leaf.
      structure: the structure of its value.
    """

    path: Path
    kind: str
    type: type
    specs: tuple[Spec, ...]
    structure: Any


class Span(NamedTuple):
    """Where a leaf's arrays stand within its kind's part of a state."""

    kind: str
    start: int
    stop: int
    structure: Any


def plan(*objects: Any, optimizers: Mapping[Any, Any] | None = None) -> Plan:
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


def make_plan(kinds: Kinds, objects: Sequence[Any], optimizers: Mapping[Any, Any] | None) -> Plan:
    """Resolves kinds against objects; see `Kinds.plan`."""
    found = scan(objects)
    if not found.leaves:
        names = ", ".join(type(thing).__name__ for thing in objects)
        raise StructureError(
            f"{names} has no leaves: no Variable and no array anywhere in it.",
            mend="assign the model's Variables before planning it",
        )
    claims = claim(kinds, found)
    found, claims, dropped = _drop_sown(kinds, found, claims)
    rows = _rows(found, claims)
    groups = check_optimizers(kinds, rows, optimizers or {})
    if groups and OPTIMIZER not in kinds:
        kinds = kinds | Kinds(**{OPTIMIZER: Kind(nnx.OptState)})
    return _intern(Plan(kinds, found.graphdef, rows, groups, len(objects), dropped))


def _rows(found: Scan, claims: Sequence[str]) -> tuple[Row, ...]:
    rows, wrong = [], []
    for path, leaf, kind in zip(found.paths, found.leaves, claims, strict=True):
        arrays, structure = arrays_of(raw_value(leaf))
        specs = tuple(map(spec_of, arrays))
        if None in specs:
            wrong.append(row_of(path, leaf, kind, note="holds " + _first_odd(arrays, specs)))
        rows.append(Row(path, kind, _compat.variable_type(leaf), specs, structure))  # type: ignore[arg-type]
    if wrong:
        raise StructureError(
            "Leaves that hold something else than arrays and numbers cannot be part of a state.",
            leaves=wrong,
            mend="keep it as a plain attribute of the module: self.name = value, without nnx.Variable or nnx.data",
        )
    return tuple(rows)


def _first_odd(arrays: Sequence[Any], specs: Sequence[Spec | None]) -> str:
    return type(next(array for array, spec in zip(arrays, specs, strict=True) if spec is None)).__name__


def is_sown(type_: type) -> bool:
    """Whether leaves of this type come from `sow`: they are new in every call, and no state keeps them."""
    return issubclass(type_, nnx.Intermediate) and not issubclass(type_, nnx.Perturbation)


def _drop_sown(kinds: Kinds, found: Scan, claims: list[str]) -> tuple[Scan, list[str], tuple[Leaf, ...]]:
    """Takes what an earlier `sow` left in the model out of the plan: a step would find it there, and add to it."""
    sown = [
        not kinds[kind].saved and is_sown(_compat.variable_type(leaf))
        for leaf, kind in zip(found.leaves, claims, strict=True)
    ]
    if not any(sown):
        return found, claims, ()
    dropped = tuple(
        row_of(path, leaf, kind)
        for path, leaf, kind, out in zip(found.paths, found.leaves, claims, sown, strict=True)
        if out
    )
    paths = frozenset(leaf.path for leaf in dropped)
    copies = rebuild(found.graphdef, [raw_value(leaf) for leaf in found.leaves], found.several)
    nnx.pop(copies if found.several else copies[0], lambda path, _: tuple(path) in paths)
    return scan(copies), [kind for kind, out in zip(claims, sown, strict=True) if not out], dropped


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
        aliases = _aliases(self)
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

    def put(self, state: statewise.state.State, *objects: Any, copy: bool = True) -> None:
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

    def build(self, state: statewise.state.State, *, copy: bool = True) -> Any:
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
        names: dict[str, int] = {}
        keys = []
        for kind, leaves in self._row_of_array.items():
            for leaf in leaves:
                name = f"{kind}/{format_path(leaf.path)}"
                names[name] = names.get(name, 0) + 1
                keys.append(jax.tree_util.DictKey(name if names[name] == 1 else f"{name}#{names[name]}"))
        return tuple(keys)

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
        return _intern(Plan(self.kinds, self._graphdef, tuple(rows), groups, self._objects, self.dropped))


def _aliases(plan: Plan) -> dict[Path, tuple[Path, ...]]:
    """The other paths of each leaf that has several: its own, and those of modules that are shared above it."""
    objects = rebuild(plan._graphdef, [None] * len(plan._rows), plan._several)
    found_twice = nnx.find_duplicates(objects if plan._several else objects[0])
    shared = [paths for paths in ([tuple(path) for path in group] for group in found_twice) if not _cyclic(paths)]
    if not shared:
        return {}
    found: dict[Path, tuple[Path, ...]] = {}
    for row in plan._rows:
        ways = {row.path}
        grew = True
        while grew:  # a shared leaf inside a shared module has the product of their paths
            more = {
                other + way[len(prefix) :]
                for way in ways
                for paths in shared
                for prefix in paths
                if way[: len(prefix)] == prefix
                for other in paths
            }
            grew = not more <= ways
            ways |= more
        if len(ways) > 1:
            found[row.path] = tuple(sorted(ways - {row.path}, key=lambda path: [str(key) for key in path]))
    return found


def _cyclic(paths: Sequence[Path]) -> bool:
    """Whether an object can be reached from itself (a child that knows its parent): paths without end."""
    return any(one != other and other[: len(one)] == one for one in paths for other in paths)


# --- equal plans are one object --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Identity:
    """What makes two plans equal.  Graph definitions are compared, never hashed: metadata may not be hashable."""

    kinds: Kinds
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    graphdef: Any

    def __hash__(self) -> int:
        return hash((self.kinds, self.groups, tuple(row.path for row in self.rows)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Identity)
            and self.kinds == other.kinds
            and self.groups == other.groups
            and self.rows == other.rows
            and _same_graph(self.graphdef, other.graphdef)
        )


def _same_graph(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, TypeError):
        # Metadata that holds arrays cannot be compared; two such plans are simply two.
        return one is other


_plans: weakref.WeakValueDictionary[_Identity, Plan] = weakref.WeakValueDictionary()
_plans_lock = threading.Lock()


def _intern(plan: Plan) -> Plan:
    identity = _Identity(plan.kinds, plan._rows, plan._groups, plan._graphdef)
    with _plans_lock:
        return _plans.setdefault(identity, plan)
