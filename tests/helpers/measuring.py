"""A model to measure, and the figures that NumPy gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw

X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
NAMES = ("param", "grad", "update", "written")


class Net(nnx.Module):
    """Has leaves of several kinds, two of them tied."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.blocks[1].bias = self.blocks[0].bias
        self.norm, self.noise = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        for block in self.blocks:
            x = nnx.tanh(block(x))
        return self.noise(self.norm(x))


def loss_of(model: Any, x: jax.Array) -> jax.Array:
    return ((model(x) - 1) ** 2).mean()


def plan_of(model: Any, **more: Any) -> sw.Plan:
    return sw.plan(model, optimizers={"params": optax.adam(1e-2)}, **more)


def norm_of(array: Any) -> tuple[float, float, int]:
    """Returns what NumPy says of one array."""
    array = np.abs(np.asarray(array).astype(np.float64)).ravel()
    return float(np.linalg.norm(array)), float(array.max(initial=0)), int((~np.isfinite(array)).sum())


def expected(name: str, kind: str, arrays: Mapping[tuple[Any, ...], Any]) -> dict[str, float]:
    """Returns the entries of `to_dict()` for arrays by path."""
    entries = {}
    for path, array in arrays.items():
        for figure, value in zip(("norm", "max", "nonfinite"), norm_of(array), strict=True):
            entries[f"{name}_{figure}/{kind}/{sw.format_path(path)}"] = value
    return entries


def flat(state: sw.State, kind: str) -> dict[tuple[Any, ...], np.ndarray]:
    """Returns copies of a kind's arrays, by path."""
    keyed = jax.tree_util.tree_leaves_with_path(state[kind])
    return {
        leaf.path: np.array(array) for leaf, (_, array) in zip(state.plan[kind], keyed, strict=True) if leaf.size >= 0
    }


def close(found: Mapping[str, Any], wanted: Mapping[str, Any], rtol: float = 1e-5) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=rtol, atol=1e-9, err_msg=key)


def _without(figures: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key not in names}


def checked(step: Any, state: sw.State, *args: Any, grads: Any = None, written: tuple[str, ...] = ()) -> Any:
    """Runs a step with `measure=True`, and compares what can be read from the states with NumPy."""
    before = flat(state, "params")
    state, out = step(state, *args)
    measured = out[1]
    after = flat(state, "params")
    wanted = expected("param", "params", after)
    wanted |= expected("update", "params", {path: after[path].astype(np.float64) - before[path] for path in after})
    for kind in written:
        wanted |= expected("written", kind, flat(state, kind))
    if grads is not None:
        wanted |= expected("grad", "params", grads)
    found = measured.to_dict()
    of_grads = {key for key in found if key.startswith("grad")}
    close({key: value for key, value in found.items() if key not in of_grads}, _without(wanted, of_grads))
    if grads is not None:  # of another program, which rounds in another order
        close({key: found[key] for key in of_grads}, {key: wanted[key] for key in wanted if key in of_grads}, rtol=1e-4)
    return state, out
