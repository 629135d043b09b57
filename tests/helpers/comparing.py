"""Models to plan, and comparing models and states leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

import statewise as sw
from statewise._src.common.nnx_graph import raw_value
from strategies import Node, leaves_of, models


def plannable(**options: Any) -> st.SearchStrategy[Node]:
    """Models that have more leaves than those that an earlier `sow` may have left, which no plan keeps."""
    return models(**options).filter(lambda model: any(not isinstance(x, nnx.Intermediate) for _, x in leaves_of(model)))


def leaves(thing: Any) -> dict[tuple[Any, ...], Any]:
    """Path to raw value."""
    return {tuple(path): raw_value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(thing))}


def holds_the_same(value: Any, other: Any) -> bool:
    """Whether two values hold the very same arrays; a hijax Variable makes the dict around them at every look."""
    (arrays, structure), (others, other_structure) = jax.tree.flatten(value), jax.tree.flatten(other)
    return structure == other_structure and all(one is two for one, two in zip(arrays, others, strict=True))


def data(array: Any) -> np.ndarray:
    """What can be compared of an array; of a key, its words."""
    return np.asarray(jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array)


def same(one: Any, other: Any) -> bool:
    """Whether two models (or states) hold equal values at the same paths."""
    one, other = (leaves(x) if not isinstance(x, sw.State | dict) else x for x in (one, other))
    mine, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
    return mine[1] == theirs[1] and all(
        a.dtype == b.dtype and np.array_equal(data(a), data(b)) for a, b in zip(mine[0], theirs[0], strict=True)
    )


def zeros(state: sw.State) -> sw.State:
    """The state with zeros in the place of everything but keys."""
    is_key = jax.dtypes.prng_key
    return jax.tree.map(lambda array: array if jnp.issubdtype(array.dtype, is_key) else jnp.zeros_like(array), state)
