"""A model with one leaf or more of every awkward sort, and how to compare two of it; for the tests of parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common.nnx_graph import raw_value
from statewise._src.core.plan import Kinds
from statewise.errors import StatewiseError

STANDARD = Kinds.standard()


class Model(nnx.Module):
    """Tied weights, several types, raw arrays, integer keys, a dict in a Variable, a key."""

    def __init__(self) -> None:
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.tied = self.first
        self.layers = nnx.List([nnx.BatchNorm(4, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2))])
        self.several = nnx.Variable({"a": jnp.ones(2), "b": {"c": jnp.ones(3)}})
        self.nothing = nnx.Variable(None)
        self.raw = jnp.ones(2)
        self.pair = nnx.data((jnp.zeros(1), jnp.zeros(2)))


def flat(thing: Any) -> dict[Any, Any]:
    """Each leaf's type and raw value by path."""
    state = thing if isinstance(thing, nnx.State) else nnx.state(thing)
    return {
        tuple(path): (type(leaf) if isinstance(leaf, nnx.Variable) else jax.Array, raw_value(leaf))
        for path, leaf in nnx.to_flat_state(state)
    }


def assert_same(one: Any, other: Any) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path, (cls, value) in one.items():
        assert other[path][0] is cls
        assert jax.tree.structure(value) == jax.tree.structure(other[path][1])
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), value, other[path][1]))


def notes(error: StatewiseError) -> dict[str, str]:
    return {"/".join(map(str, leaf.path)): leaf.note for leaf in error.leaves}
