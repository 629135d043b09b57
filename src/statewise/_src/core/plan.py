"""The three objects that users hold: kinds, a plan, and its states.

`Kinds` are the declaration.  A `Plan` is static: kinds and optimizers resolved against one model.  A `State` is a plan
with its arrays, registered as a pytree.  All are thin: the other modules of this package do the work, on the
plan's tables and the state's data.  They share a file because each names the others: kinds make plans, a plan has kinds
and makes states, and a state has a plan.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar

import jax
import optax

from statewise._src.common.object_names import in_order
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import Shown, Table, leaves_table
from statewise._src.core import averages, cast, ensembles, model_io, reduce_devices, restart, templates, vmap_axes
from statewise._src.core.kinds import KindsData, standard_kinds
from statewise._src.core.known_arrays import recall, remember, remembered_kinds
from statewise._src.core.reduce_devices import How
from statewise._src.core.restart_slots import Slots
from statewise._src.core.state_data import StateData, check_not_donated, check_unshared, register, with_arrays
from statewise._src.core.view import arrays_for, packed_for, unpacked_of, view
from statewise._src.core.vmap_axes import MappedAxis
from statewise._src.plan.ema import EMA
from statewise._src.plan.resolve import resolve_plan
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["Kinds", "Plan", "State", "plan", "tables_in", "tables_of"]

# A kind, or a tuple of kinds.  A mapping does not vary with the type of its keys, so that type is a variable.
Updated = TypeVar("Updated", bound=Sequence[str])
Averaged = TypeVar("Averaged", bound=Sequence[str])

# Each plan by its tables.  A plan refers to its tables, so an entry lives exactly as long as the plan.
_plans: weakref.WeakValueDictionary[PlanTables, Any] = weakref.WeakValueDictionary()
_plans_lock = threading.Lock()


class Kinds(KindsData):
    """The ordered declaration of the kinds of one program.

    A mapping from names to kinds: immutable, hashable, and equal by value, order included.

    Args:
      **kinds: the kinds by name.  A name is a Python identifier.

    Raises:
      DeclarationError: a name is not allowed, a value is not a `Kind`, or two kinds both claim the rest.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param), counters=sw.Kind(sw.Exactly(nnx.Variable)))
      >>> list(kinds)
      ['params', 'counters']
      >>> kinds.replace(params=sw.Kind(nnx.Param, frozen=True))["params"].frozen
      True
    """

    __slots__ = ()

    @classmethod
    def standard(cls) -> Kinds:
        """Returns kinds for every Variable type that NNX ships, so that a newcomer need not declare any.

        They are `params` (without LoRA's), `lora`, `stats`, `cache` (ephemeral, restarts with zeros), `rng`,
        `intermediates` (ephemeral), `metrics`, `optimizer`, and `variables` for the rest: plain `nnx.Variable`, all
        other subclasses, and raw arrays.

        Example:
          >>> import statewise as sw
          >>> list(sw.Kinds.standard())
          ['params', 'lora', 'stats', 'cache', 'rng', 'intermediates', 'metrics', 'optimizer', 'variables']
        """
        return _STANDARD

    def plan(
        self,
        /,
        *objects: object,
        optimizers: Mapping[Updated, optax.GradientTransformation] | None = None,
        averages: Mapping[Averaged, EMA | Sequence[EMA]] | None = None,
        **named: object,
    ) -> Plan:
        """Resolves these kinds against a model, or several objects: each leaf belongs to exactly one kind.

        Args:
          *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
          optimizers: maps a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.
          averages: maps a kind, or a tuple of kinds, to an `sw.EMA` or a list of them.  Each average becomes a kind of
            its own, and follows the kinds it tracks wherever a train step updates them.
          **named: the objects by name instead, as in `policy=policy, reference=reference`.  The name is then the first
            segment of their paths, both in filters and in print.  Steps get the objects in this order.

        Returns:
          the plan; equal plans are one object.

        Raises:
          UnclaimedError: leaves that no kind claims, all of them.
          OverlapError: leaves that several kinds claim, all of them.
          DeclarationError: optimizers or averages for a kind that does not exist, is frozen, is empty, or does not
            hold floats; two optimizers for one kind, or two averages of one name; a kind with a path that does not
            exist; objects given both by position and by name.
          FilterError: a path is ambiguous.
          StructureError: there are no objects or no leaves, or a class is given instead of an instance.

        Example:
          >>> import optax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.Kinds(params=sw.Kind(nnx.Param)).plan(model, optimizers={"params": optax.sgd(0.1)})
          >>> [sw.format_path(leaf.path) for leaf in plan["params"]]
          ['bias', 'kernel']
        """
        return Plan.of(resolve_plan(self, objects, optimizers, averages, named))


class Plan(Shown):
    """Kinds and optimizers resolved against one model: each leaf in exactly one kind.

    Made by `Kinds.plan` or `sw.plan`.  Static, hashable, without arrays; equal plans are one object.

    Attributes:
      kinds: the declaration, plus the kind `optimizer` if there are optimizers, and a kind for each average.
      leaves: one `Leaf` for each leaf of the model, then for each array of optimizer state, then for each average.
      excluded: leaves that an earlier `sow` left in the model; they are not part of a state.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> plan = sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> plan is sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
      True
      >>> [str(leaf) for leaf in plan["params"]]
      ['bias: Param(3,) float32  kind=params', 'kernel: Param(2, 3) float32  kind=params']
    """

    _tables: PlanTables

    def __init__(self) -> None:
        raise StructureError("A plan is made from kinds and a model.", hint="plan = sw.Kinds.standard().plan(model)")

    @classmethod
    def of(cls, tables: PlanTables) -> Plan:
        """Returns the plan that has these tables: the same object for as long as anything refers to it."""
        with _plans_lock:
            plan: Plan | None = _plans.get(tables)
            if plan is None:
                plan = _plans[tables] = object.__new__(cls)
                plan._tables = tables
            return plan

    # --- looking ---------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> Kinds:
        """Returns the declaration, plus the kind `optimizer` if there are optimizers, and a kind for each average."""
        kinds = self._tables.kinds
        return kinds if isinstance(kinds, Kinds) else Kinds(**kinds)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """Returns the leaves as data: path, kind, type, shape, dtype, aliases, size, nbytes."""
        return self._tables.leaves

    @property
    def excluded(self) -> tuple[Leaf, ...]:
        """Returns the leaves that an earlier `sow` left in the model; they are not part of a state."""
        return self._tables.excluded

    @property
    def members(self) -> int | None:
        """Returns the number of members of an ensemble; None for the plan of one model."""
        return self._tables.members

    def __getitem__(self, kind: str) -> tuple[Leaf, ...]:
        return self._tables[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    @property
    def optimizers(self) -> dict[tuple[str, ...], optax.GradientTransformation]:
        """Returns the optimizers, keyed by the kinds that each one updates."""
        return {group.kinds: group.tx for group in self._tables.optimizers}

    @property
    def averages(self) -> dict[tuple[str, ...], tuple[EMA, ...]]:
        """Returns the averages, keyed by the kinds that each one tracks."""
        kinds: dict[EMA, tuple[str, ...]] = {}
        for average in self._tables.averages:
            kinds[average.ema] = (*kinds.get(average.ema, ()), average.kind)
        return {of: tuple(ema for ema, other in kinds.items() if other == of) for of in kinds.values()}

    def __repr__(self) -> str:
        return repr(self._tables)

    def table(self) -> Table:
        """Returns the plan as a table with one line for each leaf."""
        title = "plan" if self.members is None else f"plan of an ensemble of {self.members}"
        return leaves_table(title, self.leaves, self.kinds)

    # Identity is equality: equal plans are one object.

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __copy__(self) -> Plan:
        return self

    # --- making states ---------------------------------------------------------------------------------------

    def take(
        self,
        /,
        *objects: object,
        mesh: jax.sharding.Mesh | None = None,
        copy: bool = True,
        pack: bool | str | Iterable[str] = False,
        **named: object,
    ) -> State:
        """Copies the arrays of the objects into a state.

        Args:
          *objects: the planned objects, or others of the same structure, shapes and dtypes.
          mesh: places each array on this mesh by its kind's placement, as `shardings` does.
          copy: copies each array, so that the objects stay usable.  False shares the arrays until a step donates
            them, for models that fill the device; two leaves that share one array still get separate ones.
          pack: experimental: stores small arrays in a few buffers, which makes steps several times as fast;
            `jax.tree.map` then sees the buffers.  True packs all kinds; names pack those kinds.
          **named: the objects by name, if they were planned by name.

        Returns:
          a state of this plan, with fresh optimizer state; if packed, `state.plan` is the packed plan, and `plan.put`
          accepts the state.

        Raises:
          StructureError: the objects are not what was planned (every difference is listed), or JAX would lose digits
            of a number.
          DeclarationError: `pack` names a kind that does not exist.
          PlacementError: leaves that cannot be placed on the mesh, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(model).take(model)
          >>> state["params"]["kernel"].shape
          (2, 3)
        """
        tables = self._tables
        given = in_order(tables.names, objects, named, "take")
        return State.wrap(model_io.take(tables, given, mesh=mesh, copy=copy, pack=pack))

    def init(self, make_model: Callable[[], object], mesh: jax.sharding.Mesh) -> State:
        """Initializes a model's state directly on a mesh, inside `jax.jit`: no device ever holds a full copy.

        Args:
          make_model: a function without arguments that makes what was planned: the object, a tuple of several, or a
            dict by name.  It is traced, so its arrays must be in `nnx.Variable`s.
          mesh: the mesh.

        Returns:
          the state that `plan.take(make_model(), mesh=mesh)` gives, up to the last bit where XLA rounds differently.

        Raises:
          StructureError: `make_model` makes something other than what was planned; every difference is listed.
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
        return State.wrap(model_io.init(self._tables, make_model, mesh))

    def put(self, state: State, /, *objects: object, copy: bool = True, **named: object) -> None:
        """Writes a state's arrays back into the objects: all of them, or none if anything fails or is interrupted.

        A raw array in a tuple, a named tuple or a frozen dataclass is written by rebuilding its container.  The state
        does not change.

        Args:
          state: a state of this plan.
          *objects: the planned objects, or others of the same structure.
          copy: copies each array, so that the objects stay usable when a later step donates the state's arrays.
          **named: the objects by name, if they were planned by name.

        Raises:
          StructureError: the state is of another plan or was donated, the objects do not fit, or an array is in a
            container that cannot be rebuilt.  Nothing was written then.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.put(plan.take(model), model)
        """
        model_io.put(self._tables, state, in_order(self._tables.names, objects, named, "put"), copy=copy)

    def build(self, state: State, *, copy: bool = True) -> Any:
        """Builds new objects with a state's arrays.

        Args:
          state: a state of this plan.
          copy: copies each array, so that the objects stay usable when a later step donates the state's arrays.

        Returns:
          the object, or a tuple of the objects if several were planned, in the same order.

        Raises:
          StructureError: the state is of another plan, or was donated.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> plan = sw.plan(model)
          >>> plan.build(plan.take(model)).kernel.shape
          (2, 3)
        """
        return model_io.build(self._tables, state, copy=copy)

    def abstract(self, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None) -> State:
        """Returns a state of this plan with shapes and dtypes instead of arrays.

        Args:
          mesh: a mesh, concrete or abstract; the shapes then have shardings, and `sw.restore` restores into them.

        Raises:
          PlacementError: leaves that cannot be placed on the mesh, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).abstract()["params"]["kernel"]
          ShapeDtypeStruct(shape=(2, 3), dtype=float32)
        """
        return State.wrap(templates.abstract(self._tables, mesh))

    def shardings(self, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> State:
        """Returns a state of shardings instead of arrays, for `jax.device_put` or `jax.jit(..., out_shardings=)`.

        Args:
          mesh: the mesh, concrete or abstract.

        Returns:
          the sharding of each array by its kind's `placement`; optimizer state follows the leaves that it updates
          unless its kind has a placement of its own.

        Raises:
          PlacementError: leaves that cannot be placed, all of them, or a packed kind that would be sharded.

        Example:
          >>> import jax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
          >>> plan = kinds.plan(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
          >>> tuple(plan.shardings(jax.sharding.AbstractMesh((4,), ("data",)))["params"]["kernel"].spec)
          ('data',)
        """
        return State.wrap(templates.shardings(self._tables, mesh))

    def axes(self, **kinds: MappedAxis) -> State:
        """Returns a state of axes instead of arrays, for `in_axes` and `out_axes` of `jax.vmap`.

        Args:
          **kinds: for each kind the mapped axis of its arrays, None, or a function of a leaf's path and shape that
            returns one of these.  Other kinds get None: they are shared.  Optimizer state and averages follow the
            leaves that they belong to.

        Raises:
          DeclarationError: a kind does not exist, or a value is not an axis.
          StructureError: leaves with too few dimensions for their axis, all of them.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
          >>> plan.axes(stats=0)["stats"]["mean"]
          0
        """
        return State.wrap(vmap_axes.axes(self._tables, kinds))

    # --- ensembles ---------------------------------------------------------------------------------------------

    def stacked(self, count: SupportsIndex, /, *, over: str | None = None, **axes: MappedAxis) -> Plan:
        """Returns the plan of an ensemble: the same leaves, each with an axis for the members.

        It is a plan like any other: its states can be saved, restored, counted, placed and compared.  They are made by
        `stack`, by `take` of objects with stacked arrays (as `nnx.vmap` makes them), or by a restore.  A step runs on
        them under `jax.vmap`: `jax.vmap(train, in_axes=(plan.axes(), 0, None), out_axes=(plan.axes(), 0))`.

        Args:
          count: the number of members.
          over: a mesh axis to shard the members over when the plan is placed on a mesh; a kind's placement says how
            the arrays of one member are sharded.
          **axes: for each kind the axis of its arrays, None for a kind that all members share, or a function of a
            leaf's path and shape that returns one of these.  Other kinds get the first axis, 0.  Optimizer state and
            averages follow the leaves that they belong to.

        Raises:
          DeclarationError: a kind does not exist, a value is not an axis, `count` is not a positive integer, or no kind
            has an axis.
          StructureError: leaves with too few dimensions for their axis, all of them; the plan is an ensemble already.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
          >>> [str(leaf) for leaf in plan.stacked(8, params=None)["stats"]]
          ['mean: BatchStat(8, 3) float32  kind=stats', 'var: BatchStat(8, 3) float32  kind=stats']
          >>> plan.stacked(8, params=None)["params"][0].shape
          (3,)
        """
        return Plan.of(ensembles.stacked(self._tables, count, over, axes))

    def stack(self, states: State | Iterable[State]) -> State:
        """Stacks the states of the members into a state of the ensemble, in order.

        Args:
          states: one state of the single plan for each member.  On the plan of one model, any number of states; all
            kinds are stacked.  Or one state whose arrays are stacked already, as `jax.vmap` of `plan.take` makes it.

        Returns:
          a state of the ensemble's plan; the given states do not change.

        Raises:
          StructureError: the number of states is wrong, a state is of another plan or was donated, or leaves of a
            shared kind differ between members (all are listed).

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> models = [nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in range(4)]
          >>> plan = sw.plan(models[0])
          >>> state = plan.stack([plan.take(model) for model in models])
          >>> state.plan is plan.stacked(4), state["params"]["bias"].shape
          (True, (4, 3))
        """
        return State.wrap(ensembles.stack(self._tables, states))


class State(StateData):
    """A plan with its arrays: a pytree that every JAX transform accepts.

    Made by `plan.take`; never changed in place.  A mapping from each kind to its arrays.

    Attributes:
      plan: the plan; static.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> state = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0))).take(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> list(state)[:3]
      ['params', 'lora', 'stats']
      >>> state["stats"]["var"]
      Array([1., 1., 1.], dtype=float32)
      >>> len(jax.tree.leaves(state))
      4
    """

    __slots__ = ()

    def __init__(self) -> None:
        raise StructureError("A state is made by a plan.", hint="state = plan.take(model)")

    @property
    def plan(self) -> Plan:
        """Returns the plan of this state."""
        return Plan.of(self.tables)

    # --- a mapping from kinds to their parts -------------------------------------------------------------------

    def __getitem__(self, kind: str) -> Any:
        """Returns the arrays of one kind, nested by path in the container of `nnx.state`: an `nnx.State`, or a dict.

        For the kind `optimizer` of a plan with optimizers, returns their states, keyed by the kinds that they update.
        """
        part = self.part(kind)
        check_not_donated(self, [kind])
        if part.view is None:
            arrays = unpacked_of(self.tables, kind, part.arrays)
            if self.tables.sources and kind in remembered_kinds(self.tables):
                remember(self.tables, self.parts, kind, arrays)
            part.view = view(self.tables, kind, arrays)
        return part.view

    def __iter__(self) -> Iterator[str]:
        return iter(self.tables.kinds)

    def __contains__(self, kind: object) -> bool:
        return kind in self.tables.kinds

    def __len__(self) -> int:
        return len(self.tables.kinds)

    def keys(self) -> KeysView[str]:
        """Returns the names of the kinds."""
        return self.tables.kinds.keys()

    def __repr__(self) -> str:
        shown = []
        for kind, part in zip(self.tables.kinds, self.parts, strict=True):
            if part.arrays:
                count = len(self.tables.specs[kind])
                packed = f" in {len(part.arrays)}" if kind in self.tables.packing else ""
                shown.append(f"{kind}: {count} arrays{packed}" + (" (donated)" if part.donated_by else ""))
        many = "" if self.tables.members is None else f"an ensemble of {self.tables.members}: "
        return f"State({many}{', '.join(shown)})"

    # --- making other states -----------------------------------------------------------------------------------

    def replace(self, /, **parts: object) -> State:
        """Returns this state with new arrays for some kinds; their averages and optimizer state do not change.

        Args:
          **parts: for each kind, arrays in the structure of `state[kind]`: of another state, or computed.

        Returns:
          a new state that shares the arrays of all other kinds with this one.

        Raises:
          DeclarationError: a kind does not exist.
          StructureError: leaves are missing, unexpected, or of another shape or dtype, or JAX would lose digits of a
            NumPy number (all are listed); an array was donated, or is elsewhere in the state already.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
          >>> state = sw.plan(model).take(model)
          >>> state = state.replace(stats=jax.tree.map(jnp.zeros_like, state["stats"]))
          >>> state["stats"]["var"]
          Array([0., 0., 0.], dtype=float32)
        """
        old = {kind: self.part(kind).arrays for kind in parts}
        given = {kind: arrays_for(self.tables, kind, new, old[kind]) for kind, new in parts.items()}
        seen = {kind: recall(arrays) for kind, arrays in given.items()} if self.tables.sources else None
        stored = {kind: packed_for(self.tables, kind, arrays, old[kind]) for kind, arrays in given.items()}
        state = with_arrays(self, stored, fresh=tuple(given), seen=seen)
        check_unshared(state)
        return state

    def restart(self, *kinds: str, where: Slots | None = None, key: jax.Array | None = None) -> State:
        """Gives kinds, or some of their slots, fresh values in place: the old buffers are donated.

        Averages restart as copies of the values they track, which are not donated.  Optimizer state restarts by the
        optimizer's own `init`: for the kinds restarted with it, as in `state.restart("lora", "optimizer")`, or for all
        kinds in `state.restart("optimizer")`.

        Args:
          *kinds: the kinds to restart; by default all that declare `restart`.
          where: the slots to restart along each kind's `batch_axis`: one boolean for each slot, or slot indices.  None
            restarts everything.
          key: a PRNG key, if a `restart` takes one; each leaf and each slot gets its own, folded from it.

        Returns:
          the new state; this one can no longer be used for these kinds, which were donated.

        Raises:
          DeclarationError: a kind does not exist, is frozen, declares no `restart`, has no leaves, or, with `where`,
            has no `batch_axis`; a key is missing, or given when no `restart` takes one.
          StructureError: leaves without that axis, or with another number of slots; a donated state; a `restart` that
            changes a shape or dtype.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Dict(hits=nnx.Cache(jnp.array([1.0, 2.0, 3.0])))
          >>> kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0))
          >>> state = kinds.plan(model).take(model)
          >>> state = state.restart("cache", where=jnp.array([False, True, False]))
          >>> state["cache"]["hits"]
          Array([1., 0., 3.], dtype=float32)
        """
        return restart.restart(self, kinds, where, key)

    def with_averages(self, name: str) -> State:
        """Returns this state with the averages instead of the values they track: `state.with_averages("ema")`.

        It is meant for evaluation: `evaluate(state.with_averages("ema"), x)`.  The averages are copied; everything else
        is shared with this state.  A train step on the result would start from the averages, and donate what is shared.

        Args:
          name: the name of the averages, as in `sw.EMA(0.999, name="ema")`.

        Raises:
          DeclarationError: there are no averages of that name.
          StructureError: the state was donated.
        """
        return averages.with_averages(self, name)

    def reduce_devices(self, *kinds: str, how: How = "mean") -> State:
        """Returns this state with the values of all devices reduced to one, which is then replicated.

        Args:
          *kinds: kinds that are placed `PerDevice`; by default all of them.
          how: `"mean"`, `"first"`, or a function that reduces the leading axis of an array.

        Returns:
          a state of another plan, in which these kinds are `Replicated`.

        Raises:
          DeclarationError: a kind does not exist or is not per device, or `how` is none of these.
          StructureError: integers, booleans or keys under `"mean"`; a function that changes a leaf's shape or dtype; a
            donated state.

        Example:
          >>> import jax
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
          >>> kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data")))
          >>> state = kinds.plan(model).take(model, mesh=jax.make_mesh((1,), ("data",)))
          >>> state["stats"]["mean"].shape, state.reduce_devices("stats")["stats"]["mean"].shape
          ((1, 3), (3,))
        """
        return reduce_devices.reduce_devices(self, kinds, how)

    def cast(self, /, **dtypes: jax.typing.DTypeLike) -> State:
        """Returns this state with the floating-point arrays of some kinds in other dtypes.

        An abstract state can be cast too: `sw.restore(path, plan.abstract().cast(params="bfloat16"), cast=True)`.

        Args:
          **dtypes: for each kind the dtype of its floating-point arrays; integers, booleans and keys do not change.

        Returns:
          a state of another plan, which has these dtypes; it shares the arrays of all other kinds with this one.

        Raises:
          DeclarationError: a kind does not exist, or a dtype is not a floating-point dtype.
          StructureError: a value does not fit into the dtype (rounding is fine).  Inside `jax.jit`, where values are
            unknown, this is not checked.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> half = sw.plan(model).take(model).cast(params="bfloat16")
          >>> half["params"]["kernel"].dtype, half.plan["params"][0].dtype
          (dtype(bfloat16), dtype(bfloat16))
        """
        return cast.cast(self, dtypes)

    def member(self, index: SupportsIndex | jax.Array) -> State:
        """Returns the state of one member of an ensemble, in arrays of its own.

        Args:
          index: the member: an integer, counted from the end if negative; or a traced integer, which cannot be checked
            (an index past the end gives the last member).

        Returns:
          a state of the single plan; every step accepts it, and `plan.build` builds a model from it.

        Raises:
          StructureError: the state is of one model, the index is not an integer or is out of range, or the state was
            donated.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> models = [nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in range(4)]
          >>> plan = sw.plan(models[0])
          >>> ensemble = plan.stacked(4).stack([plan.take(model) for model in models])
          >>> ensemble["params"]["kernel"].shape, ensemble.member(-1)["params"]["kernel"].shape
          ((4, 2, 3), (2, 3))
          >>> bool((ensemble.member(2)["params"]["kernel"] == models[2].kernel[...]).all())
          True
        """
        return ensembles.member(self, index)


register(State)


def tables_of(plan: Plan) -> PlanTables:
    """Returns the tables of a plan, which all other modules work on."""
    return plan._tables


def tables_in(thing: object) -> PlanTables | None:
    """Returns the tables of a plan or a state; None for anything else."""
    if isinstance(thing, State):
        return thing.tables
    return tables_of(thing) if isinstance(thing, Plan) else None


_STANDARD = Kinds(**standard_kinds())


def plan(
    *objects: object,
    optimizers: Mapping[Updated, optax.GradientTransformation] | None = None,
    averages: Mapping[Averaged, EMA | Sequence[EMA]] | None = None,
    **named: object,
) -> Plan:
    """Plans a model by the standard kinds: `Kinds.standard().plan(...)`.

    Args:
      *objects: modules, `nnx.Optimizer`s, metrics: anything NNX can flatten, concrete or abstract.
      optimizers: maps a kind, or a tuple of kinds for one joint update, to an `optax.GradientTransformation`.
      averages: maps a kind, or a tuple of kinds, to an `sw.EMA` or a list of them.
      **named: the objects by name instead; paths then begin with the name.

    Returns:
      the plan.

    Raises:
      OverlapError: leaves that two of the standard kinds claim (their type derives from both types).
      DeclarationError: optimizers or averages for a kind that does not exist, is frozen, is empty, or does not hold
        floats; two optimizers for one kind, or two averages of one name.
      StructureError: there are no objects or no leaves, or a class is given instead of an instance.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> [(leaf.kind, sw.format_path(leaf.path)) for leaf in sw.plan(model).leaves]
      [('params', 'bias'), ('stats', 'mean'), ('params', 'scale'), ('stats', 'var')]
    """
    return Plan.of(resolve_plan(_STANDARD, objects, optimizers, averages, named))
