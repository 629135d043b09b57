"""What somebody who set out to break Statewise did break, once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.dec = nnx.Param(jnp.ones(2))
        self.enc = nnx.Dict(w=self.dec, b=nnx.Param(jnp.zeros(2)))


def test_a_frozen_kind_claims_a_tied_leaf_by_any_of_its_paths() -> None:
    plan = sw.Kinds(frozen=sw.Kind(sw.Path("enc/**"), frozen=True), rest=sw.Kind(...)).plan(Tied())
    assert [leaf.path for leaf in plan["frozen"]] == [("dec",), ("enc", "b")]
    assert plan["rest"] == ()


def test_kinds_that_claim_a_tied_leaf_by_different_paths_contest_it() -> None:
    kinds = sw.Kinds(one=sw.Kind(sw.Path("enc/**")), two=sw.Kind(sw.Path("dec")))
    with pytest.raises(sw.OverlapError) as caught:
        kinds.plan(Tied())
    assert [leaf.path for leaf in caught.value.leaves] == [("dec",)]
    assert caught.value.leaves[0].note == "claimed by two and one"


@pytest.mark.parametrize("values", [(1, 1.0), (1, True), ((1,), (1.0,))], ids=str)
def test_static_arguments_of_different_types_are_different(values: tuple[Any, Any]) -> None:
    def name_of(value: Any) -> str:
        return name_of(value[0]) if isinstance(value, tuple) else type(value).__name__

    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    step = sw.step(lambda model, k: jnp.asarray(len(name_of(k))), static_argnames="k")
    state = sw.plan(model).take(model)
    assert [int(step(state, k=value)) for value in values] == [len(name_of(value)) for value in values]


class Mixed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.full = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(4)])
        self.half = nnx.List([nnx.Linear(3, 3, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(4)])


def test_a_packed_state_of_mixed_dtypes_can_be_cast_and_trained() -> None:
    model = Mixed(nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})

    @sw.train_step
    def train(model: Any) -> Any:
        return sum(jnp.sum(layer.kernel.astype(jnp.float32) ** 2) for layer in (*model.full, *model.half))

    losses = []
    for packed in (False, True):
        state = plan.take(model, pack=packed).cast(params="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
        for _ in range(3):
            state, loss = train(state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_packed_state_of_numpy_arrays_shows_its_arrays() -> None:
    model = Mixed(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    host = jax.device_get(state)
    for ours, theirs in zip(jax.tree.leaves(host["params"]), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_of_packed_states_says_what_it_is() -> None:
    model = Mixed(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    batch = jax.tree.map(lambda array: jnp.stack([array] * 2), state)
    with pytest.raises(sw.StructureError) as caught:
        batch["params"]
    assert caught.value.message == "A buffer of packed arrays is (2, 48), not (48,)."
    assert caught.value.hint == (
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)"
    )


@pytest.mark.parametrize("look", [sw.count, sw.select, sw.explain])
def test_a_state_is_no_model(look: Any) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    with pytest.raises(TypeError) as caught:
        look(sw.plan(model).take(model), nnx.Param)
    assert str(caught.value) == (
        "Object 0 is a State, not a model.\n  hint: state['params'] gives a kind's arrays, "
        "sw.census(state) counts them, plan.build(state) a model"
    )


def test_what_is_sown_unasked_names_the_kind_that_would_catch_it() -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

    def sow(model: Sowing) -> None:
        model.seen = nnx.Intermediate((model.w[...],))

    params, inter = sw.Kind(nnx.Param), sw.Kind(nnx.Intermediate, saved=False)
    for kinds, hint in (
        (sw.Kinds(params=params, inter=inter), "capture='inter'  # in the step's decorator: "),
        (
            sw.Kinds(params=params),
            "kinds = kinds | sw.Kinds(sown=sw.Kind(nnx.Intermediate, saved=False))",
        ),
    ):
        with pytest.raises(sw.StructureError) as caught:
            sw.step(sow)(kinds.plan(Sowing()).take(Sowing()))
        assert (caught.value.hint or "").startswith(hint)


def test_the_parts_of_a_spent_state_cannot_be_read() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.ones(3)), w=nnx.Param(jnp.ones(2)))
    state = sw.plan(model).take(model)
    state.restart("cache")
    assert state["params"]["w"].shape == (2,)
    with pytest.raises(sw.StructureError) as caught:
        state["cache"]
    assert caught.value.message == "This state was donated: restart('cache') has donated its cache."


def test_a_mask_of_another_length_is_told_from_leaves_of_another_length() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.ones(3)))
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, restart=jnp.zeros_like, batch_axis=0))
    with pytest.raises(sw.StructureError) as caught:
        kinds.plan(model).take(model).restart("cache", where=[True, False])
    assert str(caught.value) == (
        "where has 2 entries, but cache has 3 slots.\n  hint: a boolean for each of the 3 slots, or slot numbers"
    )
