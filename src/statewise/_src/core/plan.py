"""The plan: kinds resolved against one model, each leaf in exactly one kind.

Everything after it reads plans.  A plan is all static: the graph definition, one row for each leaf (path, kind, type,
shapes and dtypes), and the optimizers.  It holds no array, is hashable, and equal plans are one object, so that JAX
compares the static parts of two states by identity.  The rows come in the order of NNX's flat leaves; a state groups
arrays by kind, and `spans` says which arrays of which kind make up each leaf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from statewise._src.common.nnx_graph import scan
from statewise._src.common.object_names import check_name, given, in_order
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import Shown, Table, leaves_table
from statewise._src.core.kinds import Kinds
from statewise._src.plan.averages import check_averages
from statewise._src.plan.derived import Derived
from statewise._src.plan.ema import EMA
from statewise._src.plan.intern import intern
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.leaf_specs import Row, drop_sown, rows_of
from statewise._src.plan.match import claim
from statewise._src.plan.members import Members
from statewise._src.plan.optimizer_state import check_optimizers
from statewise._src.plan.packing import Packing
from statewise._src.plan.per_device import Copies
from statewise._src.plan.tables import OPTIMIZER
from statewise._src.plan.variants import Variants
from statewise.errors import DeclarationError, StructureError

if TYPE_CHECKING:
    import statewise._src.core.state

__all__ = ["Plan", "make_plan", "plan"]


def plan(
    *objects: Any, optimizers: Mapping[Any, Any] | Any = None, averages: Mapping[Any, Any] | Any = None, **named: Any
) -> Plan:
    """Plans a model by the standard kinds: `Kinds.standard().plan(...)`.

    Args:
      *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
      optimizers: from a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.
      averages: from a kind, or a tuple of kinds, to an `sw.EMA`, or a list of them.
      **named: the objects by name, instead of by position: paths then begin with the name.

    Returns:
      the plan.

    Raises:
      OverlapError: leaves that two of the standard kinds claim (a type that derives from both).
      DeclarationError: optimizers or averages for a kind that is not there, frozen, empty, or not made of floats; two
        optimizers for one kind, two averages of one name.
      StructureError: no objects, no leaves, a class instead of an instance.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> [(leaf.kind, sw.format_path(leaf.path)) for leaf in sw.plan(model).leaves]
      [('params', 'bias'), ('stats', 'mean'), ('params', 'scale'), ('stats', 'var')]
    """
    return make_plan(Kinds.standard(), objects, optimizers, averages, named)


def make_plan(
    kinds: Kinds,
    objects: Sequence[Any],
    optimizers: Any,
    averages: Any = None,
    named: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """Resolves kinds against objects; see `Kinds.plan`."""
    _check_keys("optimizers", optimizers, "updates", "{'params': optax.adamw(3e-4)}")
    _check_keys("averages", averages, "is of", "{'params': sw.EMA(0.999)}")
    objects, names = given(objects, named, "kinds.plan")
    found = scan(objects, names)
    if () in found.paths:
        name = type(objects[0]).__name__
        raise StructureError(
            f"Object 0 is a {name} on its own, which has no path.",
            hint=f"put it into a dict: {{'{name.lower()}': ...}}",
        )
    if not found.leaves:
        types = " and ".join(type(thing).__name__ for thing in objects)
        raise StructureError(
            f"There are no leaves: no Variable and no array anywhere in {types}.",
            hint="assign the model's Variables before planning it",
        )
    claims = claim(kinds, found)
    found, claims, dropped = drop_sown(kinds, objects, found, claims)
    if not found.leaves:
        raise StructureError(
            "There are no leaves but those that an earlier `sow` left.",
            leaves=dropped,
            hint="assign the model's Variables before planning it",
        )
    rows = rows_of(found, claims)
    groups = check_optimizers(kinds, rows, optimizers or {})
    if groups and OPTIMIZER not in kinds:
        kinds = kinds | Kinds(**{OPTIMIZER: Kind(nnx.OptState)})
    kinds, shadows = check_averages(kinds, rows, averages or {})
    return intern(Plan(kinds, found.graphdef, rows, (*groups, *shadows), len(objects), dropped, names=names))


def _check_keys(what: str, asked: Any, does: str, example: str) -> None:
    hint = f"{what}={example}"
    if asked is not None and not isinstance(asked, Mapping):
        if isinstance(asked, nnx.Pytree):
            check_name(what)
        raise DeclarationError(f"{what}={type(asked).__name__}(...) does not say which kinds it {does}.", hint=hint)
    for key in asked or ():
        if not all(isinstance(name, str) for name in (key if isinstance(key, tuple) else (key,))):
            raise DeclarationError(f"{key!r} names no kind, and is no tuple of names.", hint=hint)


class Plan(Variants, Shown):
    """Kinds and optimizers resolved against one model: each leaf in exactly one kind.

    Made by `Kinds.plan` or `statewise._src.core.plan`.  Static, hashable, without arrays; equal plans are one object.

    Attributes:
      kinds: the declaration, with the kind `optimizer` added where there are optimizers, and a kind for each average.
      leaves: one `Leaf` for each leaf of the model, then one for each array of optimizer state, then of averages.
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
        derived: tuple[Derived, ...],
        objects: int,
        dropped: tuple[Leaf, ...] = (),
        packing: Mapping[str, Packing] | None = None,
        copies: Copies | None = None,
        members: Members | None = None,
        names: tuple[str, ...] = (),
    ) -> None:
        self.kinds = kinds
        self.excluded = dropped
        self._graphdef = graphdef
        self._rows = rows
        self._derived = derived
        self._objects = objects
        self._several = objects > 1 or bool(names)
        self._names = names
        self._packing = dict(packing or {})
        self._copies = copies
        self._members = members

    # --- looking ---------------------------------------------------------------------------------------------

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

    @property
    def averages(self) -> dict[tuple[str, ...], tuple[EMA, ...]]:
        """The averages, by the kinds that each is of."""
        kinds: dict[EMA, tuple[str, ...]] = {}
        for one in self._averages:
            kinds[one.ema] = (*kinds.get(one.ema, ()), one.kind)
        return {of: tuple(ema for ema, other in kinds.items() if other == of) for of in kinds.values()}

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}={len(specs)}" for kind, specs in self._specs.items() if specs)
        return f"Plan({'' if self.members is None else f'an ensemble of {self.members}: '}{counts})"

    def table(self) -> Table:
        """The plan as a table: one line for each leaf."""
        title = "plan" if self.members is None else f"plan of an ensemble of {self.members}"
        return leaves_table(title, self.leaves, self.kinds)

    # Identity is equality: `make_plan` gives out one object for equal plans.

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __copy__(self) -> Plan:
        return self

    # --- making states ---------------------------------------------------------------------------------------

    def take(
        self, /, *objects: Any, mesh: Any = None, copy: bool = True, pack: Any = False, **named: Any
    ) -> statewise._src.core.state.State:
        """Takes the arrays out of the objects into a state.

        Args:
          *objects: the objects that were planned, or others of the same structure, shapes and dtypes.
          mesh: puts each array where its kind's placement has it on this mesh, as `shardings` says.
          copy: copies each array, so that the objects stay usable.  False shares the arrays until a step donates
            them, for models that fill the device; two leaves that share one array are told apart all the same.
          pack: experimental: small arrays travel as few buffers, which is what `jax.tree.map` then sees, and steps are
            several times as fast; True for all kinds, or the names of some.
          **named: the objects by name instead of by position, where they were planned so.

        Returns:
          a state of this plan, with fresh optimizer state; if packed, `state.plan` says so and `plan.put` takes it.

        Raises:
          StructureError: objects that are not what was planned (all is listed); numbers that JAX would lose.
          DeclarationError: `pack` names a kind that is not there.
          PlacementError: leaves that cannot be placed on the mesh, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(model).take(model)
          >>> state["params"]["kernel"].shape
          (2, 3)
        """
        from statewise._src.core.model_io import take

        return take(self, in_order(self._names, objects, named, "take"), mesh=mesh, copy=copy, pack=pack)

    def init(self, make_model: Any, mesh: Any) -> statewise._src.core.state.State:
        """Makes a model's state where it is to lie, inside `jax.jit`: no device ever holds a full copy.

        Args:
          make_model: a function without arguments that makes what was planned (a tuple of several objects, or a dict by
            their names); it is traced, so its arrays must stand in `nnx.Variable`s.
          mesh: the mesh.

        Returns:
          what `plan.take(make_model(), mesh=mesh)` does, but for the last bit where XLA rounds otherwise.

        Raises:
          StructureError: what it makes is not what was planned; every difference is listed.
          PlacementError: leaves that cannot be placed on the mesh, all of them.

        Example:
          >>> import jax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> make = lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(nnx.eval_shape(make)).init(make, jax.make_mesh((1,), ("data",)))
          >>> state["params"]["kernel"].shape
          (2, 3)
        """
        from statewise._src.core.model_io import init

        return init(self, make_model, mesh)

    def put(
        self, state: statewise._src.core.state.State | Any, /, *objects: Any, copy: bool = True, **named: Any
    ) -> None:
        """Puts a state's arrays back into the objects: all of them, or none if anything is refused or interrupted.

        A raw array in a tuple, a named tuple or a frozen dataclass is put by rebuilding that in the same place.  The
        state, averages included, stays as it is.

        Args:
          state: a state of this plan.
          *objects: the objects that were planned, or others of the same structure.
          copy: copies each array, so that a later step, which donates the state's, leaves the objects whole.
          **named: the objects by name instead of by position, where they were planned so.

        Raises:
          StructureError: another plan's state, a donated one, objects that do not fit, or an array in something that
            cannot be built anew; nothing was put then.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.put(plan.take(model), model)
        """
        from statewise._src.core.model_io import put

        put(self, state, in_order(self._names, objects, named, "put"), copy=copy)

    def build(self, state: statewise._src.core.state.State | Any, *, copy: bool = True) -> Any:
        """Makes new objects with a state's arrays.

        Args:
          state: a state of this plan.
          copy: copies each array, so that a later step leaves the objects whole.

        Returns:
          the object, or a tuple of them where several were planned, in that order.

        Raises:
          StructureError: another plan's state, or a donated one.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.build(plan.take(model)).kernel.shape
          (2, 3)
        """
        from statewise._src.core.model_io import build

        return build(self, state, copy=copy)

    def abstract(self, mesh: Any = None) -> statewise._src.core.state.State:
        """A state of this plan that holds shapes and dtypes instead of arrays.

        Args:
          mesh: a mesh, or an abstract one; shapes then have shardings too, and `sw.restore` restores into them.

        Raises:
          PlacementError: leaves that cannot be placed on the mesh, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).abstract()["params"]["kernel"]
          ShapeDtypeStruct(shape=(2, 3), dtype=float32)
        """
        from statewise._src.core.state import State
        from statewise._src.sharding.resolve import on_mesh

        plan = self if mesh is None else on_mesh(self, mesh)
        parts = [[jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in part] for part in plan._stored.values()]
        state = State.of(plan, parts)
        if mesh is None:
            return state
        return jax.tree.map(lambda shape, place: shape.update(sharding=place), state, self.shardings(mesh))

    def shardings(self, mesh: Any) -> statewise._src.core.state.State:
        """A state of shardings instead of arrays: `jax.device_put` takes it, and `jax.jit` for `out_shardings`.

        Args:
          mesh: a `jax.sharding.Mesh`, or an abstract one.

        Returns:
          where each kind's `placement` puts its arrays; optimizer state follows its leaves unless its kind has its own.

        Raises:
          PlacementError: leaves that cannot be placed so, all of them; a packed kind that would be split.

        Example:
          >>> import jax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
          >>> plan = kinds.plan(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
          >>> tuple(plan.shardings(jax.sharding.AbstractMesh((4,), ("data",)))["params"]["kernel"].spec)
          ('data',)
        """
        from statewise._src.core.state import State
        from statewise._src.sharding.resolve import on_mesh, resolve, slot_shardings

        placed = resolve(self, mesh)
        return State.of(on_mesh(self, mesh, placed), slot_shardings(self, mesh, placed))

    def axes(self, **kinds: Any) -> statewise._src.core.state.State:
        """A state of axes instead of arrays, as `jax.vmap` takes it for `in_axes` and `out_axes`.

        Args:
          **kinds: the mapped axis of each kind's arrays, None, or a function of a leaf's path and shape that gives it.
            Kinds that are not named are None, one for all; but optimizer state and averages follow what they are of.

        Raises:
          DeclarationError: a kind that is not there; something that is no axis.
          StructureError: leaves of too few dimensions for their axis, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
          >>> plan.axes(stats=0)["stats"]["mean"]
          0
        """
        from statewise._src.core.vmap_axes import axes

        return axes(self, kinds)
