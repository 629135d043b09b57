"""The only package with differences between versions of JAX, Flax and Orbax.

Everything here has a public import path in the libraries.  A function is here for one of two reasons: its name or its
parameters differ between the supported versions (jax 0.10 to 0.12, flax 0.12.8 to 0.12.12), or its import path is not
guaranteed to be stable: `jax.core`, `jax.extend`, `jax.interpreters` and `jax.experimental` are imported here only.

- here: tracers, processes, Variables, versions;
- `jaxprs`: the classes of a jaxpr, and what the parameters of its equations say;
- `primitives`: the names of primitives, by what they do.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import flax
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.extend import core as jex_core

__all__ = [
    "MetricState",
    "NestedState",
    "RoPE",
    "Tracer",
    "broadcast_from_first_process",
    "flags_of_processes",
    "is_hijax",
    "is_nnx_state",
    "is_untraced",
    "is_variable",
    "jit_is_disabled",
    "other_processes",
    "reference",
    "sow_needs_capture",
    "state_type",
    "state_types",
    "values_of_processes",
    "variable_type",
    "versions",
    "without_mesh",
]

Tracer = jax.core.Tracer
_NO_MESH = jax.sharding.Mesh(np.empty((), dtype=object), ())
MetricState: type = nnx.metrics.MetricState
# Rotary position embeddings, a layer that flax 0.12.8 does not have.
RoPE: type | None = getattr(nnx, "RoPE", None)

# Leaves nested by path, as NNX gives them.  For type checkers it is what the installed Flax declares.
if TYPE_CHECKING:
    NestedState = nnx.State[Any, Any]
else:
    NestedState = getattr(nnx, "State", dict) | dict


def sow_needs_capture() -> bool:
    """Returns whether `sow` and `perturb` do nothing outside `nnx.capture`; flax 0.12.8 does not have this setting."""
    return bool(getattr(flax.config, "nnx_sow_capture_noop", False))


def jit_is_disabled() -> bool:
    """Returns whether `jax.disable_jit` is active; JAX's configuration has no typed attributes."""
    config: Any = jax.config
    return bool(config.jax_disable_jit)


def _untraced_state() -> Any:
    # Each thread has a state of its own, and a new one traces nothing: this module may be imported inside of a trace,
    # when one of the public names is first used there.
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.append(jex_core.get_opaque_trace_state()))
    thread.start()
    thread.join()
    return states[0]


_UNTRACED = _untraced_state()


def is_untraced() -> bool:
    """Returns whether nothing is being traced, mapped or differentiated; every call of a step pays for it."""
    return bool(jex_core.get_opaque_trace_state() == _UNTRACED)


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Returns a context without the mesh of `jax.set_mesh`, under which JAX copies no array that is elsewhere."""
    if is_untraced() and not jax.sharding.get_abstract_mesh().empty:  # under tracing no mesh can be set
        return jax.set_mesh(_NO_MESH)
    return contextlib.nullcontext()


def flags_of_processes(flag: bool) -> list[int]:
    """Returns the numbers of the processes that give True; every process calls this, and waits for the others."""
    return [int(number) for number in np.flatnonzero(values_of_processes(np.asarray(flag, np.uint32)))]


class OtherProcessError(RuntimeError):
    """Another process does not take part in what all of them do, or has failed in it."""


def values_of_processes(values: np.ndarray) -> np.ndarray:
    """Returns an array from every process, along a new first axis; all give one of the same shape.

    Raises:
      OtherProcessError: one of them does not answer.
    """
    with other_processes():
        return np.asarray(multihost_utils.process_allgather(values))


def broadcast_from_first_process(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array in every process; all give one of the same shape.

    Raises:
      OtherProcessError: one of them does not answer.
    """
    with other_processes():
        return np.asarray(multihost_utils.broadcast_one_to_all(values))


@contextlib.contextmanager
def other_processes() -> Iterator[None]:
    """Raises an `OtherProcessError` if another process does not answer to what a block asks all of them."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # how JAX reports that one of them does not answer
        text = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise OtherProcessError(f"another process has ended or cannot be reached: {text}") from error


def variable_type(leaf: Any) -> type:
    """Returns the type of a leaf: a Variable's own (under hijax `type()` is another class), or `jax.Array`."""
    return leaf.var_type if is_variable(leaf) else jax.Array


_variables: dict[type, bool] = {}


def is_variable(leaf: Any) -> bool:
    """Returns whether a leaf is a Variable; NNX's own check is slow, so its answer is cached by type."""
    known = _variables.get(type(leaf))
    if known is None:
        if isinstance(leaf, Tracer):  # a tracer's type does not say what it stands for: a hijax Variable, or an array
            return isinstance(leaf, nnx.Variable)
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


def is_hijax(leaf: Any) -> bool:
    """Returns whether a leaf is a hijax Variable."""
    return reference(leaf).startswith("hijax")


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
