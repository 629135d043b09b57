"""Rules of restarts: what a kind's function makes of its leaves, found by tracing it for their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.nnx_graph import ArraySpec, spec_of
from statewise._src.common.paths import Path
from statewise._src.inspect.lint.finding import Found, Rule
from statewise._src.inspect.lint.subject import Subject
from statewise._src.plan.fresh_values import takes
from statewise._src.plan.kind import Kind

__all__ = ["RULES"]

_DRAWS = ("random_bits", "random_seed", "random_wrap", "random_fold_in", "rng_bit_generator", "threefry2x32")


def _zeroed(subject: Subject) -> Iterator[Found]:
    """Adapters whose module has every factor at zero: by their kinds' restart, or as they are."""
    modules: dict[Path, list[int]] = {}
    for number in subject.of_type(nnx.LoRAParam):
        modules.setdefault(subject.found.paths[number][:-1], []).append(number)
    restarted, are = [], []
    for numbers in modules.values():
        if len(numbers) < 2:
            continue
        if all(_restarts_at_zero(subject, number) for number in numbers):
            restarted += numbers
        elif all((facts := subject.facts.get(number)) is not None and facts.zero for number in numbers):
            are += numbers
    if restarted:
        kinds = list(dict.fromkeys(subject.claims[number] or "" for number in restarted))
        last = subject.name(restarted[-1])
        yield Found(
            f"The restart of {', '.join(kinds)} makes every factor of an adapter zero.",
            subject.rows(restarted),
            _declared(
                subject,
                kinds[0],
                f"lambda array, key, path: jnp.zeros_like(array) if path[-1] == {last!r} else "
                "nnx.initializers.he_uniform()(key, array.shape, array.dtype)",
            ),
        )
    if are:
        yield Found(
            "Every factor of an adapter is zero.",
            subject.rows(are),
            f"{subject.target(are[0])} = nnx.LoRAParam(nnx.initializers.he_uniform()(key, shape, dtype))  # but one",
        )


def _restarts_at_zero(subject: Subject, number: int) -> bool:
    kind, spec = _restarted(subject, number)
    if kind is None or spec is None or not jnp.issubdtype(spec.dtype, jnp.inexact):
        return False
    jaxpr = _traced(kind, spec, subject.found.paths[number])
    return jaxpr is not None and _is_zero(jaxpr)


def _restarted(subject: Subject, number: int) -> tuple[Kind | None, ArraySpec | None]:
    name = subject.claims[number]
    kind = subject.kinds[name] if name is not None else None
    value = subject.values[number]
    if kind is None or kind.restart is None or kind.frozen or value is None:
        return None, None
    return kind, spec_of(value)


def _traced(kind: Kind, spec: ArraySpec, path: Path) -> Any:
    """The jaxpr of a kind's restart for an array of this shape; None where the function refuses it."""
    fresh, wants = kind.restart, takes(kind.restart)
    assert fresh is not None, "a kind without a restart is not looked at"
    named: dict[str, Any] = {"path": path} if wants.path else {}
    shape = list(spec.shape)
    if wants.key and kind.batch_axis is not None and -len(shape) <= kind.batch_axis < len(shape):
        del shape[kind.batch_axis]
    array = jax.ShapeDtypeStruct(tuple(shape), spec.dtype)

    def restart(array: jax.Array, key: jax.Array) -> Any:
        return fresh(array, **named, **({"key": key} if wants.key else {}))

    try:
        return jax.make_jaxpr(restart)(array, jax.eval_shape(lambda: jax.random.key(0)))
    except Exception as error:  # a user's function raises what it likes; `state.restart` shows it as it is
        if isinstance(error, MemoryError | RecursionError):
            raise
        return None


def _is_zero(closed: Any) -> bool:
    """Whether what a jaxpr gives is zero, told without running it: a literal zero, spread, cast or reshaped."""
    jaxpr = compat.inner_jaxpr(closed)
    return all(_zero_var(jaxpr, dict(zip(jaxpr.constvars, closed.consts, strict=True)), var) for var in jaxpr.outvars)


_MOVES = frozenset(
    {"broadcast_in_dim", "convert_element_type", "reshape", "copy", "copy_p", "transpose", "squeeze", "neg"}
)


def _zero_var(jaxpr: Any, known: dict[Any, Any], var: Any) -> bool:
    if isinstance(var, compat.Literal):
        return _all_zero(var.val)
    if var in known:
        return known[var] if isinstance(known[var], bool) else _all_zero(known[var])
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None:  # an input
        return False
    name = eqn.primitive.name
    if name in _MOVES:
        return _zero_var(jaxpr, known, eqn.invars[0])
    if name == "mul":
        return any(_zero_var(jaxpr, known, operand) for operand in eqn.invars)
    if name in ("add", "sub"):
        return all(_zero_var(jaxpr, known, operand) for operand in eqn.invars)
    inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if name in ("jit", "pjit", "closed_call", "core_call") and inner is not None:
        body = compat.inner_jaxpr(inner)
        given = {
            inside: _zero_var(jaxpr, known, outside) for inside, outside in zip(body.invars, eqn.invars, strict=True)
        }
        given |= dict(zip(body.constvars, getattr(inner, "consts", ()), strict=False))
        return _zero_var(body, given, body.outvars[eqn.outvars.index(var)])
    return False


def _all_zero(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        return False
    return bool(jnp.all(jnp.asarray(value) == 0))


def _declared(subject: Subject, name: str, restart: str) -> str:
    """The declaration of a kind with another restart, as code; one that takes a key is not called by a restore."""
    keep = ", missing='keep'" if subject.kinds[name].missing == "restart" else ""
    return f"kinds = kinds.replace({name}=dataclasses.replace(kinds[{name!r}], restart={restart}{keep}))"


def _alike(subject: Subject) -> Iterator[Found]:
    """Restarts that draw without a key: what they draw from is the same each time."""
    for name in subject.kinds:
        numbers = [number for number, claim in enumerate(subject.claims) if claim == name]
        drawing = [number for number in numbers if _draws_alike(subject, number)]
        if drawing:
            yield Found(
                f"The restart of {name} draws from a key of its own.",
                subject.rows(drawing),
                _declared(subject, name, "lambda array, key: jax.random.normal(key, array.shape, array.dtype)"),
            )


def _draws_alike(subject: Subject, number: int) -> bool:
    kind, spec = _restarted(subject, number)
    if kind is None or spec is None or takes(kind.restart).key or issubclass(subject.types[number], nnx.RngState):
        return False  # a stream may well be made from the stream of now
    jaxpr = _traced(kind, spec, subject.found.paths[number])
    return jaxpr is not None and _draws(compat.inner_jaxpr(jaxpr))


def _draws(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _DRAWS:
            return True
        for value in eqn.params.values():
            inner = compat.inner_jaxpr(value)
            if hasattr(inner, "eqns") and _draws(inner):
                return True
    return False


RULES = (
    Rule(
        "adapter-of-zeros",
        "the gradient of each factor is a product with the other: where all are zero, the adapter never learns",
        _zeroed,
    ),
    Rule(
        "restart-draws-alike",
        "every slot, every restart and every leaf of one shape gets the very same numbers",
        _alike,
    ),
)
