"""The two objects that users hold: the plan, and the states of it.

A `Plan` is all static: kinds and optimizers resolved against one model.  A `State` is a plan with its arrays, a
registered pytree.  Both are thin: what they do is in the other modules of this package, which work on the plan's tables
and the state's data.  They stand in one file because each names the other: a plan makes states, and a state has a plan.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

from statewise._src.common.object_names import in_order
from statewise._src.common.paths import Leaf
from statewise._src.common.tables import Shown, Table, leaves_table
from statewise._src.core import averages, cast, ensembles, model_io, reduce_devices, restart, templates, vmap_axes
from statewise._src.core.state_data import Part, StateData, check_not_donated, check_unshared, register
from statewise._src.core.view import packed_for, unpacked_of, view
from statewise._src.plan.ema import EMA
from statewise._src.plan.tables import PlanTables
from statewise.errors import StructureError

__all__ = ["Plan", "State", "tables_in", "tables_of"]

_plans: weakref.WeakKeyDictionary[PlanTables, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_plans_lock = threading.Lock()


class Plan(Shown):
    """Kinds and optimizers resolved against one model: each leaf in exactly one kind.

    Made by `Kinds.plan` or `sw.plan`.  Static, hashable, without arrays; equal plans are one object.

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

    _tables: PlanTables

    def __init__(self) -> None:
        raise StructureError("A plan is made from kinds and a model.", hint="plan = sw.Kinds.standard().plan(model)")

    @classmethod
    def of(cls, tables: PlanTables) -> Plan:
        """Returns the plan of these tables; the same object while somebody holds it."""
        with _plans_lock:
            known = _plans.get(tables)
            plan = known() if known is not None else None
            if plan is None:
                plan = object.__new__(cls)
                plan._tables = tables
                _plans[tables] = weakref.ref(plan)
            return plan

    # --- looking ---------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> Any:
        """The declaration, with the kind `optimizer` added where there are optimizers, and a kind for each average."""
        return self._tables.kinds

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves, as data: path, kind, type, shape, dtype, aliases, elements, bytes."""
        return self._tables.leaves

    @property
    def excluded(self) -> tuple[Leaf, ...]:
        """Leaves that an earlier `sow` left in the model and that are not part of a state."""
        return self._tables.excluded

    @property
    def members(self) -> int | None:
        """How many members the plan of an ensemble has; None for a plan of one model."""
        return self._tables.members

    def __getitem__(self, kind: str) -> tuple[Leaf, ...]:
        return self._tables[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    @property
    def optimizers(self) -> dict[tuple[str, ...], Any]:
        """The optimizers, by the kinds that each updates."""
        return {group.kinds: group.tx for group in self._tables.optimizers}

    @property
    def averages(self) -> dict[tuple[str, ...], tuple[EMA, ...]]:
        """The averages, by the kinds that each is of."""
        kinds: dict[EMA, tuple[str, ...]] = {}
        for one in self._tables.averages:
            kinds[one.ema] = (*kinds.get(one.ema, ()), one.kind)
        return {of: tuple(ema for ema, other in kinds.items() if other == of) for of in kinds.values()}

    def __repr__(self) -> str:
        return repr(self._tables)

    def table(self) -> Table:
        """The plan as a table: one line for each leaf."""
        title = "plan" if self.members is None else f"plan of an ensemble of {self.members}"
        return leaves_table(title, self.leaves, self.kinds)

    # Identity is equality: equal plans are one object.

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __copy__(self) -> Plan:
        return self

    # --- making states ---------------------------------------------------------------------------------------

    def take(self, /, *objects: Any, mesh: Any = None, copy: bool = True, pack: Any = False, **named: Any) -> State:
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
        tables = self._tables
        given = in_order(tables.names, objects, named, "take")
        return State.wrap(model_io.take(tables, given, mesh=mesh, copy=copy, pack=pack))

    def init(self, make_model: Any, mesh: Any) -> State:
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
        return State.wrap(model_io.init(self._tables, make_model, mesh))

    def put(self, state: State | Any, /, *objects: Any, copy: bool = True, **named: Any) -> None:
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
        model_io.put(self._tables, state, in_order(self._tables.names, objects, named, "put"), copy=copy)

    def build(self, state: State | Any, *, copy: bool = True) -> Any:
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
        return model_io.build(self._tables, state, copy=copy)

    def abstract(self, mesh: Any = None) -> State:
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
        return State.wrap(templates.abstract(self._tables, mesh))

    def shardings(self, mesh: Any) -> State:
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
        return State.wrap(templates.shardings(self._tables, mesh))

    def axes(self, **kinds: Any) -> State:
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
        return State.wrap(vmap_axes.axes(self._tables, kinds))

    # --- ensembles ---------------------------------------------------------------------------------------------

    def stacked(self, count: int | Any, /, *, over: str | Any = None, **axes: Any) -> Plan:
        """Returns the plan of an ensemble: the same leaves, each with an axis for its members.

        It is a plan like others: its states are saved, restored, counted, placed and compared.  They are made by
        `stack`, by `take` of objects with stacked arrays (as `nnx.vmap` makes them), or by a restore.  A step runs on
        them under `jax.vmap`: `jax.vmap(train, in_axes=(plan.axes(), 0, None), out_axes=(plan.axes(), 0))`.

        Args:
          count: how many members.
          over: a mesh axis that the members are split over, where the plan is placed on a mesh; a kind's placement
            says how one member's arrays lie.
          **axes: the axis of each kind's arrays, None for a kind that all members share, or a function of a leaf's path
            and shape that gives one of these.  Kinds that are not named have the first axis, 0; optimizer state and
            averages follow what they are of.

        Raises:
          DeclarationError: a kind that is not there; something that is not an axis, or not a number of members; no kind
            with an axis.
          StructureError: leaves of too few dimensions for their axis, all of them; a plan of an ensemble.

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

    def stack(self, states: Any) -> State:
        """Makes a state of an ensemble from a state of each member, in their order.

        Args:
          states: a state of the single plan for each member; on the plan of one model, any number of them, and all
            kinds are stacked.  Or one state whose arrays are stacked already, as `jax.vmap` of `plan.take` makes it.

        Returns:
          a state of the ensemble's plan; the given ones stay as they are.

        Raises:
          StructureError: another number of states; states of other plans, or donated ones; leaves of a kind that all
            members share and that are not the same in each, all of them.

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
    """A plan with its arrays: a pytree that every JAX transform takes as it is.

    Made by `plan.take`; never changed in place.

    Attributes:
      plan: the plan, static.

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
        """The plan: which leaves there are, and how each kind lives."""
        return Plan.of(self.tables)

    # --- a mapping from kinds to their parts -------------------------------------------------------------------

    def __getitem__(self, kind: str) -> Any:
        """One kind's arrays, as an `nnx.State` nested by path, of plain arrays.

        Of kind `optimizer`, the optimizers' states by the kinds that they update, where the plan has some.
        """
        part = self.part(kind)
        check_not_donated(self, [kind])
        if part.view is None:
            part.view = view(self.tables, kind, unpacked_of(self.tables, kind, part.arrays))
        return part.view

    def __iter__(self) -> Any:
        return iter(self.tables.kinds)

    def __contains__(self, kind: object) -> bool:
        return kind in self.tables.kinds

    def __len__(self) -> int:
        return len(self.tables.kinds)

    def keys(self) -> Any:
        """The names of the kinds."""
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

    def replace(self, /, **parts: Any) -> State:
        """This state with the parts of some kinds swapped; averages of them, and optimizer state, stay.

        Args:
          **parts: by kind, what `state[kind]` gives: of this state, of another, or computed from one.

        Returns:
          a new state that shares all other parts with this one.

        Raises:
          DeclarationError: a kind that is not there.
          StructureError: a part with leaves missing, unexpected, or of another shape or dtype, or with numbers of NumPy
            that JAX would lose (all are listed); an array that an earlier step donated, or that the state already holds
            elsewhere.

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
        made = list(self.parts)
        for kind, given in parts.items():
            now = self.part(kind).arrays
            made[self.tables.kind_index[kind]] = Part(packed_for(self.tables, kind, given, now))
        state = self.make(self.tables, made)
        check_unshared(state)
        return state

    def restart(self, *kinds: str, where: Any = None, key: Any = None) -> State:
        """Makes fresh values for whole kinds, or for chosen slots of them, in place: the old buffers are donated.

        Averages begin again as copies of what they are of (not donated), optimizer state by the optimizer's own `init`:
        that of the kinds restarted with it, `state.restart("lora", "optimizer")`, or of all if it stands alone.

        Args:
          *kinds: the kinds to restart; by default all that declare `restart`.
          where: which slots along each kind's `batch_axis`: booleans, one for each slot, or slot numbers.  None
            restarts everything.
          key: a PRNG key, where a `restart` takes one: each leaf and each slot gets its own, folded from it.

        Returns:
          the new state; this one was donated as far as these kinds go.

        Raises:
          DeclarationError: a kind that is not there, is frozen, declares no `restart`, has no leaves, or, with `where`,
            no `batch_axis`; a key that is missing, or that no `restart` takes.
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
        """Returns this state with averages instead of the values they track, to evaluate with.

        Call `evaluate(state.with_averages("ema"), x)`.  They are copies; all else is shared with this state.  A train
        step on it would start from the averages, and donate what is shared.

        Args:
          name: the name of the averages: `sw.EMA(0.999, name="ema")`.

        Raises:
          DeclarationError: no averages of that name.
          StructureError: a donated state.
        """
        return averages.with_averages(self, name)

    def reduce_devices(self, *kinds: str, how: Any = "mean") -> State:
        """This state with the values of all devices folded into one, the same on every device.

        Args:
          *kinds: kinds that lie `PerDevice`; by default all that do.
          how: `"mean"`, `"first"`, or a function of an array with the leading axis that takes it away.

        Returns:
          a state of another plan, in which these kinds are `Replicated`.

        Raises:
          DeclarationError: a kind that is not there, or does not lie per device; another `how`.
          StructureError: whole numbers, booleans or keys under `"mean"`; a function that changes the leaf's shape or
            dtype; a donated state.

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

    def cast(self, /, **dtypes: Any) -> State:
        """A state of a new plan, its floating-point arrays in other dtypes.

        Args:
          **dtypes: by kind, the dtype of its floating-point arrays; integers, booleans and keys stay as they are.

        An abstract state can be cast too: `sw.restore(path, plan.abstract().cast(params="bfloat16"), cast=True)`.

        Returns:
          a state of another plan, which has these dtypes; it shares the parts of the other kinds with this one.

        Raises:
          DeclarationError: a kind that is not there, or a dtype that is no floating-point dtype.
          StructureError: a cast that would lose numbers; rounding is fine.  Inside `jax.jit` values are not known.

        Example:
          >>> from flax import nnx
          >>> import statewise as sw
          >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
          >>> half = sw.plan(model).take(model).cast(params="bfloat16")
          >>> half["params"]["kernel"].dtype, half.plan["params"][0].dtype
          (dtype(bfloat16), dtype(bfloat16))
        """
        return cast.cast(self, dtypes)

    def member(self, index: Any) -> State:
        """Returns the state of one member of an ensemble, in arrays of its own.

        Args:
          index: which member: a whole number, from the end where it is negative; or a traced one, which cannot be
            checked (one past the end then gives the last member).

        Returns:
          a state of the single plan; every step takes it, and `plan.build` makes a model of it.

        Raises:
          StructureError: a state of one model; an index that is not a whole number, or names no member; a donated
            state.

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


def tables_in(thing: Any) -> PlanTables | None:
    """Returns the tables of a plan or a state; None for anything else."""
    if isinstance(thing, State):
        return thing.tables
    return tables_of(thing) if isinstance(thing, Plan) else None
