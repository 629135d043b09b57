"""The same training twice: written by hand with `nnx.jit`, `nnx.value_and_grad` and `nnx.Optimizer`, and with steps.

`by_hand` must not use Statewise: it is what the steps are held against.  Both give one `Snapshot` after every
step, of everything there is: the loss, every leaf of the model by its path, and the optimizer's state by its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import modes
import statewise as sw

STEPS = 4

Flat = dict[tuple[Any, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
      make: builds the model, the same in every call.
      batch: draws the arguments of one step.
      loss: of the model and those arguments.
      wrt: what the reference differentiates and updates, as an NNX filter.
      trained: the same as a kind, or several for a joint update.
      kinds: the declaration.
      writes: kinds that the loss may write besides those it may by default.
      traces: how often the loss may be traced.
      rtol: how far the two may be apart.
    """

    make: Callable[[], Any]
    batch: Callable[[np.random.Generator], tuple[Any, ...]]
    loss: Callable[..., Any]
    wrt: Any = nnx.Param
    trained: Any = "params"
    kinds: sw.Kinds = dataclasses.field(default_factory=sw.Kinds.standard)
    writes: tuple[str, ...] | None = None
    traces: int = 1
    rtol: float = 2e-5


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything there is after a step."""

    loss: np.ndarray
    leaves: Flat
    moments: Flat


def batches(case: Case, steps: int = STEPS) -> list[tuple[Any, ...]]:
    random = np.random.default_rng(0)
    return [case.batch(random) for _ in range(steps)]


@modes.classic()
def by_hand(case: Case, tx: Any, value_fn: bool = False, steps: int = STEPS) -> list[Snapshot]:
    """Training as people write it with NNX alone, in graph mode and with plain Variables, whatever the run's mode."""
    model = case.make()
    optimizer = nnx.Optimizer(model, tx, wrt=case.wrt)

    @nnx.jit
    def train(model: Any, optimizer: Any, *args: Any) -> Any:
        graphdef, _, rest = nnx.split(model, case.wrt, ...)
        loss, grads = nnx.value_and_grad(case.loss, argnums=nnx.DiffState(0, case.wrt))(model, *args)
        more = {}
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            more = {"value": loss, "grad": grads}
        if value_fn:
            rest = nnx.clone(rest)
            more["value_fn"] = lambda params: case.loss(nnx.merge(graphdef, params, rest), *args)
        optimizer.update(model, grads, **more)
        return loss

    found = []
    for args in batches(case, steps):
        loss = train(model, optimizer, *args)
        found.append(Snapshot(np.asarray(loss), leaves_of(model), flat_of(nnx.as_pure(optimizer.opt_state))))
    return found


def by_steps(case: Case, tx: Any, steps: int = STEPS, pack: bool = False) -> list[Snapshot]:
    """The same training with Statewise; on the way, one trace, the model left alone, and everything put back."""
    model = case.make()
    plan = case.kinds.plan(model, optimizers={case.trained: tx})
    state = plan.take(model, pack=pack)
    before = leaves_of(model)
    traces = []

    @sw.train_step(writes=case.writes)
    def train(model: Any, *args: Any) -> Any:
        traces.append(args)
        return case.loss(model, *args)

    found = []
    for args in batches(case, steps):
        state, loss = train(state, *args)
        (moments,) = state["optimizer"].values()
        found.append(Snapshot(np.asarray(loss), leaves_of_state(state), flat_of(moments)))
    assert len(traces) == case.traces
    assert_same_flat(leaves_of(model), before, exact=True)
    plan.put(state, model)
    assert_same_flat(leaves_of(model), found[-1].leaves, exact=True)
    assert_same_flat(leaves_of(plan.build(state)), found[-1].leaves, exact=True)
    return found


# --- what is compared ------------------------------------------------------------------------------------------


def leaves_of(*objects: Any) -> Flat:
    """Every array of the objects, by path; of Variables that hold several, by the keys within."""
    state = nnx.state(objects if len(objects) > 1 else objects[0], graph=True)
    return flat_of(nnx.as_pure(state))


def leaves_of_state(state: sw.State) -> Flat:
    """The same of a state, without its optimizers'."""
    found: Flat = {}
    for kind in state:
        if kind != "optimizer":
            found |= flat_of(state[kind])
    return found


def flat_of(tree: Any) -> Flat:
    return {tuple(map(_plain, keys)): to_numpy(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _plain(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    raise AssertionError(key)


def to_numpy(array: Any) -> np.ndarray:
    array = jnp.asarray(array)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.array(array)


def assert_same(ours: Sequence[Snapshot], theirs: Sequence[Snapshot], rtol: float = 2e-5, exact: bool = False) -> None:
    """Asserts that two runs went through the same values, step for step."""
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert np.isfinite(mine.loss).all(), step
        assert_same_flat({("loss",): mine.loss}, {("loss",): other.loss}, rtol, exact, f"step {step}")
        assert_same_flat(mine.leaves, other.leaves, rtol, exact, f"step {step}")
        assert_same_flat(mine.moments, other.moments, rtol, exact, f"step {step}, optimizer")


def assert_same_flat(
    ours: Mapping[Any, Any], theirs: Mapping[Any, Any], rtol: float = 2e-5, exact: bool = False, where: str = ""
) -> None:
    """Asserts that two flat trees have the same paths, shapes, dtypes and values; what is no float, exactly."""
    assert ours.keys() == theirs.keys(), where
    for path, mine in ours.items():
        other = theirs[path]
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype), f"{where}: {path}"
        message = f"{where}: {path}"
        if exact or not jnp.issubdtype(mine.dtype, jnp.inexact):
            np.testing.assert_array_equal(mine, other, err_msg=message)
        else:
            wide = np.complex64 if jnp.issubdtype(mine.dtype, jnp.complexfloating) else np.float32
            np.testing.assert_allclose(
                mine.astype(wide), other.astype(wide), rtol=rtol, atol=rtol / 10, err_msg=message
            )


def assert_moved(run: Sequence[Snapshot], *names: str) -> None:
    """Asserts that, somewhere below a path that ends in each of these names, every step changed something."""
    for name in names:
        paths = [path for path in run[0].leaves if name in path]
        assert paths, name
        for one, next_ in itertools.pairwise(run):
            assert any((one.leaves[path] != next_.leaves[path]).any() for path in paths), name
