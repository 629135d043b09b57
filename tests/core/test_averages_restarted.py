"""Averages follow a restart of what they are of: as a whole, slot by slot, in ensembles and packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw

SLOTS = 3
WARM = sw.EMA(lambda n: jnp.minimum(0.9, (1 + n) / (10 + n)))


class Server(nnx.Module):
    """Adapters of several tenants, the slots of one factor along its second axis."""

    def __init__(self, key: Any) -> None:
        rngs = nnx.Rngs(key)
        self.base = nnx.Linear(2, 2, rngs=rngs)
        self.a = nnx.LoRAParam(jax.random.normal(rngs(), (SLOTS, 2, 4)))
        self.b = nnx.LoRAParam(jax.random.normal(rngs(), (SLOTS, 4, 2)))

    def __call__(self, x: Any) -> Any:
        return self.base(x) + x @ self.a[...] @ self.b[...]


def fresh(array: Any, key: Any) -> Any:
    return jax.random.normal(key, array.shape)


@sw.train_step
def train(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


KEY, X = jax.random.key(1), jnp.ones((SLOTS, 4, 2))
KINDS = sw.Kinds.standard().replace(lora=sw.Kind(nnx.LoRAParam, restart=fresh, batch_axis=0))
TX = {"lora": optax.sgd(0.1), "params": optax.sgd(0.1)}


def planned(averages: Any = WARM) -> sw.Plan:
    return KINDS.plan(Server(KEY), optimizers=TX, averages={("params", "lora"): averages})


def trained(**options: Any) -> sw.State:
    state = planned(**options).take(Server(KEY))
    for _ in range(3):
        state, _ = train(state, X)
    return state


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.array(array) for array in jax.tree.leaves(tree)]


def test_the_averages_of_slots_that_are_restarted_begin_with_them() -> None:
    state = trained()
    before = arrays(state["ema"]["lora"])
    base = arrays(state["ema"]["params"])
    state = state.restart("lora", where=[1], key=KEY)
    for now, old, value in zip(arrays(state["ema"]["lora"]), before, arrays(state["lora"]), strict=True):
        np.testing.assert_array_equal(now[1], value[1])
        np.testing.assert_array_equal(now[[0, 2]], old[[0, 2]])
        assert not (now[0] == value[0]).all()
    for now, old in zip(arrays(state["ema"]["params"]), base, strict=True):
        np.testing.assert_array_equal(now, old)
    assert state["ema"]["_counts"]["lora"] == 3  # one for all slots
    state, _ = train(state, X)


def test_a_whole_kind_has_its_averages_and_their_count_begin_again() -> None:
    state = trained().restart("lora", key=KEY)
    jax.tree.map(np.testing.assert_array_equal, state["ema"]["lora"], state["lora"])
    assert (state["ema"]["_counts"]["lora"], state["ema"]["_counts"]["params"]) == (0, 3)
    state, _ = train(state, X)


def test_several_averages_and_packed_ones_follow_in_their_own_dtype() -> None:
    averages = [sw.EMA(0.9, dtype=jnp.bfloat16), sw.EMA(0.5, name="fast")]
    state = planned(averages).take(Server(KEY), pack=True)
    state, _ = train(state, X)
    state = state.restart("lora", where=[2], key=KEY)
    for name, dtype in (("ema", jnp.bfloat16), ("fast", jnp.float32)):
        for now, value in zip(jax.tree.leaves(state[name]["lora"]), jax.tree.leaves(state["lora"]), strict=True):
            assert now.dtype == dtype
            np.testing.assert_array_equal(now[2], value[2].astype(dtype))
            assert not (now[0] == value[0].astype(dtype)).all()


@pytest.mark.parametrize("where", [[1], np.array([[True, False, False], [False, False, True]])], ids=["alike", "rows"])
def test_each_member_of_an_ensemble_has_averages_that_follow(where: Any) -> None:
    ensemble = planned().stacked(2)
    state = ensemble.stack([planned().take(Server(key)) for key in jax.random.split(KEY, 2)])
    axes = ensemble.axes()
    state, _ = jax.vmap(train, in_axes=(axes, None), out_axes=(axes, 0))(state, X)
    state = state.restart("lora", where=where, key=KEY)
    rows = where if isinstance(where, np.ndarray) else np.array([[False, True, False]] * 2)
    for now, value in zip(arrays(state["ema"]["lora"]), arrays(state["lora"]), strict=True):
        assert ((now == value).all(axis=(2, 3)) == rows).all()


def test_the_state_before_keeps_averages_that_nobody_donates() -> None:
    state = trained()
    ema = state["ema"]
    train(state.restart("lora", where=[0], key=KEY), X)
    assert all(np.isfinite(array).all() for array in arrays(ema))


def test_averages_named_beside_slots_are_refused_with_the_call_that_works() -> None:
    state = trained()
    with pytest.raises(sw.DeclarationError, match="or with the kinds that they track") as caught:
        state.restart("lora", "ema", where=[1], key=KEY)
    where, key = [1], KEY
    assert str(caught.value.hint) == "state.restart('lora', where=where, key=key)  # averages follow what is restarted"
    assert eval(caught.value.hint, {"state": state, "where": where, "key": key}).plan is state.plan
