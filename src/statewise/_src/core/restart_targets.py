"""What a restart renews: which kinds, of kind `optimizer` which optimizers, and every reason why it cannot.

The kind `optimizer` holds the states of all of a plan's optimizers.  It needs no `restart` of its own: a fresh state is
what the optimizer's own `init` makes of the parameters, after the same call has renewed them.  If kinds that have
optimizers are restarted with it, only their optimizers restart: `state.restart("lora", "optimizer")` keeps the moments
of the kind `params`.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.plan.arrays import ArrayInfo
from statewise._src.plan.fresh_values import check_key, takes
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError

__all__ = ["Chosen", "call_of", "choose", "slot_axis"]


class Chosen(NamedTuple):
    """What a restart renews, static.

    Attributes:
      plan: the plan.
      kinds: the kinds.
      groups: the indices of the optimizers that restart, if kind `optimizer` is among the kinds.
      whole: whether all of kind `optimizer` is renewed, the state of an `nnx.Optimizer` in the model included.
    """

    plan: PlanTables
    kinds: tuple[str, ...]
    groups: tuple[int, ...]
    whole: bool

    @property
    def by_init(self) -> bool:
        """Returns whether optimizers restart by their own `init`, not by a function of the kind."""
        return OPTIMIZER in self.kinds and self.plan.kinds[OPTIMIZER].restart is None

    @property
    def needed(self) -> tuple[str, ...]:
        """Returns the kinds whose arrays are read but not renewed: the parameters that an optimizer starts from."""
        updated = self.updated if self.by_init else ()
        return tuple(dict.fromkeys(kind for kind in updated if kind not in self.kinds))

    @property
    def updated(self) -> tuple[str, ...]:
        """Returns the kinds that the chosen optimizers update."""
        return tuple(kind for index in self.groups for kind in self.plan.optimizers[index].kinds)

    @property
    def has_objects(self) -> bool:
        """Returns whether the state of an `nnx.Optimizer` in the model is renewed; no plan knows what that updates."""
        return self.whole and any(row.kind == OPTIMIZER for row in self.plan.rows)

    def renewed(self, kind: str) -> tuple[ArrayInfo, ...]:
        """Returns those of a kind's arrays that are renewed."""
        if kind != OPTIMIZER or self.whole:
            return self.plan.by_kind[kind]
        groups = (self.plan.arrays_of(self.plan.optimizers[index]) for index in self.groups)
        return tuple(array for group in groups for array in group.arrays)

    def axis(self, kind: str) -> int | None:
        """Returns the axis of a kind's slots; None if it does not have one."""
        declared: int | None = self.plan.kinds[kind].batch_axis
        if kind != OPTIMIZER or declared is not None or self.has_objects:
            return declared
        # Optimizer state has the axis of its parameters, but only the first: a count per slot has no other.
        return 0 if {self.plan.kinds[name].batch_axis for name in self.updated} == {0} else None


def slot_axis(array: ArrayInfo, axis: int | None) -> int | None:
    """Returns the axis of the slots in one array; None if the array does not have that many dimensions."""
    rank = len(array.spec.shape)
    return axis if axis is not None and -rank <= axis < rank else None


def call_of(kinds: Iterable[str], *options: str) -> str:
    """Returns a call of `State.restart` as code, with these kinds and options."""
    return f"state.restart({', '.join([*map(repr, kinds), *options])})"


def choose(plan: PlanTables, named: Sequence[str], *, by_slot: bool, key: Any) -> Chosen:
    """Returns what a restart of these kinds renews; if none is named, all kinds that can be restarted.

    Raises:
      DeclarationError: kinds that cannot be restarted, or not slot by slot; a key is missing, or nothing takes it.
    """
    chosen = _choose(plan, tuple(dict.fromkeys(named)))
    for name in chosen.kinds:
        _check_kind(chosen, name, by_slot)
    _check_key(chosen, named, by_slot, key)
    return chosen


@functools.lru_cache(maxsize=256)
def _choose(plan: PlanTables, named: tuple[str, ...]) -> Chosen:
    kinds = named or _restartable(plan)
    # By name, kind `optimizer` restarts the optimizers of the other kinds named, or, alone, all of them.
    everything = tuple(range(len(plan.optimizers)))
    if OPTIMIZER not in named:
        return Chosen(plan, kinds, everything, True)
    own = tuple(index for index, group in enumerate(plan.optimizers) if set(group.kinds).intersection(kinds))
    for index in own:
        _check_joint(plan, plan.optimizers[index], kinds)
    # Parameters first: the optimizer then starts from their new values.
    kinds = (*(name for name in kinds if name != OPTIMIZER), OPTIMIZER)
    return Chosen(plan, kinds, own or everything, not own)


def _check_joint(plan: PlanTables, group: OptimizerGroup, kinds: Sequence[str]) -> None:
    """Checks that no kind that keeps its values has a joint optimizer with one that restarts."""
    others = [name for name in group.kinds if name not in kinds]
    if not others:
        return
    restarted = ", ".join(name for name in group.kinds if name in kinds)
    pairs = ", ".join(f"{name!r}: tx" for name in group.kinds)
    raise DeclarationError(
        f"The optimizer of {group.label} is a joint one: with {restarted} the moments of {', '.join(others)} "
        "would restart too.",
        leaves=[leaf for leaf in plan.leaves if leaf.kind in others],
        kind=OPTIMIZER,
        hint=f"an optimizer for each: kinds.plan(model, optimizers={{{pairs}}})\n"
        f"or, if that is meant, the optimizer by itself: {call_of([OPTIMIZER])}",
    )


def _restartable(plan: PlanTables) -> tuple[str, ...]:
    names = tuple(
        name for name, kind in plan.kinds.items() if kind.restart is not None and not kind.frozen and plan.specs[name]
    )
    if not names:
        raise DeclarationError(
            "There is nothing to restart: no kind that has leaves declares how a fresh value is made.",
            hint="cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like)",
        )
    return names


def _check_kind(chosen: Chosen, name: str, by_slot: bool) -> None:
    plan, kind = chosen.plan, chosen.plan.kinds[name]
    if kind.frozen:
        raise DeclarationError(f"Kind {name!r} is frozen and cannot be restarted.", kind=name, hint="frozen=False")
    # The state of an `nnx.Optimizer` in the model cannot restart by `init`: the plan does not have its transformation.
    has_init = name == OPTIMIZER and bool(plan.optimizers) and not chosen.has_objects
    if kind.restart is None and not has_init:
        raise DeclarationError(
            f"Kind {name!r} does not declare how a fresh value is made.",
            kind=name,
            hint=_declared(name, f"restart={_fresh(plan, name)}"),
        )
    if not plan.specs[name]:
        raise DeclarationError(
            f"Kind {name!r} has no leaves in this model, so there is nothing to restart.",
            kind=name,
            hint="make the leaves before the plan is made, as with model.init_cache(...)",
        )
    # Last: a kind that cannot restart at all should not get a hint about its slots.
    if by_slot and chosen.axis(name) is None:
        _check_slots(chosen, name, has_init)


def _check_slots(chosen: Chosen, name: str, has_init: bool) -> None:
    """Raises the error for a kind without an axis for its slots."""
    plan = chosen.plan
    if not has_init and not any(spec.shape for spec in plan.specs[name]):
        others = [other for other in chosen.kinds if chosen.axis(other) is not None]
        keeps = f"{call_of(others, 'where=where')}  # and {name!r} keeps its value\nor " if others else ""
        raise DeclarationError(
            f"Kind {name!r} has one value for all slots, so it does not restart slot by slot.",
            leaves=plan[name],
            kind=name,
            hint=f"{keeps}all slots: {call_of(chosen.kinds)}",
        )
    raise DeclarationError(
        f"Kind {name!r} does not declare a batch_axis, so its slots cannot be distinguished.",
        kind=name,
        hint=f"{name}=sw.Kind(nnx.OptState, batch_axis=0)" if has_init else _declared(name, "batch_axis=0"),
    )


def _fresh(plan: PlanTables, name: str) -> str:
    """Returns a function that makes fresh values, as code: zeros, unless zeros would not do."""
    if any(jnp.issubdtype(spec.dtype, jax.dtypes.prng_key) for spec in plan.specs[name]):
        return (
            "lambda array, key: jax.random.split(key, array.shape) "
            "if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else jnp.zeros_like(array)"
        )
    if any(issubclass(leaf.type, nnx.LoRAParam) for leaf in plan[name]):
        # One factor must not be zero: with both at zero neither would ever get a gradient.
        return (
            f"lambda array, key, path: jnp.zeros_like(array) if path[-1] == {plan[name][-1].path[-1]!r} else "
            "nnx.initializers.he_uniform()(key, array.shape, array.dtype)"
        )
    return "jnp.zeros_like"


def _declared(name: str, handling: str) -> str:
    return f"kinds = plan.kinds.replace({name}=dataclasses.replace(plan.kinds[{name!r}], {handling}))"


def _check_key(chosen: Chosen, named: Sequence[str], by_slot: bool, key: Any) -> None:
    # A key that nothing takes would look as if the restart were random.
    taking = [name for name in chosen.kinds if takes(chosen.plan.kinds[name].restart).key]
    if key is None and taking:
        options = (*(["where=where"] if by_slot else []), "key=jax.random.key(0)")
        raise DeclarationError(
            f"The restart of {', '.join(taking)} takes a key, and none was given.",
            kind=taking[0],
            hint=f"{call_of(named, *options)}  # another key each time",
        )
    if key is not None and not taking:
        raise DeclarationError(
            f"key= would do nothing: the restart of {', '.join(chosen.kinds)} takes no key.",
            kind=chosen.kinds[0],
            hint="leave key= out, or take it: "
            "restart=lambda array, key: jax.random.normal(key, array.shape, array.dtype)",
        )
    if key is not None:
        check_key(key)
