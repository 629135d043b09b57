"""The contract of a step: what it may write, resolved for one plan.

`@sw.step` may write exactly the kinds that it names.  `@sw.train_step` may also write what training is expected to
move:  every kind that is neither frozen, nor ephemeral, nor holds `nnx.Param`.  The kinds that it differentiates are
written by their optimizers alone.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.step.trace import ITS_OPTIMIZER, Traced
from statewise.errors import DeclarationError, StructureError

__all__ = ["Contract", "check_loss", "plain_contract", "train_contract"]


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a step may do to a state of one plan.

    Attributes:
      allowed: the kinds that its function may write.
      named: the kinds among them that its decorator names.
      why_not: for some of the other kinds, why they may not be written.
      groups: the optimizers that it runs.
      trains: whether it differentiates.
      has_aux: whether its function returns (loss, aux).
      returns_state: whether it returns a state beside its output.
      hint: the decorator with other writes; `{kinds}` stands for them.
    """

    allowed: frozenset[str]
    named: tuple[str, ...]
    why_not: dict[str, str]
    groups: tuple[OptimizerGroup, ...]
    trains: bool
    has_aux: bool
    returns_state: bool
    hint: str


def plain_contract(plan: PlanTables, name: str, writes: Sequence[str], options: str = "") -> Contract:
    """Returns the contract of `@sw.step(writes=...)`; `options` is what `describe_options` returns."""
    _check_writable(plan, name, writes)
    return Contract(
        allowed=frozenset(writes),
        named=tuple(writes),
        why_not=_frozen(plan),
        groups=(),
        trains=False,
        has_aux=False,
        returns_state=bool(writes),
        hint=f"@sw.step(writes={{kinds}}{options})",
    )


def train_contract(
    plan: PlanTables,
    name: str,
    wrt: Sequence[str] | None,
    writes: Sequence[str] | None,
    has_aux: bool,
    options: str = "",
) -> Contract:
    """Returns the contract of `@sw.train_step(wrt=..., writes=...)`; `options` as for `plain_contract`."""
    groups = _groups(plan, name, wrt)
    trained = [kind for group in groups for kind in group.kinds if kind not in (writes or ())]
    if writes is None or writes:
        _check_writable(plan, name, writes or ())
        allowed = {kind for kind in plan.kinds if _moves_in_training(plan, kind)} | set(writes or ())
    else:
        allowed = set()
    why_not = _frozen(plan) | dict.fromkeys(trained, ITS_OPTIMIZER)
    return Contract(
        allowed=frozenset(allowed - set(trained)),
        named=tuple(writes or ()),
        why_not=why_not,
        groups=groups,
        trains=True,
        has_aux=has_aux,
        returns_state=True,
        hint=f"@sw.train_step(writes={{kinds}}{describe_options(wrt=wrt, has_aux=has_aux)}{options})",
    )


def _moves_in_training(plan: PlanTables, kind: str) -> bool:
    declared = plan.kinds[kind]
    holds_params = any(row.kind == kind and issubclass(row.type, nnx.Param) for row in plan.rows)
    return not declared.frozen and declared.saved and not holds_params


def _frozen(plan: PlanTables) -> dict[str, str]:
    return {name: "the kind is frozen" for name, kind in plan.kinds.items() if kind.frozen}


def _check_writable(plan: PlanTables, name: str, writes: Sequence[str]) -> None:
    for kind in writes:
        if kind not in plan.kinds:
            raise unknown_kind(kind, plan.kinds)
        if plan.kinds[kind].frozen:
            raise DeclarationError(
                f"{name} declares that it writes {kind!r}, which is frozen.",
                kind=kind,
                hint=f"take {kind!r} out of writes, or declare the kind with frozen=False",
            )


def _groups(plan: PlanTables, name: str, wrt: Sequence[str] | None) -> tuple[OptimizerGroup, ...]:
    """Returns the optimizers of the kinds to differentiate; a joint update needs all of its kinds."""
    if not plan.optimizers:
        hint = "plan = kinds.plan(model, optimizers={'params': optax.adamw(3e-4)})"
        if any(issubclass(row.type, nnx.OptState) for row in plan.rows):
            moving = tuple(name for name, kind in plan.kinds.items() if plan[name] and kind.saved and not kind.frozen)
            body = f"@sw.step(writes={moving!r})  # if it updates the planned nnx.Optimizer itself"
            hint = f"{body}\nor, if it only returns the loss: {hint}"
        raise DeclarationError(f"{name} trains, but the plan has no optimizer.", hint=hint)
    if wrt is None:
        return plan.optimizers
    for kind in wrt:
        if kind not in plan.kinds:
            raise unknown_kind(kind, plan.kinds)
        if not any(kind in group.kinds for group in plan.optimizers):
            raise DeclarationError(
                f"{name} differentiates {kind!r}, which has no optimizer in the plan.",
                kind=kind,
                hint=f"optimizers={{{kind!r}: optax.adamw(3e-4)}}; for gradients alone: sw.value_and_grad",
            )
    chosen = tuple(group for group in plan.optimizers if set(group.kinds) & set(wrt))
    for group in chosen:
        if not set(group.kinds) <= set(wrt):
            raise DeclarationError(
                f"{', '.join(group.kinds)} are updated jointly; {name} names only some of them in wrt.",
                kind=group.kinds[0],
                hint=f"wrt={group.kinds!r}, or a separate optimizer for each",
            )
    if not chosen:
        raise DeclarationError(f"{name} differentiates nothing: wrt is empty.", hint="wrt='params', or @sw.step")
    return chosen


def check_loss(traced: Traced, contract: Contract, captures: bool, name: str) -> None:
    """Raises where the function of a train step does not return a loss: a real scalar, alone or with aux."""
    tree = traced.out_tree.children()[0] if captures else traced.out_tree
    if contract.has_aux:
        parts = tree.children()
        if len(parts) != 2 or tree.node_data() is None or tree.node_data()[0] is not tuple:
            raise StructureError(
                f"{name} has has_aux=True, but does not return (loss, aux).", hint="return loss, {'logits': logits}"
            )
        tree = parts[0]
    if tree != jax.tree.structure(0):
        hint = "@sw.train_step(has_aux=True)" if tree.num_leaves > 1 else "return the loss"
        raise StructureError(f"{name} returns {tree}, not a loss.", hint=hint)
    loss = traced.effects.jaxpr.outvars[0].aval
    if loss.shape != ():
        raise StructureError(
            f"The loss of {name} is not a scalar: its shape is {loss.shape}.", hint="return loss.mean()"
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        hint = (
            "return loss.real" if jnp.issubdtype(loss.dtype, jnp.complexfloating) else "return loss.astype(jnp.float32)"
        )
        raise StructureError(f"The loss of {name} is {loss.dtype}, not a real floating-point number.", hint=hint)


def describe_options(**options: Any) -> str:
    """Returns, as code, the options of a decorator other than `writes` that differ from their defaults.

    Braces are doubled, because `format` fills in the result.  A value whose repr is not code becomes an ellipsis.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    shown = "".join(f", {name}={_as_code(value)}" for name, value in given.items())
    return shown.replace("{", "{{").replace("}", "}}")


def _as_code(value: Any) -> str:
    if isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    try:
        ast.literal_eval(repr(value))
    except (SyntaxError, ValueError):
        return "..."
    return repr(value)
