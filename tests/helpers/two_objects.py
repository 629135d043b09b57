"""Two models side by side, a policy and its reference, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw


def linear(seed: int) -> nnx.Linear:
    return nnx.Linear(2, 2, rngs=nnx.Rngs(seed))


def paths_of(leaves: Any) -> list[str]:
    return [sw.format_path(leaf.path) for leaf in leaves]


def matched(model: Any, filter: Any) -> list[str]:
    found = sw.explain(model, filter)
    chosen = [path for path, yes in zip(paths_of(found.leaves), found.matched, strict=True) if yes]
    assert sw.count(model, filter) == len(chosen)
    assert len(nnx.to_flat_state(sw.select(model, filter))) == len(chosen)
    return chosen


def refused(make: Callable[[], Any], error: type[sw.StatewiseError] = sw.DeclarationError) -> sw.StatewiseError:
    with pytest.raises(error) as caught:
        make()
    return caught.value


@sw.train_step
def train(policy: Any, reference: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((policy(x) - reference(x) - 1) ** 2)


def by(first: str, second: str) -> sw.Kinds:
    return sw.Kinds(policy=sw.Kind(nnx.Param & sw.Path(first)), reference=sw.Kind(sw.Path(second), frozen=True))


SGD = {"policy": optax.adam(0.1)}
X = jnp.ones((3, 2))
