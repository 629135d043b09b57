"""The state: a plan with its arrays, a registered pytree.

A state holds one part for each kind of its plan, and a part is a tuple of arrays.  States share parts: a step
that writes one kind makes a new part for it and hands on the others as they are, and `replace` puts one set of
weights beside many caches.  When a step donates arrays of a part, the part is marked *donated*; whichever state
is used next with it says so, by name, instead of failing deep inside the runtime.

As a pytree a state has one leaf for each array, keyed by kind and path, and its plan as the static part.  JAX
may put anything there (tracers, axes, shapes, sharding): nothing is checked when a state is unflattened, and
everything when a step is traced with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from statewise._src.common.paths import Leaf, format_path
from statewise._src.core.batches import misfits, unfitting
from statewise._src.core.plan import Plan
from statewise._src.core.view import packed_for, unpacked_of, view
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.members import Membered
from statewise._src.sharding.part_shardings import UNKNOWN, Places, places_of
from statewise.errors import StructureError

__all__ = ["Part", "State"]


class Part:
    """One kind's arrays, shared by the states that have them in common.

    Attributes:
      arrays: the arrays, in the order of the plan.
      donated_by: what donated some of them, in words; None while all are there.
      lie: where they lie on a mesh; `UNKNOWN` until `places` was asked.
    """

    __slots__ = ("_ids", "_view", "arrays", "donated_by", "lie")

    def __init__(self, arrays: tuple[Any, ...], lie: Places | None = UNKNOWN) -> None:
        self.arrays = arrays
        self.donated_by: str | None = None
        self.lie = lie
        self._view: Any = None
        self._ids: frozenset[int] | None = None

    def ids(self) -> frozenset[int]:
        """The identities of the arrays."""
        if self._ids is None:
            self._ids = frozenset(map(id, self.arrays))
        return self._ids

    def places(self) -> Places | None:
        """Where the arrays lie on a mesh; None where none does."""
        if self.lie is UNKNOWN:
            self.lie = places_of(self.arrays)
        return self.lie


class State(Membered):
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

    __slots__ = ("__weakref__", "_parts", "_plan")

    _plan: Plan
    _parts: list[Part]

    def __init__(self) -> None:
        raise StructureError("A state is made by a plan.", hint="state = plan.take(model)")

    @classmethod
    def of(cls, plan: Plan, parts: Iterable[Iterable[Any]]) -> State:
        """A state from the arrays of each kind, in the order of the plan.  For other rooms; nothing is checked."""
        return make_state(plan, [Part(tuple(part)) for part in parts])

    @property
    def plan(self) -> Plan:
        """The plan: which leaves there are, and how each kind lives."""
        return self._plan

    # --- a mapping from kinds to their parts -------------------------------------------------------------------

    def __getitem__(self, kind: str) -> Any:
        """One kind's arrays, as an `nnx.State` nested by path, of plain arrays.

        Of kind `optimizer`, the optimizers' states by the kinds that they update, where the plan has some.
        """
        part = self.part(kind)
        check_not_donated(self, [kind])
        if part._view is None:
            part._view = view(self._plan, kind, unpacked_of(self._plan, kind, part.arrays))
        return part._view

    def __iter__(self) -> Any:
        return iter(self._plan.kinds)

    def __contains__(self, kind: object) -> bool:
        return kind in self._plan.kinds

    def __len__(self) -> int:
        return len(self._plan.kinds)

    def keys(self) -> Any:
        """The names of the kinds."""
        return self._plan.kinds.keys()

    def __repr__(self) -> str:
        shown = []
        for kind, part in zip(self._plan.kinds, self._parts, strict=True):
            if part.arrays:
                count = len(self._plan._specs[kind])
                packed = f" in {len(part.arrays)}" if kind in self._plan._packing else ""
                shown.append(f"{kind}: {count} arrays{packed}" + (" (donated)" if part.donated_by else ""))
        many = "" if self._plan.members is None else f"an ensemble of {self._plan.members}: "
        return f"State({many}{', '.join(shown)})"

    def part(self, kind: str) -> Part:
        """One kind's part.  For other rooms."""
        index = self._plan._index.get(kind)
        if index is None:
            raise unknown_kind(kind, self._plan.kinds)
        return self._parts[index]

    # --- making other states -----------------------------------------------------------------------------------

    def replace(self, /, **parts: Any) -> State:
        """This state with the parts of some kinds swapped; averages of them, and optimizer state, stay.

        Args:
          **parts: by kind, what `state[kind]` gives: of this state, of another, or computed from one.

        Returns:
          a new state that shares all other parts with this one.

        Raises:
          DeclarationError: a kind that is not there.
          StructureError: a part with leaves missing, left over, or of another shape or dtype, or with numbers of NumPy
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
        made = list(self._parts)
        for kind, given in parts.items():
            now = self.part(kind).arrays
            made[self._plan._index[kind]] = Part(packed_for(self._plan, kind, given, now))
        state = make_state(self._plan, made)
        refuse_shared(state)
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
        from statewise._src.core.restart import restart

        return restart(self, kinds, where, key)

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
        from statewise._src.core.averages import with_averages

        return with_averages(self, name)

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
        from statewise._src.core.reduce_devices import reduce_devices

        return reduce_devices(self, kinds, how)

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
        from statewise._src.core.cast import cast

        return cast(self, dtypes)


def make_state(plan: Plan, parts: list[Part]) -> State:
    """A state of these parts.  For other rooms; nothing is checked."""
    state = object.__new__(State)
    state._plan = plan
    state._parts = parts
    return state


# --- the pytree ------------------------------------------------------------------------------------------------


def _flatten(state: State) -> tuple[tuple[Any, ...], Plan]:
    return tuple(itertools.chain.from_iterable(part.arrays for part in state._parts)), state._plan


def _flatten_with_keys(state: State) -> tuple[list[tuple[Any, Any]], Plan]:
    children, plan = _flatten(state)
    return list(zip(plan._keys, children, strict=True)), plan


def _unflatten(plan: Plan, children: Iterable[Any]) -> State:
    arrays = iter(children)
    return make_state(plan, [Part(tuple(itertools.islice(arrays, size))) for size in plan._sizes])


jax.tree_util.register_pytree_with_keys(State, _flatten_with_keys, _unflatten, _flatten)


# --- what can be wrong with a state ----------------------------------------------------------------------------


def check_not_donated(state: State, kinds: Iterable[str]) -> None:
    """Raises where a kind's arrays were donated."""
    # Arrays may also have been donated behind a part's back: by the user's own jit, or in a copy of the pytree.
    donated = [kind for kind in kinds if state.part(kind).donated_by or any(map(is_deleted, state.part(kind).arrays))]
    if donated:
        raise donated_error(state, donated)


def donated_error(state: State, kinds: Sequence[str]) -> StructureError:
    """The error for a state that is used after its arrays were donated."""
    by = next((state.part(kind).donated_by for kind in kinds if state.part(kind).donated_by), None) or "a step"
    names = ", ".join(kinds)
    return StructureError(
        f"This state was donated: {by} has donated its {names}.",
        kind=kinds[0],
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    )


def deleted_kinds(state: State) -> list[str]:
    """The kinds with arrays that are no longer there."""
    return [
        kind for kind, part in zip(state._plan.kinds, state._parts, strict=True) if any(map(is_deleted, part.arrays))
    ]


def is_deleted(array: Any) -> bool:
    """Whether this was an array, and its buffer was donated."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.is_deleted()


def check_fits(state: State, kinds: Iterable[str], hint: str | None = None) -> None:
    """Raises where a kind's arrays have not the shapes and dtypes of the plan (as inside `jax.vmap`, or after it)."""
    odd = misfits(state._plan, {kind: state.part(kind).arrays for kind in kinds})
    if odd:
        raise unfitting(state._plan, {kind: state.part(kind).arrays for kind in state._plan.kinds}, odd, hint)


def refuse_shared(state: State) -> None:
    """Raises where one array stands in two leaves: a step that writes both would donate it twice."""
    sets = [part.ids() for part in state._parts]
    if len(set().union(*sets)) == sum(len(part.arrays) for part in state._parts):
        return
    seen: dict[int, tuple[str, int]] = {}
    for kind, part in zip(state._plan.kinds, state._parts, strict=True):
        for position, array in enumerate(part.arrays):
            if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
                continue
            other = seen.setdefault(id(array), (kind, position))
            if other != (kind, position):
                rows = state._plan._leaf_of_slot
                _raise_shared(rows[kind][position], rows[other[0]][other[1]])


def _raise_shared(one: Leaf, other: Leaf) -> None:
    raise StructureError(
        f"{format_path(other.path)} and {format_path(one.path)} share one array; a step could not write them apart.",
        leaves=[other, one],
        kind=one.kind,
        hint="give one of them a copy: jax.tree.map(jnp.copy, part)",
    )
