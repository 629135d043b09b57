"""The contract of a step: what it may write, resolved for one plan.

`@sw.step` may write exactly the kinds that it names.  `@sw.train_step` may also write what training is expected to
move: every kind that is neither frozen, nor ephemeral, nor holds `nnx.Param`.  The kinds that it differentiates are
written by their optimizers alone.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.graphdef import called
from statewise._src.common.nnx_graph import numbered
from statewise._src.common.paths import Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.plan.kind import unknown_kind
from statewise._src.plan.optimizer_state import OptimizerGroup
from statewise._src.plan.tables import PlanTables
from statewise._src.step.trace import Traced, objects_of
from statewise.errors import DeclarationError, StructureError, UndeclaredWriteError

__all__ = ["Contract", "check_loss", "check_writes", "describe_options", "plain_contract", "train_contract"]


@dataclasses.dataclass(frozen=True)
class Contract:
    """The permissions of a step on the states of one plan.

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

    def with_writes(self, plan: PlanTables, kinds: Iterable[str]) -> str:
        """Returns the decorator, as code, with these kinds in `writes` beside those that it names."""
        return self.hint.format(kinds=repr(tuple(sorted({*self.named, *kinds}, key=list(plan.kinds).index))))


def plain_contract(plan: PlanTables, name: str, writes: Sequence[str], options: str) -> Contract:
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
    plan: PlanTables, name: str, wrt: Sequence[str] | None, writes: Sequence[str] | None, has_aux: bool, options: str
) -> Contract:
    """Returns the contract of `@sw.train_step(wrt=..., writes=...)`; the arguments are as for `plain_contract`."""
    groups = _groups(plan, name, wrt)
    trained = [kind for group in groups for kind in group.kinds if kind not in (writes or ())]
    _check_writable(plan, name, writes or ())
    allowed = set(writes or ())
    if writes is None or writes:  # empty: the function may write nothing, not even the defaults
        allowed |= {kind for kind in plan.kinds if _moves_in_training(plan, kind)}
    return Contract(
        allowed=frozenset(allowed - set(trained)),
        named=tuple(writes or ()),
        why_not=_frozen(plan) | dict.fromkeys(trained, ITS_OPTIMIZER),
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


# Why the function of a train step may not write a kind.
ITS_OPTIMIZER = "written by its optimizer alone"


def check_writes(
    plan: PlanTables, traced: Traced, contract: Contract, name: str, evaluated: Callable[[], Traced]
) -> None:
    """Checks that the function writes only kinds that it may write.

    Args:
      plan: the plan.
      traced: the traced call.
      contract: what the step may do.
      name: the step's name.
      evaluated: traces the same call after `model.eval()`; called only if there is something to reject.
    """
    undeclared = [(kind, position) for kind, position in traced.written if kind not in contract.allowed]
    if not undeclared:
        return
    why, owners, problems = contract.why_not, _owners(plan), Problems()
    for kind, position in undeclared:
        leaf = plan.by_kind[kind][position].leaf
        problems.add(leaf, f"written in {owners[leaf.path]}" + (f"; {why[kind]}" if kind in why else ""))
    kinds = tuple(dict.fromkeys(kind for kind, _ in undeclared))
    free = [kind for kind in kinds if kind not in why]
    lines = [contract.with_writes(plan, free)] if free else []
    trained = [kind for kind in kinds if why.get(kind) == ITS_OPTIMIZER]
    if trained:
        # nnx.SpectralNorm and nnx.WeightNorm do this; the update is then applied on top of the function's writes.
        lines.append(f"if a layer normalizes its own weights: {contract.with_writes(plan, trained)}")
    lines += _eval_hint(plan, undeclared, contract, evaluated)
    raise UndeclaredWriteError(
        f"{name} writes {', '.join(kinds)}, which it does not declare.",
        leaves=problems.leaves,
        kind=kinds[0],
        hint="\nor, ".join(lines),
    )


# What a user's function may raise; an error of JAX or of Statewise is one of these too.
_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _eval_hint(
    plan: PlanTables, undeclared: Sequence[tuple[str, int]], contract: Contract, evaluated: Callable[[], Traced]
) -> list[str]:
    """Returns the hint to evaluate, if the function then writes fewer undeclared kinds, and what is left to declare."""
    try:
        written = set(evaluated().written)
    except _RAISED:  # with other flags the user's function fails: then evaluating does not help
        return []
    left = {kind for kind, position in undeclared if (kind, position) in written}
    if left & set(contract.why_not) or written.issuperset(undeclared):
        return []
    line = f"if the function only evaluates: {called('model.eval', graphdef=plan.graphdef)} as its first line"
    return [f"{line}, and {contract.with_writes(plan, left)}" if left else line]


def _owners(plan: PlanTables) -> dict[Path, str]:
    """Returns, for each leaf, a description of the module that holds it."""
    owners = {}
    objects: Any = objects_of(plan)
    for row in plan.rows:
        holder, length = (objects if plan.several else objects[0]), 0
        owner = type(holder).__name__
        # The deepest module on the way counts: not a list or dict in it, nor the random streams.
        for depth, key in enumerate(numbered(row.path, plan.names)[:-1], start=1):
            holder = getattr(holder, key) if isinstance(key, str) and hasattr(holder, key) else holder[key]
            first = plan.several and depth == 1  # one of several objects, which need not be a module
            if first or (isinstance(holder, nnx.Module) and not isinstance(holder, (nnx.Rngs, nnx.RngStream))):
                owner, length = type(holder).__name__, depth
        owners[row.path] = f"{owner} {format_path(row.path[:length])}" if length else owner
    return owners


def check_loss(traced: Traced, contract: Contract, captures: bool, weighted: bool, name: str) -> Any:
    """Checks that the function of a train step returns a loss: a real scalar, alone, with a weight, or with aux.

    Returns:
      the structure of the step's output, which does not contain the weight.
    """
    # With `capture=` the output is (out, captured); the loss is the first leaf either way.
    tree, *captured = traced.out_tree.children() if captures else (traced.out_tree,)
    # A weighted step says by what it returns whether there is aux.
    has_aux = contract.has_aux or (weighted and len(tree.children()) == 3)
    names = ["loss", *["weight"] * weighted, *["aux"] * has_aux]
    parts, options = [tree], ", ".join(["has_aux=True"] * contract.has_aux + ["weighted=True"] * weighted)
    if len(names) > 1:
        parts = tree.children()
        if len(parts) != len(names) or tree.node_data() is None or tree.node_data()[0] is not tuple:
            returned = ", ".join(names).replace("aux", "{'logits': logits}").replace("weight", "mask.sum()")
            raise StructureError(
                f"{name} has {options}, but does not return ({', '.join(names)}).", hint=f"return {returned}"
            )
    if parts[0] != jax.tree.structure(0):
        hint = "@sw.train_step(has_aux=True)" if parts[0].num_leaves > 1 else "return the loss"
        if not weighted and parts[0] == jax.tree.structure((0, 0)):
            hint += "\nor, if the second is the weight of the batch: @sw.train_step(weighted=True)"
        raise StructureError(f"{name} returns {parts[0]}, not a loss.", hint=hint)
    if weighted:
        _check_weight(parts[1], traced.effects.jaxpr.outvars, name)
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
    result: Any = (0, _filled(parts[-1])) if has_aux else 0
    return jax.tree.structure((result, _filled(captured[0])) if captures else result)


def _filled(tree: Any) -> Any:
    return jax.tree.unflatten(tree, range(tree.num_leaves))


def _check_weight(tree: Any, outputs: Sequence[Any], name: str) -> None:
    """Checks that the second output of a weighted step is a real scalar."""
    if tree != jax.tree.structure(0):
        raise StructureError(f"{name} returns {tree}, not a weight.", hint="return loss, mask.sum()")
    weight = outputs[1].aval
    if weight.shape != ():
        raise StructureError(
            f"The weight of {name} is not a scalar: its shape is {weight.shape}.", hint="return loss, mask.sum()"
        )
    if not any(jnp.issubdtype(weight.dtype, family) for family in (jnp.floating, jnp.integer)):
        raise StructureError(
            f"The weight of {name} is {weight.dtype}, not a real number.", hint="return loss, mask.sum()"
        )


def describe_options(**options: object) -> str:
    """Returns, as code, the options of a decorator other than `writes` that differ from their defaults.

    Braces are doubled, because `format` fills in the result.  A value whose repr is not code becomes an ellipsis.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != ()}
    shown = "".join(f", {name}={_as_code(value)}" for name, value in given.items())
    return shown.replace("{", "{{").replace("}", "}}")


def _as_code(value: object) -> str:
    if isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    try:
        ast.literal_eval(repr(value))
    except (SyntaxError, ValueError):
        return "..."
    return repr(value)
