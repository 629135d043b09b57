"""A tenant's adapters and moments begin again, and it trains on as a fresh one; all other tenants go on to the bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from meshes import mesh_of
from refusals import refused

TENANTS, IN, RANK, OUT, BATCH = 3, 4, 2, 4, 5


def fresh(array: Any, *, key: Any, path: tuple[Any, ...]) -> Any:
    if path[-1] == "lora_b":
        return jnp.zeros_like(array)
    return nnx.initializers.he_uniform()(key, array.shape, array.dtype)


class Tenants(nnx.Module):
    """A base that all share, and an adapter for each."""

    def __init__(self, axis: int = 0) -> None:
        rngs = nnx.Rngs(0)
        shape = [IN, RANK]
        shape.insert(axis, TENANTS)
        other = [RANK, OUT]
        other.insert(axis, TENANTS)
        self.axis = axis
        self.base = nnx.Linear(IN, OUT, rngs=rngs)
        self.lora_a = nnx.LoRAParam(jax.random.normal(rngs(), shape))
        self.lora_b = nnx.LoRAParam(jnp.zeros(other))

    def __call__(self, x: Any) -> Any:  # (tenants, batch, IN)
        a, b = (jnp.moveaxis(one[...], self.axis, 0) for one in (self.lora_a, self.lora_b))
        return self.base(x) + jnp.einsum("tbi,tir,tro->tbo", x, a, b)


def per_slot(tx: Any, axis: int = 0) -> Any:
    if not axis:
        return optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    return optax.GradientTransformation(
        jax.vmap(tx.init, in_axes=axis), jax.vmap(tx.update, in_axes=(axis, 0, axis), out_axes=(axis, 0))
    )


def kinds_of(axis: int = 0, **options: Any) -> sw.Kinds:
    return sw.Kinds.standard().replace(lora=sw.Kind(nnx.LoRAParam, restart=fresh, batch_axis=axis, **options))


def loss_of(model: Any, x: Any, y: Any) -> Any:
    return jnp.square(model(x) - y).mean(axis=(1, 2)).sum()  # a sum over tenants: none scales another's gradient


train = sw.train_step(loss_of)


def batch(seed: int) -> tuple[Any, Any]:
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (TENANTS, BATCH, IN)), jax.random.normal(y, (TENANTS, BATCH, OUT))


def trained(state: Any, steps: Any) -> Any:
    for seed in steps:
        state, _ = train(state, *batch(seed))
    return state


def alone(tx: Any, state: Any, slot: int, steps: Any, axis: int = 0) -> dict[str, np.ndarray]:
    """What optax makes of one tenant by itself, in plain JAX, from what a state has in its slot."""
    base = jax.tree.map(jnp.copy, state["params"]["base"])
    params = {name: jnp.take(state["lora"][name], slot, axis) for name in ("lora_a", "lora_b")}
    moments = tx.init(params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        out = x @ base["kernel"] + base["bias"][None] + x @ params["lora_a"] @ params["lora_b"]
        return jnp.square(out - y).mean()

    for seed in steps:
        x, y = batch(seed)
        updates, moments = tx.update(jax.grad(loss)(params, x[slot], y[slot]), moments, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(array) for name, array in params.items()}


def schedule() -> Any:
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(1e-2, 1e-1, 4)))


OPTIMIZERS = {
    "adam": lambda: optax.adam(3e-2),
    "clipped, with a schedule": schedule,
    "begins above zero": lambda: optax.adagrad(1e-1, initial_accumulator_value=0.3),
    "looks ahead": lambda: optax.adamw(1e-2, nesterov=True),
    "holds its rate": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=3e-2),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("pack", [False, True])
def test_a_tenant_begins_again_and_trains_on_like_a_fresh_one(name: str, pack: bool) -> None:
    tx = OPTIMIZERS[name]()
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={"lora": per_slot(tx)})
    undisturbed = trained(plan.take(model, pack=pack), range(6))
    state = trained(plan.take(model, pack=pack), range(3))
    before = jax.tree.map(np.asarray, (state["lora"], state["optimizer"], state["params"]))
    state = state.restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    after = jax.tree.map(np.asarray, (state["lora"], state["optimizer"], state["params"]))
    for old, new in zip(jax.tree.leaves(before[:2]), jax.tree.leaves(after[:2]), strict=True):
        assert np.array_equal(old[[0, 2]], new[[0, 2]])
    assert same(before[2], after[2])
    # The moments are those that optax's own init makes of the new adapters.
    slot = jax.tree.map(lambda array: array[1], state["lora"])
    expected = jax.tree.leaves(tx.init(slot))
    assert all(np.array_equal(got[1], want) for got, want in zip(jax.tree.leaves(after[1]), expected, strict=True))
    assert not after[0]["lora_b"][1].any()
    assert not np.array_equal(after[0]["lora_a"][1], before[0]["lora_a"][1])
    wanted = alone(tx, state, 1, range(3, 6))
    state = trained(state, range(3, 6))
    for leaf, array in wanted.items():
        np.testing.assert_allclose(state["lora"][leaf][1], array, atol=1e-6, rtol=1e-5)
        assert np.array_equal(state["lora"][leaf][np.array([0, 2])], undisturbed["lora"][leaf][np.array([0, 2])])
    for one, other in zip(jax.tree.leaves(state["optimizer"]), jax.tree.leaves(undisturbed["optimizer"]), strict=True):
        assert np.array_equal(one[np.array([0, 2])], other[np.array([0, 2])])


def test_slots_along_another_axis() -> None:
    tx, model = optax.adam(3e-2), Tenants(axis=1)
    kinds = kinds_of(1)
    plan = kinds.plan(model, optimizers={"lora": per_slot(tx, 1)})
    with refused(
        sw.DeclarationError,
        "Kind 'optimizer' does not declare a batch_axis, so its slots cannot be distinguished.",
        kind="optimizer",
        hint="optimizer=sw.Kind(nnx.OptState, batch_axis=0)",
    ):
        plan.take(model).restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    kinds = kinds.replace(optimizer=sw.Kind(nnx.OptState, batch_axis=0))
    plan = kinds.plan(model, optimizers={"lora": per_slot(tx, 1)})
    state = trained(plan.take(model), range(3))
    state = state.restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    assert jax.tree.leaves(state["optimizer"])[0].tolist() == [3, 0, 3]
    wanted = alone(tx, state, 1, range(3, 6), axis=1)
    state = trained(state, range(3, 6))
    for leaf, array in wanted.items():
        np.testing.assert_allclose(state["lora"][leaf][:, 1], array, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spec", [("data",), ()])
def test_on_a_mesh(spec: Any) -> None:
    tx, model, mesh = optax.adam(3e-2), Tenants(), mesh_of(data=3)
    plan = kinds_of(placement=sw.Sharded(*spec)).plan(model, optimizers={"lora": per_slot(tx)})
    state = trained(plan.take(model, mesh=mesh), range(2))
    there = [array.sharding for array in jax.tree.leaves(state["optimizer"])]
    old = [np.asarray(array) for array in jax.tree.leaves(state["optimizer"])]
    state = state.restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    assert [array.sharding for array in jax.tree.leaves(state["optimizer"])] == there
    for before, after in zip(old, jax.tree.leaves(state["optimizer"]), strict=True):
        assert np.array_equal(before[[0, 2]], np.asarray(after)[[0, 2]])
        assert not np.asarray(after)[1].any()
    wanted = alone(tx, jax.device_get({"params": state["params"], "lora": state["lora"]}), 1, [2])
    state = trained(state, [2])
    np.testing.assert_allclose(np.asarray(state["lora"]["lora_a"])[1], wanted["lora_a"], atol=1e-6, rtol=1e-5)


# --- which optimizers begin again --------------------------------------------------------------------------------


def test_the_moments_of_other_kinds_stay() -> None:
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={"lora": per_slot(optax.adam(1e-2)), "params": optax.adam(1e-2)})
    state = trained(plan.take(model), range(2))
    base = jax.tree.map(np.asarray, state["optimizer"]["params"])
    state = state.restart("lora", "optimizer", where=[0], key=jax.random.key(1))
    assert same(base, state["optimizer"]["params"])
    state = state.restart("lora", "optimizer", key=jax.random.key(1))
    assert same(base, state["optimizer"]["params"])
    assert not any(array.any() for array in jax.tree.leaves(state["optimizer"]["lora"]))
    assert jax.tree.leaves(base)[0] == 2
    # By itself it is all of them.
    state = trained(state, range(2)).restart("optimizer")
    assert not any(array.any() for array in jax.tree.leaves(state["optimizer"]))


def test_nothing_of_the_optimizer_begins_again_unasked() -> None:
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={"lora": per_slot(optax.adam(1e-2))})
    state = trained(plan.take(model), range(2))
    before = jax.tree.map(np.asarray, state["optimizer"])
    assert same(before, state.restart(key=jax.random.key(0))["optimizer"]), "by default what declares a restart"


def test_a_function_of_the_kind_goes_before_the_optimizers_init() -> None:
    model = Tenants()
    kinds = kinds_of().replace(optimizer=sw.Kind(nnx.OptState, restart=jnp.zeros_like, batch_axis=0))
    tx = per_slot(optax.adagrad(1e-2, initial_accumulator_value=0.5))
    other = optax.trace(0.9)
    plan = kinds.plan(model, optimizers={"lora": tx, "params": other})
    state = trained(plan.take(model), range(2))
    kept = jax.tree.map(np.asarray, state["optimizer"]["params"])
    state = state.restart("lora", "optimizer", where=[2], key=jax.random.key(1))
    assert same(kept, state["optimizer"]["params"])
    for array in jax.tree.leaves(state["optimizer"]["lora"]):
        assert not array[2].any()
        assert array[0].any()


def test_a_joint_optimizer_is_not_restarted_by_half() -> None:
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={("params", "lora"): optax.adam(1e-2)})
    state = plan.take(model)
    with refused(
        sw.DeclarationError,
        "The optimizer of params+lora is a joint one: with lora the moments of params would restart too.",
        kind="optimizer",
        leaves=["base/bias: Param(4,) float32  kind=params", "base/kernel: Param(4, 4) float32  kind=params"],
        hint="an optimizer for each: kinds.plan(model, optimizers={'params': tx, 'lora': tx})\n"
        "or, if that is meant, the optimizer by itself: state.restart('optimizer')",
    ):
        state.restart("lora", "optimizer", key=jax.random.key(0))
    assert same(state, plan.take(model))
    assert state.restart("optimizer")


def names_of(plan: Any, model: Any, **more: Any) -> dict[str, Any]:
    import dataclasses

    return {"plan": plan, "model": model, "sw": sw, "nnx": nnx, "optax": optax, "jax": jax} | {
        "dataclasses": dataclasses,
        **more,
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_the_hint_for_a_shared_count_can_be_followed(axis: int) -> None:
    model = Tenants(axis)
    kinds = kinds_of(axis).replace(optimizer=sw.Kind(nnx.OptState, batch_axis=0))
    tx = optax.adam(1e-2)
    plan = kinds.plan(model, optimizers={"lora": tx, "params": optax.sgd(0.1)})
    state = plan.take(model)
    with pytest.raises(sw.StructureError) as caught:
        state.restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    assert "optimizer/lora/0/count: Array() int32  kind=optimizer  (does not have this axis)" in map(
        str, caught.value.leaves
    )
    *code, last = str(caught.value.hint).split("\n")
    assert last == "or restart all slots: state.restart('lora', 'optimizer')"
    if axis == 0:
        assert code == [
            "tx = plan.optimizers[('lora',)]",
            "per_slot = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))",
            "plan = plan.kinds.plan(model, optimizers={**plan.optimizers, ('lora',): per_slot})",
        ]
    assert same(state, plan.take(model))
    names = names_of(plan, model)
    exec("\n".join(code), names)
    after = trained(names["plan"].take(model), range(2))
    after = after.restart("lora", "optimizer", where=[1], key=jax.random.key(7))
    wanted = alone(tx, after, 1, [2], axis) if not axis else None
    after = trained(after, [2])
    assert jax.tree.leaves(after["optimizer"])[0].tolist() == [3, 1, 3]
    if wanted is not None:
        np.testing.assert_allclose(after["lora"]["lora_a"][1], wanted["lora_a"], atol=1e-6, rtol=1e-5)


def test_the_hint_where_other_optimizers_have_no_slots() -> None:
    model = Tenants()
    kinds = kinds_of().replace(optimizer=sw.Kind(nnx.OptState, batch_axis=0))
    plan = kinds.plan(model, optimizers={"lora": per_slot(optax.adam(1e-2)), "params": optax.adam(1e-2)})
    with pytest.raises(sw.StructureError) as caught:
        plan.take(model).restart("optimizer", where=[1])
    assert caught.value.hint == (
        "state.restart('lora', 'optimizer', where=where)  # only their optimizers\n"
        "or restart all slots: state.restart('optimizer')"
    )


def test_an_optimizer_of_nnx_in_the_model() -> None:
    """No plan knows what it updates: its kind says how it restarts, and its own optax transformation may be by slot."""
    model = Tenants()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    kinds = kinds_of()
    with refused(
        sw.DeclarationError,
        "Kind 'optimizer' does not declare how a fresh value is made.",
        kind="optimizer",
        hint="kinds = plan.kinds.replace("
        "optimizer=dataclasses.replace(plan.kinds['optimizer'], restart=jnp.zeros_like))",
    ):
        kinds.plan(model, optimizer).take(model, optimizer).restart("optimizer")
    kinds = kinds.replace(optimizer=sw.Kind(nnx.OptState, restart=jnp.zeros_like, batch_axis=0))
    plan = kinds.plan(model, optimizer)
    with pytest.raises(sw.StructureError) as caught:
        plan.take(model, optimizer).restart("optimizer", where=[1])
    first, second, apart, _ = str(caught.value.hint).split("\n")
    assert first == "per_slot = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))"
    assert second == "nnx.Optimizer(model, per_slot, wrt=...)"
    optimizer = nnx.Optimizer(model, per_slot(optax.adam(1e-2)), wrt=nnx.LoRAParam)
    names = names_of(plan, model)
    exec(apart, names)
    plan = names["kinds"].plan(model, optimizer)
    state = plan.take(model, optimizer).restart("optimizer", where=[1])
    assert [leaf.kind for leaf in state.plan.leaves if leaf.path[-1] == "step"] == ["optimizer_of_all"]


def test_of_an_ensemble_nothing_is_guessed() -> None:
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={"lora": per_slot(optax.adam(1e-2))})
    stacked = jax.tree.map(lambda array: jnp.stack([array] * 3), plan.take(model))
    with pytest.raises(sw.StructureError, match=r"^The state's arrays do not have the shapes and dtypes of its plan\."):
        stacked.restart("lora", "optimizer", key=jax.random.key(0))


def test_the_parameters_that_it_begins_with_must_be_there() -> None:
    model = Tenants()
    plan = kinds_of().plan(model, optimizers={"lora": per_slot(optax.adam(1e-2))})
    state = plan.take(model)
    state.restart("lora", key=jax.random.key(0))
    with pytest.raises(sw.StructureError, match=r"^This state was donated: restart\('lora'\) has donated its lora\."):
        state.restart("optimizer")
    fine = plan.take(model)
    again = fine.restart("optimizer")
    assert same(again["lora"], fine["lora"]), "and are not donated"
