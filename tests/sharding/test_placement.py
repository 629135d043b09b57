"""A plan on a mesh: where each array comes to lie, and that steps there are the steps of one device."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import statewise as sw


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def kinds_of(placement: Any, **others: sw.Kind) -> sw.Kinds:
    return sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement), **others)


class Block(nnx.Module):
    """Two layers with statistics and noise between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.drop(jax.nn.relu(self.norm(self.up(x)))))


def make() -> Block:
    return Block(nnx.Rngs(0))


def fsdp(path: Any, shape: Any) -> Any:
    return sw.Sharded("data") if shape and shape[0] % 4 == 0 else sw.Replicated()


def tensor_parallel(path: Any, shape: Any) -> Any:
    places = {
        ("up", "kernel"): sw.Sharded(None, "model"),
        ("up", "bias"): sw.Sharded("model"),
        ("down", "kernel"): sw.Sharded("model", None),
    }
    return places.get(path, sw.Replicated())


WAYS = pytest.mark.parametrize("placement", [None, sw.Replicated(), fsdp, tensor_parallel])


def by_key(state: Any) -> dict[str, Any]:
    return {keys[0].key: array for keys, array in jax.tree_util.tree_flatten_with_path(state)[0]}


def number(array: Any) -> Any:
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.extended) else array


def lies_as(state: Any, shardings: Any) -> bool:
    wanted = by_key(shardings)
    return all(array.sharding.is_equivalent_to(wanted[key], array.ndim) for key, array in by_key(state).items())


def same(one: Any, other: Any) -> bool:
    theirs = by_key(other)
    return all(np.array_equal(number(array), number(theirs[key])) for key, array in by_key(one).items())


# --- shardings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [mesh_of(data=4, model=2), AbstractMesh((4, 2), ("data", "model"))])
def test_each_array_lies_as_its_kind_says(mesh: Any) -> None:
    plan = kinds_of(tensor_parallel, stats=sw.Kind(nnx.BatchStat, placement=sw.Sharded(("model", "data")))).plan(make())
    places = plan.shardings(mesh)
    assert isinstance(places, sw.State)
    specs = {key: place.spec for key, place in by_key(places).items()}
    split = {key: spec for key, spec in specs.items() if spec != jax.P()}
    assert split == {
        "params/up/kernel": jax.P(None, "model"),
        "params/up/bias": jax.P("model"),
        "params/down/kernel": jax.P("model"),
        "stats/norm/mean": jax.P(("model", "data")),
        "stats/norm/var": jax.P(("model", "data")),
    }
    assert all(place.mesh == mesh for place in by_key(places).values())


def test_jax_takes_the_shardings_as_they_are() -> None:
    plan, mesh = kinds_of(fsdp).plan(make()), mesh_of(data=4, model=2)
    places = plan.shardings(mesh)
    state = plan.take(make())
    assert lies_as(jax.device_put(state, places), places)
    assert lies_as(jax.jit(lambda state: state, out_shardings=places)(state), places)


def test_a_placement_may_name_memory() -> None:
    mesh = mesh_of(data=8)
    plan = kinds_of(sw.Replicated(memory="pinned_host")).plan(make())
    memory = {key: array.sharding.memory_kind for key, array in by_key(plan.take(make(), mesh=mesh)).items()}
    assert {kind for key, kind in memory.items() if key.startswith("params")} == {"pinned_host"}
    assert {kind for key, kind in memory.items() if not key.startswith("params")} == {"device"}


def test_a_function_sees_paths_relative_to_its_object_and_within_a_value() -> None:
    seen = []

    def look(path: Any, shape: Any) -> Any:
        seen.append((path, shape))
        return sw.Replicated()

    pair = nnx.Dict(w=nnx.Param({"a": jnp.zeros(2), "b": jnp.zeros((3, 1))}))
    kinds_of(look).plan(pair, nnx.Linear(1, 2, use_bias=False, rngs=nnx.Rngs(0))).shardings(mesh_of(data=8))
    assert seen == [(("w", "a"), (2,)), (("w", "b"), (3, 1)), (("kernel",), (1, 2))]


def test_a_tied_leaf_is_asked_for_by_all_its_paths() -> None:
    seen = []

    def look(path: Any, shape: Any) -> Any:
        seen.append(path)
        return sw.Sharded("data")

    shared = nnx.Param(jnp.zeros(8))
    places = kinds_of(look).plan(nnx.Dict(u=shared, w=shared)).shardings(mesh_of(data=8))
    assert seen == [("u",), ("w",)]
    assert by_key(places)["params/u"].spec == jax.P("data")


def test_small_arrays_may_be_packed_beside_large_ones_that_are_split() -> None:
    def large(path: Any, shape: Any) -> Any:
        return sw.Sharded("data") if len(shape) == 2 else sw.Replicated()

    model = nnx.Dict({f"b{n}": nnx.Param(jnp.full(3, n, float)) for n in range(5)}, w=nnx.Param(jnp.ones((512, 64))))
    mesh = mesh_of(data=8)
    state = kinds_of(large).plan(model).take(model, mesh=mesh, pack=True)
    assert [array.shape for array in jax.tree.leaves(state)] == [(512, 64), (15,)]
    assert lies_as(state, state.plan.shardings(mesh))
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(state)] == [jax.P("data"), jax.P()]
    np.testing.assert_array_equal(state["params"]["b3"], np.full(3, 3.0))


# --- optimizer state follows -------------------------------------------------------------------------------------


def specs_of(plan: sw.Plan, mesh: Any) -> dict[str, Any]:
    places = by_key(plan.shardings(mesh))
    return {key: place.spec for key, place in places.items() if key.startswith("optimizer")}


def linear(inside: int = 8, outside: int = 16) -> nnx.Linear:
    return nnx.Linear(inside, outside, rngs=nnx.Rngs(0))


def kernel_split(path: Any, shape: Any) -> Any:
    return sw.Sharded("data", "model") if path[-1] == "kernel" else sw.Replicated()


def test_moments_lie_as_their_parameters() -> None:
    plan = kinds_of(kernel_split).plan(linear(), optimizers={"params": optax.adam(1.0)})
    assert specs_of(plan, mesh_of(data=4, model=2)) == {
        "optimizer/params/0/count": jax.P(),
        "optimizer/params/0/mu/bias": jax.P(),
        "optimizer/params/0/mu/kernel": jax.P("data", "model"),
        "optimizer/params/0/nu/bias": jax.P(),
        "optimizer/params/0/nu/kernel": jax.P("data", "model"),
    }


@pytest.mark.parametrize(
    "shape, row, col",
    [((128, 256), "data", "model"), ((256, 128), "model", "data"), ((128, 128), "data", "model")],
)
def test_factored_moments_lie_as_the_axis_that_is_left(shape: Any, row: str, col: str) -> None:
    plan = kinds_of(kernel_split).plan(linear(*shape), optimizers={"params": optax.adafactor(1e-3)})
    specs = specs_of(plan, mesh_of(data=4, model=2))
    assert {key: spec for key, spec in specs.items() if spec != jax.P()} == {
        "optimizer/params/0/v_row/kernel": jax.P(row),
        "optimizer/params/0/v_col/kernel": jax.P(col),
    }


def test_moments_in_a_masked_and_joint_optimizer_follow_too() -> None:
    tx = optax.multi_transform(
        {"a": optax.sgd(1.0, 0.9), "b": optax.adam(1.0)}, nnx.State({"kernel": "a", "bias": "b"})
    )
    plan = kinds_of(kernel_split).plan(linear(), optimizers={"params": tx})
    split = {key: spec for key, spec in specs_of(plan, mesh_of(data=4, model=2)).items() if spec != jax.P()}
    assert list(split.values()) == [jax.P("data", "model")]
    assert next(iter(split)).endswith("trace/kernel")


def test_the_state_of_an_nnx_optimizer_follows_its_model() -> None:
    model = linear()
    plan = kinds_of(kernel_split).plan(model, nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param))
    split = {key for key, spec in specs_of(plan, mesh_of(data=4, model=2)).items() if spec == jax.P("data", "model")}
    assert split == {"optimizer/1/opt_state/0/mu/kernel", "optimizer/1/opt_state/0/nu/kernel"}


def test_an_optimizer_may_be_split_where_its_parameters_are_not() -> None:
    def zero(path: Any, shape: Any) -> Any:
        return sw.Sharded("data") if shape else sw.Replicated()

    kinds = kinds_of(None, optimizer=sw.Kind(nnx.OptState, placement=zero))
    plan = kinds.plan(linear(), optimizers={"params": optax.adam(1.0)})
    places = plan.shardings(mesh_of(data=8))
    assert {place.spec for key, place in by_key(places).items() if key.startswith("params")} == {jax.P()}
    assert {spec for key, spec in specs_of(plan, mesh_of(data=8)).items() if "count" not in key} == {jax.P("data")}


def test_what_an_optimizer_updates_may_itself_be_optimizer_state() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.zeros(8)), mean=nnx.OptState(jnp.zeros(8)))
    both = sw.Kind((nnx.Param, nnx.OptState), placement=sw.Sharded("data"))
    plan = sw.Kinds(both=both).plan(model, optimizers={"both": optax.sgd(1.0, 0.9)})
    assert set(specs_of(plan, mesh_of(data=8)).values()) == {jax.P("data")}
    plain = sw.Kinds(both=sw.Kind((nnx.Param, nnx.OptState))).plan(model, optimizers={"both": optax.sgd(1.0, 0.9)})
    assert set(specs_of(plain, mesh_of(data=8)).values()) == {jax.P()}


# --- states on a mesh --------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("copy", [True, False])
def test_take_puts_each_array_in_its_place(placement: Any, copy: bool) -> None:
    mesh = mesh_of(data=4, model=2)
    plan = kinds_of(placement).plan(make(), optimizers={"params": optax.adam(1e-2)})
    state = plan.take(make(), mesh=mesh, copy=copy)
    assert state.plan is plan
    assert lies_as(state, plan.shardings(mesh))
    assert same(state, plan.take(make()))


def test_the_model_stays_usable_when_a_step_donates_what_was_taken() -> None:
    mesh, model = mesh_of(data=4, model=2), make()
    before = model.up.kernel[...].copy()
    state = sw.plan(model).take(model, mesh=mesh)
    again = sw.plan(model).take(model, mesh=mesh)
    jax.jit(lambda state: jax.tree.map(lambda a: a, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(model.up.kernel[...], before)
    np.testing.assert_array_equal(again["params"]["up"]["kernel"], before)


def test_taking_without_a_copy_shares_memory_where_it_can() -> None:
    model = make()
    state = sw.plan(model).take(model, mesh=mesh_of(data=8), copy=False)
    mine = model.up.kernel.get_raw_value().addressable_shards[0].data.unsafe_buffer_pointer()
    shards = state["params"]["up"]["kernel"].addressable_shards
    assert mine in {shard.data.unsafe_buffer_pointer() for shard in shards}


def test_two_leaves_that_share_an_array_are_told_apart_on_a_mesh_too() -> None:
    array = jnp.ones(8)
    model = nnx.Dict(a=nnx.Param(array), b=nnx.Param(array))
    state = sw.plan(model).take(model, mesh=mesh_of(data=8), copy=False)
    pointers = {leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    assert len(pointers) == 2


def test_an_abstract_state_has_shardings_and_restores_into_them(tmp_path: pathlib.Path) -> None:
    plan = kinds_of(fsdp).plan(make(), optimizers={"params": optax.adam(1e-2)})
    mesh = mesh_of(data=4, model=2)
    state = plan.take(make())
    sw.save(tmp_path / "one", state)
    target = plan.abstract(mesh)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(target))
    assert lies_as(target, plan.shardings(mesh))
    restored, _ = sw.restore(tmp_path / "one", target)
    assert lies_as(restored, plan.shardings(mesh))
    assert same(restored, state)


@WAYS
def test_init_makes_in_place_what_take_would_put_there(placement: Any) -> None:
    mesh = mesh_of(data=4, model=2)
    plan = kinds_of(placement).plan(nnx.eval_shape(make), optimizers={"params": optax.adam(1e-2)})
    made, taken = plan.init(make, mesh), plan.take(make(), mesh=mesh)
    assert made.plan is plan
    assert lies_as(made, plan.shardings(mesh))
    for key, array in by_key(made).items():
        # XLA may round the last bit of an initializer otherwise when it compiles it in parts.
        np.testing.assert_allclose(number(array), number(by_key(taken)[key]), rtol=1e-6, atol=1e-7)


def test_init_takes_several_objects() -> None:
    def both() -> Any:
        model = linear()
        return model, nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param)

    mesh = mesh_of(data=4, model=2)
    plan = kinds_of(kernel_split).plan(*nnx.eval_shape(both))
    assert lies_as(plan.init(both, mesh), plan.shardings(mesh))


@sw.train_step
def train(model: Block, x: Any, y: Any) -> Any:
    return jnp.mean((model(x) - y) ** 2)


# Not Adam: the gradient of a bias before a normalisation is nothing but rounding, which Adam makes as large as others.
MOMENTUM = optax.sgd(0.1, momentum=0.9)


@functools.cache
def on_one_device() -> tuple[Any, list[float]]:
    return trained(sw.plan(make(), optimizers={"params": MOMENTUM}).take(make()), *batch())


def batch() -> tuple[Any, Any]:
    return jax.random.normal(jax.random.key(1), (16, 8)), jnp.ones((16, 4))


def trained(state: Any, x: Any, y: Any) -> tuple[Any, list[float]]:
    losses = []
    for _ in range(3):
        state, loss = train(state, x, y)
        losses.append(float(loss))
    return state, losses


@WAYS
def test_training_on_a_mesh_is_training_on_one_device(placement: Any) -> None:
    mesh = mesh_of(data=4, model=2)
    plan = kinds_of(placement).plan(make(), optimizers={"params": MOMENTUM})
    split = jax.NamedSharding(mesh, jax.P("data"))
    state, losses = trained(plan.take(make(), mesh=mesh), *(jax.device_put(array, split) for array in batch()))
    reference, expected = on_one_device()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for key, array in by_key(reference).items():
        np.testing.assert_allclose(number(by_key(state)[key]), number(array), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_a_replicated_state_stays_replicated_over_steps(types: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(types,))
    plan = sw.plan(make(), optimizers={"params": MOMENTUM})
    split = jax.NamedSharding(mesh, jax.P("data"))
    state, losses = trained(plan.take(make(), mesh=mesh), *(jax.device_put(array, split) for array in batch()))
    assert lies_as(state, plan.shardings(mesh))
    np.testing.assert_allclose(losses, on_one_device()[1], rtol=1e-5)


def test_a_packed_state_trains_on_a_mesh() -> None:
    mesh = mesh_of(data=8)
    plan = sw.plan(make(), optimizers={"params": MOMENTUM})
    split = jax.NamedSharding(mesh, jax.P("data"))
    state = plan.take(make(), mesh=mesh, pack=True)
    _, losses = trained(state, *(jax.device_put(array, split) for array in batch()))
    np.testing.assert_allclose(losses, on_one_device()[1], rtol=1e-5)


@WAYS
def test_shardings_keep_a_trained_state_in_its_place(placement: Any) -> None:
    """Inside a `jax.jit` of the user's XLA may lay out a state as it likes; `out_shardings` holds it."""
    mesh = mesh_of(data=4, model=2)
    plan = kinds_of(placement).plan(make(), optimizers={"params": MOMENTUM})
    places = plan.shardings(mesh)
    split = jax.NamedSharding(mesh, jax.P("data"))
    step = jax.jit(lambda state, x, y: train(state, x, y), out_shardings=(places, None), donate_argnums=0)
    state, losses = plan.take(make(), mesh=mesh), []
    for _ in range(3):
        state, loss = step(state, *(jax.device_put(array, split) for array in batch()))
        assert lies_as(state, places)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, on_one_device()[1], rtol=1e-5)
