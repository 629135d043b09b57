"""Asserts for the tests of your own code: that nothing is lost in a round trip, retraced, or moved elsewhere.

Each raises `AssertionError` that names every leaf concerned.  Import it as `from statewise import testing`; it is no
part of `import statewise as sw`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.checkpoint.diff.diff import diff
from statewise._src.checkpoint.restore import restore
from statewise._src.checkpoint.save import save
from statewise._src.common.paths import format_path
from statewise._src.core.plan import State
from statewise._src.step.step import Step

__all__ = ["assert_no_retrace", "assert_round_trip", "assert_same", "assert_same_placement", "count_traces"]


class Traces:
    """How often a step was traced.

    Attributes:
      count: how often so far.
    """

    count: int = 0


@contextlib.contextmanager
def count_traces(step: Step[..., Any]) -> Iterator[Traces]:
    """Counts how often a step's function is traced in a block.

    Args:
      step: what `sw.step` or `sw.train_step` made.

    Yields:
      the count, as it grows.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise import testing
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> forward = sw.step(lambda model, x: model(x))
      >>> with testing.count_traces(forward) as traces:
      ...     for size in (1, 1, 4):
      ...         _ = forward(state, jnp.ones((size, 2)))
      >>> traces.count
      2
    """
    traces, fn = Traces(), step.fn

    def counted(*args: Any, **kwargs: Any) -> Any:
        traces.count += 1
        return fn(*args, **kwargs)

    step.fn = counted
    try:
        yield traces
    finally:
        step.fn = fn


def assert_no_retrace(step: Step[..., Any], state: State, /, *args: Any, **kwargs: Any) -> None:
    """Asserts that a second call of a step, on what the first gave back, traces nothing.

    The state stays as it is: the step runs on a copy.

    Args:
      step: what `sw.step` or `sw.train_step` made.
      state: the state to begin with.
      *args: what the step is called with.
      **kwargs: the same, by name.

    Raises:
      AssertionError: it was traced again: something static, a shape, a dtype or a weak type differs in what came back.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise import testing
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> testing.assert_no_retrace(sw.step(lambda model, x: model(x)), state, jnp.ones((1, 2)))
    """
    first = step(jax.tree.map(jnp.copy, state), *args, **kwargs)
    after = first[0] if isinstance(first, tuple) and first and isinstance(first[0], State) else state
    with count_traces(step) as traces:
        step(jax.tree.map(jnp.copy, after), *args, **kwargs)
    if traces.count:
        raise AssertionError(f"{step!r} was traced again in its second call, on the state that the first gave back.")


def assert_same(one: object, other: object) -> None:
    """Asserts that two models, states or checkpoints are the same, leaf by leaf and to the bit.

    Args:
      one: a model, a state, or the path of a checkpoint.
      other: another.

    Raises:
      AssertionError: with the table of what differs.

    Example:
      >>> from flax import nnx
      >>> from statewise import testing
      >>> testing.assert_same(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    """
    found = diff(one, other)
    if found:
        raise AssertionError(str(found))


def assert_same_placement(one: State, other: State) -> None:
    """Asserts that two states of one structure lie alike: the same devices, each with the same part of each array.

    Args:
      one: a state.
      other: another.

    Raises:
      AssertionError: with each array that lies elsewhere; or where they hold other leaves.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise import testing
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> testing.assert_same_placement(state, state.cast(params="bfloat16"))
    """
    left, right = (dict(jax.tree_util.tree_flatten_with_path(state)[0]) for state in (one, other))
    if list(left) != list(right):
        raise AssertionError(f"They hold other leaves: {len(left)} arrays and {len(right)}.")
    moved = []
    for path, array in left.items():
        here, there = array.sharding, right[path].sharding
        if array.ndim != right[path].ndim or not here.is_equivalent_to(there, array.ndim):
            moved.append(f"  {format_path(tuple(key.key for key in path))}: {here} and {there}")
    if moved:
        raise AssertionError("\n".join([f"{len(moved)} of {len(left)} arrays lie elsewhere:", *moved]))


def assert_round_trip(state: State, *, layout: str = "named") -> None:
    """Asserts that a checkpoint of a state restores to the same state, to the bit and where it lay.

    The checkpoint is written to a temporary directory and removed.

    Args:
      state: the state; kinds that are never saved are not compared.
      layout: `"named"` or `"packed"`, as in `sw.save`.

    Raises:
      AssertionError: with the table of what differs, or lies elsewhere.
      StatewiseError: it cannot be saved or restored at all.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise import testing
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> testing.assert_round_trip(sw.plan(model).take(model))
    """
    with tempfile.TemporaryDirectory(prefix="statewise-") as folder:
        path = Path(folder) / "checkpoint"
        save(path, state, layout=layout)
        restored, _ = restore(path, state)
        assert_same(path, restored)
        assert_same(state, restored)
    assert_same_placement(state, restored)
