"""Steps in loops of the caller: what the compiled program carries, and what it copies."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw


class Wide(nnx.Module):
    """A weight of an odd shape, to be told in a compiled program, and a small cache."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones((37, 41)))
        self.back = nnx.Param(jnp.ones((41, 37)))
        self.cache = nnx.Cache(jnp.zeros(37))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.cache[...] = jnp.tanh(self.cache[...] + (x @ self.weight[...]) @ self.back[...])
        return self.cache[...]


decode_wide = sw.step(writes="cache")(lambda model, x: model(x))


def in_a_scan(state: sw.State, x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (decode_wide(*carry), None), (state, x), None, length=8)[0]


def in_a_while_loop(state: sw.State, x: Any) -> Any:
    return jax.lax.while_loop(
        lambda carry: carry[2] < 8, lambda carry: (*decode_wide(*carry[:2]), carry[2] + 1), (state, x, jnp.array(0))
    )[:2]


@pytest.mark.parametrize("loop", [in_a_scan, in_a_while_loop])
def test_a_loop_copies_nothing_of_what_a_step_only_reads(loop: Any) -> None:
    state = sw.plan(Wide()).take(Wide())
    compiled = jax.jit(loop, donate_argnums=0).lower(state, jnp.ones(37)).compile()
    assert not re.findall(r"f32\[37,41\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < 37 * 41 * 4
