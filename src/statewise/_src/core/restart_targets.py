"""What a restart renews: which kinds, and of kind `optimizer` which optimizers; and every reason why it cannot.

The kind `optimizer` holds the states of all of a plan's optimizers.  It needs no `restart` of its own: a fresh state is
what the optimizer's own `init` makes of the parameters, as they are after the same call has renewed them.  Where kinds
that have optimizers are restarted with it, theirs begin again and no others: `state.restart("lora", "optimizer")`
leaves the moments of the kind `params` alone.
"""

# No `from __future__ import annotations`: the run-time type checker cannot read postponed ones of a NamedTuple.
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.plan.fresh_values import check_key, takes
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import OPTIMIZER, PlanTables
from statewise.errors import DeclarationError

__all__ = ["Chosen", "choose", "keyed"]


class Chosen(NamedTuple):
    """What a restart renews, static.

    Attributes:
      plan: the plan.
      kinds: the kinds.
      groups: of kind `optimizer`, if it is among them, the optimizers by their numbers.
      whole: whether all of kind `optimizer` is renewed, the state of an `nnx.Optimizer` in the model included.
    """

    plan: PlanTables
    kinds: tuple[str, ...]
    groups: tuple[int, ...]
    whole: bool

    @property
    def by_init(self) -> bool:
        """Whether optimizers begin by their own `init`, not by a function of the kind."""
        return OPTIMIZER in self.kinds and self.plan.kinds[OPTIMIZER].restart is None

    @property
    def needed(self) -> tuple[str, ...]:
        """The kinds whose arrays are read and not renewed: parameters that an optimizer begins with."""
        if not self.by_init:
            return ()
        of = dict.fromkeys(kind for number in self.groups for kind in self.plan.optimizers[number].kinds)
        return tuple(kind for kind in of if kind not in self.kinds)

    def positions(self, kind: str) -> frozenset[int]:
        """Which of a kind's arrays are renewed."""
        if kind != OPTIMIZER or self.whole:
            return frozenset(range(len(self.plan.specs[kind])))
        groups = (self.plan.arrays_of(self.plan.optimizers[number]) for number in self.groups)
        return frozenset(array.position for group in groups for array in group.arrays)

    def axis(self, kind: str) -> int | None:
        """The axis of a kind's slots; None where it has none.

        Optimizer state has that of the parameters unless it declares another, if it is the first: a count has no other.
        """
        declared: int | None = self.plan.kinds[kind].batch_axis
        if kind != OPTIMIZER or declared is not None or _objects_in(self):
            return declared
        of = {self.plan.kinds[name].batch_axis for number in self.groups for name in self.plan.optimizers[number].kinds}
        return 0 if of == {0} else None


def choose(plan: PlanTables, named: Sequence[str], *, by_slot: bool, key: Any) -> Chosen:
    """What a restart of these kinds renews; of all that can be where none is named.

    Raises:
      DeclarationError: kinds that cannot be restarted, or not so; a key that is missing, or that nothing takes.
    """
    chosen = _choose(plan, tuple(dict.fromkeys(named)))
    for name in chosen.kinds:
        _check_kind(chosen, name, by_slot)
    _check_key(chosen, named, by_slot, key)
    return chosen


def keyed(chosen: Chosen) -> tuple[str, ...]:
    """The kinds whose restart takes a key."""
    return tuple(name for name in chosen.kinds if takes(chosen.plan.kinds[name].restart).key)


@functools.lru_cache(maxsize=256)
def _choose(plan: PlanTables, named: tuple[str, ...]) -> Chosen:
    kinds = named or _restartable(plan)
    everything = tuple(range(len(plan.optimizers)))
    if OPTIMIZER not in kinds or not named:
        return Chosen(plan, kinds, everything, True)
    theirs = tuple(at for at, group in enumerate(plan.optimizers) if set(group.kinds).intersection(kinds))
    for at in theirs:
        _check_half(plan, plan.optimizers[at], kinds)
    # Parameters first: the optimizer begins with what they are then.
    kinds = (*(name for name in kinds if name != OPTIMIZER), OPTIMIZER)
    return Chosen(plan, kinds, theirs or everything, not theirs)


def _check_half(plan: PlanTables, group: OptimizerGroup, kinds: Sequence[str]) -> None:
    others = [name for name in group.kinds if name not in kinds]
    if not others:
        return
    mine = [name for name in group.kinds if name in kinds]
    pairs = ", ".join(f"{name!r}: tx" for name in group.kinds)
    raise DeclarationError(
        f"The optimizer of {group.label} is a joint one: with {', '.join(mine)} the moments of {', '.join(others)} "
        "would begin again too.",
        leaves=[leaf for leaf in plan.leaves if leaf.kind in others],
        kind=OPTIMIZER,
        hint=f"an optimizer for each: kinds.plan(model, optimizers={{{pairs}}})\n"
        f"or, if that is meant, the optimizer by itself: state.restart({OPTIMIZER!r})",
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


def _objects_in(chosen: Chosen) -> list[Any]:
    """The leaves of an `nnx.Optimizer` in the model that are renewed: of what parameters, no plan knows."""
    mine = chosen.plan.leaves[: len(chosen.plan.rows)]
    return [leaf for leaf in mine if leaf.kind == OPTIMIZER] if chosen.whole else []


def _check_kind(chosen: Chosen, name: str, by_slot: bool) -> None:
    plan, kind = chosen.plan, chosen.plan.kinds[name]
    if kind.frozen:
        raise DeclarationError(f"Kind {name!r} is frozen and cannot be restarted.", kind=name, hint="frozen=False")
    begins = name == OPTIMIZER and plan.optimizers and not _objects_in(chosen)
    if kind.restart is None and not begins:
        raise DeclarationError(
            f"Kind {name!r} does not declare how a fresh value is made.",
            kind=name,
            hint=_declared(name, f"restart={_fresh(plan, name)}"),
        )
    if not plan.specs[name]:
        raise DeclarationError(
            f"Kind {name!r} has no leaves in this model, so there is nothing to restart.",
            kind=name,
            hint="make the leaves before the plan is made: model.init_cache(...), say",
        )
    if by_slot and chosen.axis(name) is None:
        _check_slots(chosen, name, bool(begins))


def _check_slots(chosen: Chosen, name: str, begins: bool) -> None:
    plan = chosen.plan
    if not begins and not any(spec.shape for spec in plan.specs[name]):
        others = [repr(other) for other in chosen.kinds if chosen.axis(other) is not None]
        raise DeclarationError(
            f"Kind {name!r} has one value for all slots, so it does not restart slot by slot.",
            leaves=plan[name],
            kind=name,
            hint=(
                f"state.restart({', '.join(others)}, where=where)  # and {name!r} goes on as it is\n" if others else ""
            )
            + f"{'or ' if others else ''}all slots: state.restart({', '.join(map(repr, chosen.kinds))})",
        )
    raise DeclarationError(
        f"Kind {name!r} declares no batch_axis, so its slots cannot be told apart.",
        kind=name,
        hint=f"{name}=sw.Kind(nnx.OptState, batch_axis=0)" if begins else _declared(name, "batch_axis=0"),
    )


def _fresh(plan: PlanTables, name: str) -> str:
    """A function that gives fresh values, as code: zeros, where zeros are no rule."""
    if any(jnp.issubdtype(spec.dtype, jax.dtypes.prng_key) for spec in plan.specs[name]):
        return (
            "lambda array, key: jax.random.split(key, array.shape) "
            "if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else jnp.zeros_like(array)"
        )
    if any(issubclass(leaf.type, nnx.LoRAParam) for leaf in plan[name]):  # both factors at zero would never learn
        return (
            f"lambda array, key, path: jnp.zeros_like(array) if path[-1] == {plan[name][-1].path[-1]!r} else "
            "nnx.initializers.he_uniform()(key, array.shape, array.dtype)"
        )
    return "jnp.zeros_like"


def _declared(name: str, handling: str) -> str:
    return f"kinds = plan.kinds.replace({name}=dataclasses.replace(plan.kinds[{name!r}], {handling}))"


def _check_key(chosen: Chosen, named: Sequence[str], by_slot: bool, key: Any) -> None:
    taking = keyed(chosen)
    if key is not None and not taking:
        raise DeclarationError(
            f"key= would do nothing: the restart of {', '.join(chosen.kinds)} takes no key.",
            kind=chosen.kinds[0],
            hint="leave key= out, or take it: "
            "restart=lambda array, key: jax.random.normal(key, array.shape, array.dtype)",
        )
    if key is None and taking:
        given = [*map(repr, named), *(["where=where"] if by_slot else []), "key=jax.random.key(0)"]
        raise DeclarationError(
            f"The restart of {', '.join(taking)} takes a key, and none was given.",
            kind=taking[0],
            hint=f"state.restart({', '.join(given)})  # another key each time",
        )
    if key is not None:
        check_key(key)
