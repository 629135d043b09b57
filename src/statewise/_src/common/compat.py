"""The one place that knows JAX, Flax and Orbax versions apart.

Everything here is reachable by a public import path of the libraries.  A function stands here for one of
two reasons: its name or its parameters differ between the versions that Statewise supports (jax 0.10 to
0.12, flax 0.12.8 to 0.12.12), or its import path carries no promise of stability.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from flax import nnx
from jax.extend import core as jex_core
from jax.interpreters import partial_eval

__all__ = [
    "Literal",
    "MetricState",
    "Tracer",
    "dce",
    "eval_jaxpr",
    "inner_jaxpr",
    "is_variable",
    "jit_is_disabled",
    "reference",
    "scan_counts",
    "variable_type",
    "versions",
]

Literal = jex_core.Literal
Tracer = jax.core.Tracer
MetricState: type = nnx.metrics.MetricState


def inner_jaxpr(jaxpr: Any) -> Any:
    """The open jaxpr: parameters of primitives hold closed ones on jax 0.10 and open ones on 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` equation are constants, and how many are carried.

    jax 0.10 names both among the parameters, 0.12 does not.  On each, a scanned operand (or result) has one
    axis more outside the body than inside; operands stand in the order constants, carry, scanned.
    """
    body = inner_jaxpr(eqn.params["jaxpr"])
    scanned = sum(
        len(outer.aval.shape) != len(inner.aval.shape) for outer, inner in zip(eqn.invars, body.invars, strict=True)
    )
    stacked = sum(
        len(outer.aval.shape) != len(inner.aval.shape) for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    carry = len(eqn.outvars) - stacked
    return len(eqn.invars) - scanned - carry, carry


def dce(jaxpr: Any, used: Sequence[bool]) -> tuple[Any, list[bool]]:
    """Removes what the used outputs do not need; returns the smaller open jaxpr and which inputs it reads."""
    smaller, reads = partial_eval.dce_jaxpr(jaxpr, list(used))
    return smaller, list(reads)


def eval_jaxpr(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Runs an open jaxpr on values or tracers."""
    return jax.core.eval_jaxpr(jaxpr, consts, *args)


def jit_is_disabled() -> bool:
    """Whether `jax.disable_jit` is in force; JAX's configuration has no typed attributes."""
    config: Any = jax.config
    return bool(config.jax_disable_jit)


def variable_type(leaf: Any) -> type:
    """The type of a leaf: the Variable's own (also under hijax, where `type()` is another class), or `jax.Array`."""
    return leaf.var_type if is_variable(leaf) else jax.Array


_variables: dict[type, bool] = {}


def is_variable(leaf: Any) -> bool:
    """Whether a leaf is a Variable; NNX's own answer, which is slow, is remembered by type."""
    known = _variables.get(type(leaf))
    if known is None:
        known = _variables[type(leaf)] = isinstance(leaf, nnx.Variable)
    return known


_plain: dict[type, bool] = {}


def reference(leaf: Any) -> str:
    """What makes a leaf another thing than a plain Variable or array: it is a reference, or hijax's; else nothing.

    `isinstance` and the metadata are slow to ask, so that of a plain Variable only `ref` is asked.
    """
    cls = type(leaf)
    plain = _plain.get(cls)
    if plain is None:
        plain = _plain[cls] = issubclass(cls, nnx.Variable)
    if plain:
        return "ref=True" if leaf.ref else ""
    if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        return ""
    if isinstance(leaf, nnx.Variable):  # of another class, which answers for one
        return "hijax=True, ref=True" if leaf.ref else "hijax=True"
    return "a reference, in no Variable" if isinstance(leaf, jax.Ref) else ""


def versions() -> dict[str, str]:
    """The versions of Python, of Statewise and of the libraries that what it writes depends on."""
    ours = {"statewise": sys.modules["statewise"].__version__}  # also where it runs from a folder, not installed
    return ours | _versions_of_others()


@functools.cache
def _versions_of_others() -> dict[str, str]:
    """They are read from files, which takes longer than all else that a manifest has to be asked for."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: metadata.version(name) for name in names} | {"python": platform.python_version()}
