"""The only module with differences between versions of JAX, Flax and Orbax.

Everything here has a public import path in the libraries.  A function is here for one of two reasons: its name or its
parameters differ between the supported versions (jax 0.10 to 0.12, flax 0.12.8 to 0.12.12), or its import path is not
guaranteed to be stable.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

__all__ = [
    "Literal",
    "MetricState",
    "NestedState",
    "Tracer",
    "dce",
    "eval_jaxpr",
    "inner_jaxpr",
    "is_nnx_state",
    "is_variable",
    "jit_is_disabled",
    "reference",
    "scan_counts",
    "state_type",
    "state_types",
    "variable_type",
    "versions",
]

Literal = jex_core.Literal
Tracer = jax.core.Tracer
MetricState: type = nnx.metrics.MetricState

# Leaves nested by path, as NNX gives them.  For type checkers it is what the installed Flax declares.
if TYPE_CHECKING:
    NestedState = nnx.State[Any, Any]
else:
    NestedState = getattr(nnx, "State", dict) | dict


def inner_jaxpr(jaxpr: Any) -> Any:
    """Returns the open jaxpr: parameters of primitives hold closed ones on jax 0.10 and open ones on 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Returns how many operands of a `scan` equation are constants, and how many are carried.

    jax 0.10 has both among the parameters, 0.12 does not.  On both, a scanned operand (or result) has one more axis
    outside the body than inside, and the operands are in the order constants, carry, scanned.
    """
    body = inner_jaxpr(eqn.params["jaxpr"])
    scanned, stacked = (
        sum(len(outer.aval.shape) != len(inner.aval.shape) for outer, inner in zip(outside, inside, strict=True))
        for outside, inside in ((eqn.invars, body.invars), (eqn.outvars, body.outvars))
    )
    carry = len(eqn.outvars) - stacked
    return len(eqn.invars) - scanned - carry, carry


def dce(jaxpr: Any, used: Sequence[bool]) -> tuple[Any, list[bool]]:
    """Removes what the used outputs do not need; returns the reduced open jaxpr and which inputs it reads."""
    smaller, reads = partial_eval.dce_jaxpr(jaxpr, list(used))
    return smaller, list(reads)


def eval_jaxpr(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs an open jaxpr on values or tracers."""
    return jax.core.eval_jaxpr(jaxpr, consts, *args)


def jit_is_disabled() -> bool:
    """Returns whether `jax.disable_jit` is active; JAX's configuration has no typed attributes."""
    config: Any = jax.config
    return bool(config.jax_disable_jit)


def variable_type(leaf: Any) -> type:
    """Returns the type of a leaf: a Variable's own (under hijax `type()` is another class), or `jax.Array`."""
    return leaf.var_type if is_variable(leaf) else jax.Array


_variables: dict[type, bool] = {}


def is_variable(leaf: Any) -> bool:
    """Returns whether a leaf is a Variable; NNX's own check is slow, so its answer is cached by type."""
    known = _variables.get(type(leaf))
    if known is None:
        known = _variables[type(leaf)] = isinstance(leaf, nnx.Variable)
    return known


_plain: dict[type, bool] = {}


def reference(leaf: Any) -> str:
    """Returns what makes a leaf other than a plain Variable or array: that it is a reference, or hijax; else empty.

    `isinstance` and the metadata are slow, so for a plain Variable only `ref` is read.
    """
    cls = type(leaf)
    plain = _plain.get(cls)
    if plain is None:
        plain = _plain[cls] = issubclass(cls, nnx.Variable)
    if plain:
        return "ref=True" if leaf.ref else ""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        return ""
    if isinstance(leaf, nnx.Variable):  # an instance of another class that passes for a Variable
        return "hijax=True, ref=True" if leaf.ref else "hijax=True"
    return "a reference outside of a Variable" if isinstance(leaf, jax.Ref) else ""


def state_type() -> type:
    """Returns the container in which this Flax gives leaves nested by path: `nnx.State`, or the dict that replaces it.

    This is the only switch: everything that Statewise returns nested by path is in this container.
    """
    return _type_returned_by(nnx.state)


def state_types() -> tuple[type, ...]:
    """Returns the containers of leaves nested by path that this Flax knows, `state_type` first."""
    return tuple(dict.fromkeys((state_type(), *_STATES, dict)))


_STATES: tuple[type, ...] = (nnx.State,) if hasattr(nnx, "State") else ()


def is_nnx_state(value: Any) -> bool:
    """Returns whether a value is an `nnx.State`; never true on a Flax that has only dicts."""
    return isinstance(value, _STATES)


@functools.cache
def _type_returned_by(state: Any) -> type:
    return type(state(nnx.Module()))


def versions() -> dict[str, str]:
    """Returns the versions of Python, Statewise, and the libraries that its files depend on."""
    ours = {"statewise": sys.modules["statewise"].__version__}  # correct also when running from a source folder
    return ours | _versions_of_others()


@functools.cache
def _versions_of_others() -> dict[str, str]:
    """Returns the other versions; cached, because reading them from files is the slowest part of a manifest."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}
