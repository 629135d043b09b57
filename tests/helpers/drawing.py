"""Restarts that draw, and a model of adapters: shared by the tests of keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import statewise as sw
from strategies import Node

SLOTS = 4
INIT = nnx.initializers.he_uniform()


def noise(array: Any, key: Any) -> Any:
    return jax.random.uniform(key, array.shape, array.dtype)  # compiles faster than a noise one


def adapter(array: Any, *, key: Any, path: tuple[Any, ...]) -> Any:
    return jnp.zeros_like(array) if path[-1] == "lora_b" else INIT(key, array.shape, array.dtype)


def drawn(restart: Any = noise, axis: int | None = 0, **options: Any) -> sw.Kinds:
    return sw.Kinds(lora=sw.Kind(nnx.Param, restart=restart, batch_axis=axis, **options), rest=sw.Kind(...))


def adapters(slots: int = SLOTS, layers: int = 2) -> Node:
    return Node(
        layers=nnx.List(
            [
                Node(
                    lora_a=nnx.LoRAParam(5 * jnp.ones((slots, 6, 2))), lora_b=nnx.LoRAParam(5 * jnp.ones((slots, 2, 6)))
                )
                for _ in range(layers)
            ]
        ),
        w=nnx.BatchStat(jnp.ones(3)),
    )


def values(state: sw.State, kind: str = "lora") -> list[np.ndarray]:
    return [np.asarray(array, np.float32) for array in jax.tree.leaves(state[kind])]


def key(seed: int = 0) -> jax.Array:
    return jax.random.key(seed)
