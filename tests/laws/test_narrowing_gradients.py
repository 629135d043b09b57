"""Numbers of NumPy in a model whose gradients are asked for, and in the words of a state that does not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_gradients_of_numbers_that_jax_would_lose_are_refused(value: float) -> None:
    model = nnx.Dict(w=nnx.Param(np.array([value, 1.0]), ref=False), b=nnx.Param(jnp.ones(2)))
    for call in (sw.value_and_grad, sw.grad):
        with pytest.raises(sw.StructureError, match=r"Casting would lose numbers(.|\n)*w: Param\(2,\) float32"):
            call(lambda model: model["w"][...].sum())(model)
    assert model["w"].get_raw_value().dtype == np.float64
    counter = nnx.Dict(w=nnx.Param(jnp.ones(2)), n=nnx.Variable(np.array(5 * 10**12), ref=False))
    with pytest.raises(sw.StructureError, match=r"n: Variable\(\) int32 .*of magnitude 5e\+12"):
        sw.grad(lambda model: model["w"][...].sum() * model["n"][...])(counter)
    fine = nnx.Dict(w=nnx.Param(np.array([0.1, 1.0])))
    loss, _ = sw.value_and_grad(lambda model: model["w"][...].sum())(fine)
    assert loss == jnp.float32(1.1)


def test_a_state_of_64_bit_numbers_says_so() -> None:
    model = nnx.Dict(n=nnx.Variable(jnp.ones(2, int)))
    state = sw.plan(model).take(model)
    wide = jax.tree.map(lambda array: np.asarray(array).astype(np.int64), state)
    with pytest.raises(sw.StructureError, match=r"n: Variable\(2,\) int32 .*\(is int64 in the state\)"):
        sw.plan(model).put(wide, model)
