"""Transfers between models that are not alike: stacked layers and single ones, other head layouts, other meshes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import statewise as sw


def parameter(key: int, *shape: int, dtype: Any = jnp.float32) -> nnx.Param:
    return nnx.Param(jax.random.normal(jax.random.key(key), shape).astype(dtype))


class Trainer(nnx.Module):
    """Three layers in stacks, heads as an axis of their own, q and k in one array."""

    def __init__(self, seed: int = 0, dtype: Any = jnp.float32) -> None:
        self.embed = parameter(seed, 10, 8, dtype=dtype)
        self.layers = nnx.Dict(
            up=parameter(seed + 1, 3, 8, 16, dtype=dtype),
            qk=parameter(seed + 2, 3, 8, 6, 4, dtype=dtype),  # layer, d, heads, h
            scale=parameter(seed + 3, 8, dtype=dtype),
        )
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(seed))
        self.seen = nnx.Variable(jnp.array(seed))


class Block(nnx.Module):
    def __init__(self, seed: int, dtype: Any) -> None:
        self.up = parameter(seed, 16, 8, dtype=dtype)
        self.q = parameter(seed, 16, 8, dtype=dtype)  # (heads h), d
        self.k = parameter(seed, 8, 8, dtype=dtype)


class Actor(nnx.Module):
    """The same layers in a list, q and k apart, flat and transposed."""

    def __init__(self, seed: int = 7, dtype: Any = jnp.float32) -> None:
        self.embed = parameter(seed, 10, 8, dtype=dtype)
        self.blocks = nnx.List([Block(seed + layer, dtype) for layer in range(3)])
        self.layers = nnx.Dict(scale=parameter(seed, 8, dtype=dtype))
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(seed))
        self.cache = nnx.Cache(jnp.zeros(4))


NAMES = sw.Names(
    {
        "layers/up": sw.Name("blocks/{i}/up", "layer o i -> layer i o"),
        "layers/qk": sw.Name(
            ["blocks/{i}/q", "blocks/{i}/k"], "layer (n h) d -> layer d n h", h=4, join=0, sizes=(16, 8)
        ),
    }
)


def by_hand(state: sw.State) -> dict[str, Any]:
    """What the actor has to hold, in jnp."""
    params = state["params"]
    found = {"embed": params["embed"][...], "layers/scale": params["layers"]["scale"][...]}
    for layer in range(3):
        heads = params["layers"]["qk"][layer].transpose(1, 2, 0).reshape(24, 8)
        found[f"blocks/{layer}/up"] = params["layers"]["up"][layer].T
        found[f"blocks/{layer}/q"], found[f"blocks/{layer}/k"] = heads[:16], heads[16:]
    return found


def held(state: sw.State, kind: str = "params") -> dict[str, Any]:
    flat = jax.tree.leaves_with_path(state[kind], is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    keys = ["/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in flat]
    return {
        key: getattr(leaf, "get_value", lambda leaf=leaf: leaf)() for key, (_, leaf) in zip(keys, flat, strict=True)
    }


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """To the bit, dtypes included."""
    assert found.keys() == expected.keys()
    pairs = [(np.asarray(found[key]), np.asarray(expected[key])) for key in found]
    return all(one.dtype == two.dtype and one.tobytes() == two.tobytes() for one, two in pairs)


def mesh_of(first: int, stop: int, type_: AxisType = AxisType.Auto, **axes: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[first:stop]).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(type_,) * len(axes))


def taken(model: Any, mesh: Any = None, **kinds: Any) -> sw.State:
    return sw.Kinds.standard().replace(**kinds).plan(model).take(model, mesh=mesh)


def test_there_and_back_to_the_bit() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES)
    assert published.plan is actor.plan
    assert equal(held(published), by_hand(trainer))
    assert published["cache"] is not None
    assert held(published, "rng").keys() == held(actor, "rng").keys()
    back = sw.transfer(published, taken(Trainer(seed=3)), kinds="params", names=NAMES)
    assert equal(held(back), held(trainer))


def test_the_two_share_no_memory_and_nothing_else_changes() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves((trainer["params"], actor["params"]))]
    for names in (NAMES, NAMES | sw.Names({"embed": sw.Name("embed", "v d -> v d")})):
        published = sw.transfer(trainer, actor, kinds="params", names=names)
        for leaf in jax.tree.leaves(published["params"]):
            leaf.delete()
    assert all(map(np.array_equal, jax.tree.leaves((trainer["params"], actor["params"])), before))


def test_keys_and_what_has_no_row_go_by_path() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    published = sw.transfer(trainer, actor, kinds=("params", "rng"), names=NAMES)
    key = lambda state: jax.random.key_data(state["rng"]["drop"]["rngs"]["key"][...])  # noqa: E731
    assert np.array_equal(key(published), key(trainer))
    assert not np.array_equal(key(actor), key(trainer))


@pytest.mark.parametrize(("src", "target"), [(jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.bfloat16)])
def test_bfloat16(src: Any, target: Any) -> None:
    trainer, actor = taken(Trainer(dtype=src)), taken(Actor(dtype=target))
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES, cast=src != target)
    assert equal(held(published), {key: array.astype(target) for key, array in by_hand(trainer).items()})
    wide = sw.transfer(published, taken(Trainer(dtype=src)), kinds="params", names=NAMES, cast=src != target)
    assert equal(held(wide), {key: array.astype(target).astype(src) for key, array in held(trainer).items()})


def test_a_dtype_for_the_target() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES, cast="bfloat16")
    assert equal(held(published), {key: array.astype(jnp.bfloat16) for key, array in by_hand(trainer).items()})


def second_axis(_: Any, shape: Any) -> sw.Sharded:
    return sw.Sharded(None, "model") if len(shape) > 1 else sw.Sharded("model")


SPLIT = sw.Kind(sw.Kinds.standard()["params"].of, placement=second_axis)


@pytest.mark.parametrize("type_", [AxisType.Auto, AxisType.Explicit])
def test_other_meshes_without_the_host(type_: AxisType) -> None:
    learner_mesh = mesh_of(0, 4, type_, data=2, model=2)
    trainer = taken(Trainer(), learner_mesh, params=SPLIT)
    meshes = [mesh_of(4, 8, type_, model=4), mesh_of(0, 4, type_, model=4), mesh_of(6, 8, type_, model=2)]
    for mesh in meshes if type_ is AxisType.Auto else meshes[:1]:
        actor = taken(Actor(), mesh, params=SPLIT)
        places = [leaf.sharding for leaf in jax.tree.leaves(actor["params"])]
        with (
            jax.transfer_guard_device_to_host("disallow_explicit"),
            jax.transfer_guard_host_to_device("disallow_explicit"),
        ):
            published = sw.transfer(trainer, actor, kinds="params", names=NAMES)
            back = sw.transfer(published, trainer, kinds="params", names=NAMES)
        assert equal(held(published), by_hand(trainer))
        assert [leaf.sharding for leaf in jax.tree.leaves(published["params"])] == places
        assert equal(held(back), held(trainer))
        assert [leaf.sharding for leaf in jax.tree.leaves(back["params"])] == [
            leaf.sharding for leaf in jax.tree.leaves(trainer["params"])
        ]


def test_parameters_in_the_memory_of_the_host() -> None:
    def second_axis_on_the_host(_: Any, shape: Any) -> sw.Sharded:
        return sw.Sharded(*(None, "model")[-len(shape) :], memory="pinned_host")

    mesh = mesh_of(0, 2, model=2)
    offloaded = sw.Kind(SPLIT.of, placement=second_axis_on_the_host)
    trainer, actor = taken(Trainer(), mesh, params=offloaded), taken(Actor(), mesh, params=offloaded)
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES)
    assert equal(held(published), by_hand(taken(Trainer())))
    assert held(published)["blocks/0/up"].sharding == held(actor)["blocks/0/up"].sharding
    assert held(actor)["blocks/0/up"].sharding.memory_kind == "pinned_host"


def test_into_a_plan_on_the_source_s_mesh() -> None:
    only = sw.Kinds(params=SPLIT, rest=sw.Kind(...))
    trainer = taken(Trainer(), mesh_of(0, 4, data=2, model=2), params=SPLIT)
    model = nnx.Dict(embed=Actor().embed, blocks=Actor().blocks, layers=Actor().layers)
    plan = only.plan(model)
    published = sw.transfer(trainer, plan, names=NAMES)
    assert equal(held(published), by_hand(trainer))
    expected = plan.shardings(mesh_of(0, 4, data=2, model=2))
    assert held(published)["blocks/0/up"].sharding == jax.tree.leaves(expected["params"])[0]
    moved = sw.transfer(trainer, plan, names=NAMES, mesh=mesh_of(4, 8, model=4))
    assert equal(held(moved), by_hand(trainer))


def test_layers_on_devices_of_their_own() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES)
    spread = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(leaf, jax.devices()["blocks/2" in str(path)]), published
    )
    assert equal(held(sw.transfer(spread, trainer, kinds="params", names=NAMES)), held(trainer))
    again = sw.transfer(trainer, spread, kinds="params", names=NAMES)
    assert held(again)["blocks/2/up"].devices() == {jax.devices()[1]}


def test_inside_jit() -> None:
    trainer, actor = taken(Trainer()), taken(Actor())
    publish = jax.jit(lambda src, target: sw.transfer(src, target, kinds="params", names=NAMES))
    assert equal(held(publish(trainer, actor)), by_hand(trainer))


def test_several_objects_and_an_optimizer() -> None:
    model = Trainer()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    trainer = sw.plan(model, optimizer).take(model, optimizer)
    assert equal(held(sw.transfer(trainer, taken(Actor()), kinds="params", names=NAMES)), by_hand(taken(model)))
    trainer = sw.plan(model=model, optimizer=optimizer).take(model=model, optimizer=optimizer)
    assert equal(held(sw.transfer(trainer, taken(Actor()), kinds="params", names=NAMES)), by_hand(taken(model)))


def test_packed_states() -> None:
    model, served = Trainer(), Actor()
    trainer = sw.plan(model).take(model, pack=True)
    actor = sw.plan(served).take(served, pack=True)
    published = sw.transfer(trainer, actor, kinds="params", names=NAMES)
    assert published.plan is actor.plan
    assert equal(held(published), by_hand(taken(model)))


def test_what_the_source_does_not_have_keeps_its_value() -> None:
    names = NAMES | sw.Names({"embed": None})
    trainer, actor = taken(Trainer()), taken(Actor())
    back = sw.transfer(actor, trainer, kinds="params", names=names)
    assert np.array_equal(back["params"]["embed"][...], trainer["params"]["embed"][...])
    assert back["params"]["embed"][...] is not trainer["params"]["embed"][...]
    published = sw.transfer(trainer, actor, kinds="params", names=names)
    assert np.array_equal(published["params"]["embed"][...], actor["params"]["embed"][...])
    assert equal(held(published), by_hand(trainer) | {"embed": actor["params"]["embed"][...]})


def test_what_depends_on_the_parameters_is_stale() -> None:
    @sw.step(writes="cache")
    def act(model: Actor) -> Any:
        model.cache[...] += 1
        return model.embed[0, 0]

    kinds = sw.Kinds.standard()
    cache = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, depends_on="params")
    served = Actor()
    actor = kinds.replace(cache=cache).plan(served).take(served)
    actor, _ = act(actor)
    actor = sw.transfer(taken(Trainer()), actor, kinds="params", names=NAMES)
    with pytest.raises(sw.StaleError):
        act(actor)
    act(actor.restart("cache"))


def test_tied_leaves() -> None:
    embed = parameter(0, 4, 3)
    tied, apart = nnx.Dict(embed=embed, head=embed), nnx.Dict(a=parameter(1, 4, 3), b=parameter(2, 3, 4))
    names = sw.Names({"embed": "a", "head": sw.Name("b", "d v -> v d")})
    published = sw.transfer(taken(tied), taken(apart), names=names)
    assert np.array_equal(published["params"]["b"][...], embed[...].T)
    both = nnx.Dict(a=embed, b=embed)
    names = sw.Names({"embed": "a", "head": "b"})
    published = sw.transfer(taken(tied), taken(both), names=names)
    assert np.array_equal(published["params"]["a"][...], embed[...])


@pytest.mark.parametrize("is_on_mesh", [False, True])
def test_a_stack_of_no_layers(is_on_mesh: bool) -> None:
    mesh = mesh_of(0, 2, AxisType.Explicit, data=2) if is_on_mesh else None
    none = taken(nnx.Dict(layers=nnx.List([]), scale=parameter(0, 8)))
    stacked = taken(nnx.Dict(up=parameter(1, 0, 8, 16), scale=parameter(2, 8)), mesh)
    names = sw.Names({"up": sw.Name("layers/{i}/up", "layer o i -> layer i o")})
    filled = sw.transfer(none, stacked, names=names)
    assert filled["params"]["up"].shape == (0, 8, 16)
    assert filled["params"]["up"].sharding == stacked["params"]["up"].sharding
    assert np.array_equal(filled["params"]["scale"], none["params"]["scale"])
    assert jax.eval_shape(lambda a, b: sw.transfer(a, b, names=names), none, stacked)["params"]["up"].shape == (
        0,
        8,
        16,
    )
    back = sw.transfer(stacked, none, names=names)
    assert np.array_equal(back["params"]["scale"], stacked["params"]["scale"])
