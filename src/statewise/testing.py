"""Assertions for your own tests: that a round trip loses nothing, that nothing is retraced or moved to other devices.

Each raises an `AssertionError` that names every leaf concerned.  Import it as `from statewise import testing`; it is
not part of `import statewise as sw`.
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
from statewise._src.checkpoint.format.layout import Layout
from statewise._src.checkpoint.restore import restore
from statewise._src.checkpoint.save import save
from statewise._src.common.paths import format_path
from statewise._src.core.plan import State
from statewise._src.step.step import Step

__all__ = ["assert_no_retrace", "assert_round_trip", "assert_same", "assert_same_placement", "count_traces"]


class Traces:
    """The number of times that a step was traced.

    Attributes:
      count: the number so far.
    """

    count: int = 0


@contextlib.contextmanager
def count_traces(step: Step[..., Any]) -> Iterator[Traces]:
    """Counts how often a step's function is traced within a block.

    Args:
      step: a step, made by `sw.step` or `sw.train_step`.

    Yields:
      the count, which grows with each trace.

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
    """Asserts that a second call of a step, on the state that the first returned, traces nothing.

    The state is not changed: the step runs on a copy.

    Args:
      step: a step, made by `sw.step` or `sw.train_step`.
      state: the state for the first call.
      *args: the step's other arguments.
      **kwargs: the step's keyword arguments.

    Raises:
      AssertionError: it was traced again: the returned state differs in something static, a shape, dtype or weak type.

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
        raise AssertionError(
            f"{step!r} was traced again in its second call, on the state that the first call returned."
        )


def assert_same(first: object, second: object) -> None:
    """Asserts that two models, states or checkpoints are bitwise equal, leaf by leaf.

    Args:
      first: a model, a state, or the path of a checkpoint.
      second: another.

    Raises:
      AssertionError: they differ; with the table of differences.

    Example:
      >>> from flax import nnx
      >>> from statewise import testing
      >>> testing.assert_same(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    """
    difference = diff(first, second)
    if difference:
        raise AssertionError(str(difference))


def assert_same_placement(first: State, second: State) -> None:
    """Asserts that two states of one structure have the same shardings: the same part of each array on each device.

    Args:
      first: a state.
      second: another.

    Raises:
      AssertionError: they have different leaves, or an array has another sharding; with all of them.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> from statewise import testing
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> testing.assert_same_placement(state, state.cast(params="bfloat16"))
    """
    left, right = (dict(jax.tree_util.tree_flatten_with_path(state)[0]) for state in (first, second))
    if list(left) != list(right):
        raise AssertionError(f"The states have different leaves: {len(left)} arrays and {len(right)}.")
    moved = []
    for path, array in left.items():
        before, after = array.sharding, right[path].sharding
        if array.ndim != right[path].ndim or not before.is_equivalent_to(after, array.ndim):
            moved.append(f"  {format_path(tuple(key.key for key in path))}: {before} and {after}")
    if moved:
        raise AssertionError("\n".join([f"{len(moved)} of {len(left)} arrays have another sharding:", *moved]))


def assert_round_trip(state: State, *, layout: Layout = "named") -> None:
    """Asserts that a checkpoint of a state restores to the same state, bitwise and with the same shardings.

    The checkpoint is written to a temporary directory and removed.

    Args:
      state: the state; kinds that are not saved are not compared.
      layout: `"named"` or `"packed"`, as in `sw.save`.

    Raises:
      AssertionError: something differs, or has another sharding; with the table of differences.
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
