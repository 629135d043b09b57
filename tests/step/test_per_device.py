"""Kinds that lie per device: each device trains and generates with its own values, beside parameters that all share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw
from meshes import ResNet, Transformer, assert_close, by_key, images, loss_of, mesh_of, number, tokens

pytestmark = pytest.mark.heavy

MOMENTUM = optax.sgd(0.1, momentum=0.9)
DATA = mesh_of(data=4)
BOTH = mesh_of(data=4, model=2)
EXPLICIT = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
STATS = sw.Kind(nnx.BatchStat, placement=sw.PerDevice("data"))
KINDS = sw.Kinds.standard().replace(stats=STATS)

train = sw.train_step(loss_of)


def resnet(axis_name: str | None = None) -> ResNet:
    return ResNet(nnx.Rngs(0), axis_name)


def state_of(mesh: Any, kinds: sw.Kinds = KINDS, model: Any = None, tx: Any = MOMENTUM, **options: Any) -> sw.State:
    model = resnet() if model is None else model
    return kinds.plan(model, optimizers={"params": tx}).take(model, mesh=mesh, **options)


def trained(state: Any, *batch: Any, step: Any = train, steps: int = 3) -> tuple[Any, list[float]]:
    losses = []
    for _ in range(steps):
        state, loss = step(state, *batch)
        losses.append(float(loss))
    return state, losses


# --- taking ----------------------------------------------------------------------------------------------------------


def test_each_device_starts_with_the_value_of_the_model() -> None:
    state = state_of(BOTH)
    mean = state["stats"]["norm"]["var"]
    assert mean.shape == (4, 8)
    assert mean.sharding == jax.NamedSharding(BOTH, jax.P("data"))
    np.testing.assert_array_equal(mean, np.ones((4, 8)))
    assert state["params"]["norm"]["scale"].shape == (8,)


def test_the_plan_keeps_the_shapes_of_the_model() -> None:
    model = resnet()
    plan = KINDS.plan(model)
    state = plan.take(model, mesh=DATA)
    assert state.plan is not plan
    assert state.plan["stats"] == plan["stats"]
    assert plan.take(model, mesh=DATA).plan is state.plan
    assert plan.take(model).plan is plan
    assert plan.take(model)["stats"]["norm"]["var"].shape == (8,)


def test_each_device_has_a_key_of_its_own_and_the_same_on_any_mesh() -> None:
    kinds = sw.Kinds.standard().replace(rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data")))
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
    keys = [kinds.plan(model).take(model, mesh=mesh)["rng"]["rngs"]["key"] for mesh in (mesh_of(data=8), DATA)]
    expected = [jax.random.fold_in(model.rngs.key[...], number) for number in range(8)]
    np.testing.assert_array_equal(number(keys[0]), [jax.random.key_data(key) for key in expected])
    np.testing.assert_array_equal(number(keys[1]), number(keys[0])[:4])


@pytest.mark.parametrize("mesh", [DATA, BOTH, EXPLICIT])
def test_init_and_abstract_have_what_take_has(mesh: Any) -> None:
    kinds = KINDS.replace(rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data")))
    model = nnx.Dict(net=resnet(), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    plan = kinds.plan(model, optimizers={"params": MOMENTUM})
    taken, abstract = plan.take(model, mesh=mesh), plan.abstract(mesh)
    made = plan.init(lambda: nnx.Dict(net=resnet(), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(1))), mesh)
    assert made.plan is abstract.plan is taken.plan
    assert_close(made, taken)
    for key, array in by_key(taken).items():
        for other in (by_key(made)[key], by_key(abstract)[key]):
            assert (other.shape, other.dtype, other.sharding) == (array.shape, array.dtype, array.sharding), key
    assert jax.tree.structure(plan.shardings(mesh)) == jax.tree.structure(taken)


# --- against a program by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [DATA, BOTH, EXPLICIT])
def test_unsynchronised_statistics_train_as_a_hand_written_shard_map_does(mesh: Any) -> None:
    model = resnet()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), stats)
    moments = MOMENTUM.init(params)

    def on_one(params: Any, moments: Any, stats: Any, x: Any, labels: Any) -> Any:
        def of(params: Any) -> Any:
            model = nnx.merge(graphdef, *_states(graphdef, params, jax.tree.map(lambda leaf: leaf[0], stats)))
            return loss_of(model, x, labels), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        (loss, after), grads = jax.value_and_grad(of, has_aux=True)(params)
        loss, grads = jax.lax.pmean((loss, grads), "data")
        updates, moments = MOMENTUM.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, jax.tree.map(lambda leaf: leaf[None], after), loss

    plain = mesh_of(data=4)
    whole, each = jax.P(), jax.P("data")
    specs = {"in_specs": (whole, whole, each, each, each), "out_specs": (whole, whole, each, whole)}
    by_hand = jax.jit(jax.shard_map(on_one, mesh=plain, check_vma=False, **specs))
    state, batch = state_of(mesh), images()
    for _ in range(3):
        params, moments, stats, expected = by_hand(params, moments, stats, *batch)
        state, loss = train(state, *batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for kind, reference in (("params", params), ("stats", stats)):
        mine = nnx.to_pure_dict(state[kind])
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6), mine, reference)
    means = np.asarray(state["stats"]["norm"]["mean"])
    assert len({tuple(row) for row in means}) == 4
    whole_array = state["params"]["head"]["kernel"]
    assert len({np.asarray(shard.data).tobytes() for shard in whole_array.addressable_shards}) == 1


def _states(graphdef: Any, params: Any, stats: Any) -> Any:
    _, of_params, of_stats = nnx.split(nnx.eval_shape(resnet), nnx.Param, nnx.BatchStat)
    nnx.replace_by_pure_dict(of_params, params)
    nnx.replace_by_pure_dict(of_stats, stats)
    return of_params, of_stats


def test_evaluation_uses_each_devices_own_statistics() -> None:
    state, _ = trained(state_of(BOTH), *images())

    @sw.step
    def evaluate(model: Any, x: Any) -> Any:
        model.eval()
        return model(x)

    x = images()[0]
    logits = evaluate(state, x)
    stats = jax.tree.map(np.asarray, nnx.to_pure_dict(state["stats"]))
    one = state.reduce_devices("stats", how="first")
    for device in range(4):
        model = one.plan.build(one)
        nnx.update(model, nnx.State(jax.tree.map(lambda leaf, device=device: leaf[device], stats)))
        model.eval()
        rows = slice(4 * device, 4 * device + 4)
        np.testing.assert_allclose(logits[rows], model(x[rows]), rtol=1e-4, atol=1e-5)


# --- against one device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [DATA, BOTH, EXPLICIT])
def test_synchronised_statistics_train_as_one_device_does(mesh: Any) -> None:
    state, losses = trained(state_of(mesh, model=resnet("data")), *images())
    expected, losses_of_one = trained(state_of(None), *images())
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-5)
    for row in np.asarray(state["stats"]["again"]["var"]):
        np.testing.assert_allclose(row, expected["stats"]["again"]["var"], rtol=1e-4)
    assert_close(state.reduce_devices("stats"), expected)


@pytest.mark.parametrize("pack", [False, True])
def test_without_noise_a_transformer_trains_as_on_one_device(pack: bool) -> None:
    kinds = sw.Kinds.standard().replace(rng=sw.Kind(nnx.RngState, placement=sw.PerDevice("data", "model")))
    model = Transformer(nnx.Rngs(0), rate=0.0)
    state = state_of(BOTH, kinds, model, pack=pack)
    assert len(by_key(state)) < len(state.plan.leaves) or not pack
    assert state["rng"]["drop"]["rngs"]["count"].shape == (8,)
    state, losses = trained(state, *tokens())
    expected, losses_of_one = trained(state_of(None, kinds, model), *tokens())
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-5)
    for kind in ("params", "optimizer"):
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5), state[kind], expected[kind]
        )


def split_over_model(path: Any, shape: Any) -> Any:
    return sw.Sharded(*[None] * (len(shape) - 1), "model") if shape[-1] % 2 == 0 else sw.Replicated()


def split_over_data(path: Any, shape: Any) -> Any:
    return sw.Sharded("data") if shape[0] % 4 == 0 else sw.Replicated()


@pytest.mark.parametrize("placement", [split_over_model, split_over_data])
def test_parameters_may_be_split_over_the_mesh_beside_values_per_device(placement: Any) -> None:
    kinds = KINDS.replace(params=sw.Kind(nnx.Param, placement=placement))
    state = state_of(BOTH, kinds, resnet("data"))
    places = state.plan.shardings(BOTH)
    state, losses = trained(state, *images())
    np.testing.assert_allclose(losses, trained(state_of(None), *images())[1], rtol=1e-5)
    assert all(array.sharding == by_key(places)[key] for key, array in by_key(state).items())


@pytest.mark.parametrize("tx", [optax.lbfgs(), optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2))])
def test_optimizers_that_look_at_the_loss_see_that_of_all_devices(tx: Any) -> None:
    model = nnx.Dict(w=nnx.Linear(3, 1, rngs=nnx.Rngs(0)), own=nnx.BatchStat(jnp.zeros(())))
    x = jax.random.normal(jax.random.key(0), (8, 3))

    @sw.train_step
    def fit(model: Any, x: Any) -> Any:
        return ((model.w(x)[:, 0] - x.sum(axis=1) ** 2) ** 2).mean() + model.own[...]

    state, losses = trained(state_of(DATA, model=model, tx=tx), x, step=fit)
    expected, losses_of_one = trained(state_of(None, model=model, tx=tx), x, step=fit)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-4)
    np.testing.assert_allclose(state["params"]["w"]["kernel"], expected["params"]["w"]["kernel"], rtol=1e-3)
    shards = state["params"]["w"]["kernel"].addressable_shards
    assert len({np.asarray(shard.data).tobytes() for shard in shards}) == 1


# --- generating ------------------------------------------------------------------------------------------------------


class Decoder(nnx.Module):
    def __init__(self, batch: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=rngs)
        self.attention.init_cache((batch, 6, 8))

    def __call__(self, token: Any) -> Any:
        return self.attention(self.embed(token)[:, None])[:, 0]


def test_each_device_generates_with_its_own_cache() -> None:
    cache = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, placement=sw.PerDevice("data"))
    step = sw.step(lambda model, token: model(token), writes="cache")
    states = {}
    for name, batch, mesh in (("each", 2, DATA), ("one", 8, None)):
        model = Decoder(batch, nnx.Rngs(0))
        states[name] = sw.Kinds.standard().replace(cache=cache).plan(model).take(model, mesh=mesh)
    drawn = jax.random.randint(jax.random.key(3), (4, 8), 0, 16)
    for token in drawn:
        states["each"], out = step(states["each"], token)
        states["one"], expected = step(states["one"], token)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    held = states["each"]["cache"]["attention"]
    np.testing.assert_array_equal(held["cache_index"], [4] * 4)
    alone = states["one"]["cache"]["attention"]["cached_key"]
    np.testing.assert_allclose(held["cached_key"].reshape(alone.shape), alone, rtol=1e-5, atol=1e-6)
    again = states["each"].restart("cache")
    assert again["cache"]["attention"]["cached_key"].sharding == held["cached_key"].sharding
    _, first = step(again, drawn[0])
    np.testing.assert_allclose(first, step(states["one"].restart("cache"), drawn[0])[1], rtol=1e-5, atol=1e-6)


def test_slots_are_counted_over_all_devices() -> None:
    fresh = sw.Kind(nnx.Cache, saved=False, restart=lambda slots: -jnp.ones_like(slots), batch_axis=1)
    kind = dataclasses.replace(fresh, placement=sw.PerDevice("data"))
    model = nnx.Dict(hits=nnx.Cache(jnp.zeros((3, 2))))
    state = sw.Kinds(cache=kind).plan(model).take(model, mesh=DATA)
    restarted = state.restart("cache", where=[0, 5])["cache"]["hits"]
    assert restarted.shape == (4, 3, 2)
    expected = np.zeros((4, 3, 2))
    expected[0, :, 0] = expected[2, :, 1] = -1
    np.testing.assert_array_equal(restarted, expected)
    state = sw.Kinds(cache=kind).plan(model).take(model, mesh=DATA)
    np.testing.assert_array_equal(state.restart("cache")["cache"]["hits"], -np.ones((4, 3, 2)))


def test_noise_differs_from_device_to_device_where_the_keys_do() -> None:
    model = nnx.Dict(drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0)), own=nnx.BatchStat(jnp.zeros(())))
    step = sw.step(lambda model, x: model.drop(x) + model.own[...], writes="rng")
    masks = {}
    for name, placement in (("own", sw.PerDevice("data")), ("shared", None)):
        kinds = KINDS.replace(rng=sw.Kind(nnx.RngState, placement=placement))
        state = kinds.plan(model).take(model, mesh=DATA)
        state, first = step(state, jnp.ones((4, 64)))
        _, second = step(state, jnp.ones((4, 64)))
        assert not np.array_equal(first, second)
        masks[name] = {tuple(row) for row in np.asarray(first)}
    assert (len(masks["own"]), len(masks["shared"])) == (4, 1)
