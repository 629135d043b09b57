"""States to save, and comparing them to the bit."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from strategies import Node

# What the standard kinds leave out of a checkpoint is saved here too, so that nothing is restarted.
ALL_SAVED = sw.Kinds.standard().replace(
    cache=sw.Kind(nnx.Cache), intermediates=sw.Kind(nnx.Any(nnx.Intermediate, nnx.Perturbation))
)


ADAM = optax.adam(optax.linear_schedule(1e-2, 1e-3, 8))


class Trained(nnx.Module):
    """Every kind of state that a training run resumes from: parameters, statistics, streams of keys, a counter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.7, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.outer = nnx.Linear(4, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.outer(self.drop(nnx.relu(self.norm(self.inner(x)))))


def trained(seed: int = 0) -> sw.State:
    """A state of `Trained`, with Adam and a schedule."""
    model = Trained(nnx.Rngs(seed))
    return sw.plan(model, optimizers={"params": ADAM}).take(model)


@sw.train_step
def train(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def batches() -> list[jax.Array]:
    """Six batches, the same in every process."""
    return [jnp.asarray(np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)) for seed in range(6)]


def numbered(number: float) -> sw.State:
    """A small state, with a number in it."""
    return taken({"a": jnp.full(3, float(number)), "b": jnp.arange(4)})


def number_of(state: sw.State) -> float:
    """The number in a small state."""
    return float(state["variables"]["leaves"]["a"][0])


def taken(values: Mapping[Any, Any]) -> sw.State:
    """A state of Variables with these values, by name."""
    model = nnx.data({name: nnx.Variable(value) for name, value in values.items()})
    return sw.plan(Node(leaves=model)).take(Node(leaves=model))


def copied(state: sw.State) -> sw.State:
    """The same state in arrays of its own."""
    return jax.tree.map(jnp.copy, state)


def spread(state: sw.State, devices: list[jax.Device], *, over: int = 8) -> sw.State:
    """The state on a mesh: each array split along its first axis where that divides, else replicated."""
    mesh = jax.sharding.Mesh(np.array(devices[:over]), ("data",))

    def place(array: Any) -> Any:
        splits = array.ndim > 0 and array.shape[0] % over == 0 and array.size > 0
        return jax.device_put(array, jax.NamedSharding(mesh, jax.P("data") if splits else jax.P()))

    return jax.tree.map(place, state)


def mixed() -> sw.State:
    """A small state of many types: a list, a dict as a value, bfloat16, int4, a raw array."""
    model = Node(
        layers=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]),
        half=nnx.Param(one_of("bfloat16")),
        small=nnx.Variable(one_of("int4")),
        pair=nnx.Variable({"x": jnp.arange(2), "y": (jnp.ones(1), None)}),
        raw=nnx.data(jnp.arange(3)),
    )
    return sw.plan(model).take(model)


def as_plain_tree(state: sw.State) -> dict[str, Any]:
    """The same as nested dicts, as plain Orbax reads it."""
    params, variables = state["params"], state["variables"]
    return {
        "layers": {"0": dict(params["layers"][0])},
        "half": params["half"],
        "small": variables["small"],
        "pair": {"x": variables["pair"]["x"], "y": {"0": variables["pair"]["y"][0]}},
        "raw": variables["raw"],
    }


def bits(array: Any) -> tuple[Any, ...]:
    """All that an array is, to the bit: equal for equal arrays only."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(array)), *bits(jax.random.key_data(array))
    host = np.asarray(array)
    if host.dtype.itemsize == 1 and jnp.issubdtype(host.dtype, jnp.integer):
        host = host.astype(np.int16)  # of integers below a byte only the lower bits count
    return str(array.dtype), array.shape, host.tobytes()


def contents(state: sw.State) -> dict[str, Any]:
    """Every array of a state to the bit, by kind and path; packed or not."""
    return {
        f"{kind}{jax.tree_util.keystr(path)}": bits(array)
        for kind in state
        for path, array in jax.tree_util.tree_leaves_with_path(state[kind])
    }


def assert_identical(one: sw.State, other: sw.State) -> None:
    """Two states of one plan, equal to the bit."""
    assert one.plan is other.plan
    assert contents(one) == contents(other)


def round_trip(folder: pathlib.Path | str, state: sw.State, target: sw.State | None = None, **options: Any) -> sw.State:
    """Saves a state, restores it, and checks that every leaf of a saved kind was restored."""
    path = pathlib.Path(folder) / "saved"
    sw.save(path, state, **options)
    restored, report = sw.restore(path, state if target is None else target)
    saved = {kind for kind, declared in state.plan.kinds.items() if declared.saved}
    assert {one.outcome for one in report.leaves if one.leaf.kind in saved} == {"restored"}
    return restored


def one_of(dtype: Any, shape: tuple[int, ...] = (2, 3)) -> jax.Array:
    """An array of a dtype: zeros, ones and the largest among its elements, where it has them."""
    kind = jnp.dtype(dtype)
    if kind == jnp.bool_:
        values: Any = np.arange(math.prod(shape)) % 3 == 0
    elif jnp.issubdtype(kind, jnp.integer):
        info = jnp.iinfo(kind)
        values = np.resize(np.array([int(info.min), 0, 1, int(info.max)], dtype=object), math.prod(shape))
    elif jnp.issubdtype(kind, jnp.complexfloating):
        values = np.arange(math.prod(shape)) * (1 - 2j)
    else:
        values = np.resize(np.array([1.0, 0.5, 2.0, 4.0]), math.prod(shape))
    return jnp.asarray(np.asarray(values).reshape(shape).astype(kind))


FLOATS8 = (
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
INTEGERS = ("int2", "int4", "int8", "int16", "int32", "uint2", "uint4", "uint8", "uint16", "uint32")
DTYPES = ("bool", *INTEGERS, *FLOATS8, "float4_e2m1fn", "bfloat16", "float16", "float32", "complex64")
