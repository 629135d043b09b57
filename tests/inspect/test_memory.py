"""What a plan takes of each device: against what JAX really puts there, and for a model that no machine here holds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import statewise as sw
from refusals import refused


def linear(**options: Any) -> nnx.Linear:
    return nnx.Linear(16, 64, rngs=nnx.Rngs(0), **options)


def fsdp(path: Any, shape: Any) -> Any:
    return sw.Sharded(("data", "model")) if shape and shape[0] % 8 == 0 else sw.Replicated()


def kinds_of(placement: Any, **others: sw.Kind) -> sw.Kinds:
    return sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement), **others)


def model() -> nnx.Dict:
    keys = nnx.Variable(jax.random.split(jax.random.key(0), 4))
    half = nnx.Param(jnp.ones((8, 3), jnp.bfloat16))
    return nnx.Dict(a=linear(), norm=nnx.BatchNorm(16, rngs=nnx.Rngs(0)), half=half, keys=keys)


def really(state: sw.State, kind: str) -> list[Counter[Any]]:
    """Bytes on each device: of the device's own memory, and of the host's."""
    here: dict[str, Counter[Any]] = {"device": Counter(), "pinned_host": Counter()}
    for array in state.part(kind).arrays:
        array = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.extended) else array
        for shard in array.addressable_shards:
            here[array.sharding.memory_kind][shard.device] += shard.data.nbytes
    return list(here.values())


@pytest.mark.parametrize(
    "kinds",
    [
        sw.Kinds.standard(),
        kinds_of(fsdp),
        kinds_of(
            lambda path, shape: sw.Sharded(None, "model") if len(shape) == 2 and shape[1] % 2 == 0 else sw.Replicated()
        ),
        kinds_of(sw.Sharded("data"), stats=sw.Kind(nnx.BatchStat, placement=sw.Sharded("model"))),
        kinds_of(sw.Replicated(memory="pinned_host")),
        kinds_of(None, optimizer=sw.Kind(nnx.OptState, placement=fsdp)),
    ],
)
@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=2)])
def test_it_counts_what_the_devices_really_hold(kinds: sw.Kinds, tx: Any) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = kinds.plan(model(), optimizers={"params": tx})
    counted = sw.memory(plan, mesh)
    state = plan.take(model(), mesh=mesh)
    for kind in plan.kinds:
        device, host = really(state, kind)
        assert {counted[kind].per_device} == set(device.values() or [0])
        assert {counted[kind].host} == set(host.values() or [0])
        assert counted[kind].nbytes == sum(leaf.nbytes for leaf in plan[kind])


class Wide(nnx.Module):
    """Every leaf of which is read by a step."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.norm = nnx.BatchNorm(256, rngs=rngs)
        self.down = nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.norm(nnx.relu(self.up(x))))


@pytest.mark.parametrize("placement", [sw.Replicated(), fsdp], ids=["replicated", "fsdp"])
def test_xla_says_the_same_of_a_compiled_step(placement: Any) -> None:
    """Of arguments and results to the byte; the gradients stand in XLA's temporary memory, among activations."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = kinds_of(placement).plan(nnx.eval_shape(Wide), optimizers={"params": optax.adam(1e-3)})
    split = jax.NamedSharding(mesh, jax.P(("data", "model")))
    batch = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    train = sw.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    said = train.lower(plan.abstract(mesh), batch).compile().memory_analysis()
    counted = sw.memory(plan, mesh)
    state = counted.total - counted.gradients
    assert said.argument_size_in_bytes == state + 64 * 64 * 4 // 8
    # The whole state is written in place.
    assert said.alias_size_in_bytes == state
    # A scalar loss, and XLA's table of pointers to its results.
    assert 0 <= said.output_size_in_bytes - state < 1024
    assert said.temp_size_in_bytes >= counted.gradients


def test_a_mesh_may_be_one_that_is_not_there() -> None:
    plan = kinds_of(fsdp).plan(model(), optimizers={"params": optax.adam(1.0)})
    real = sw.memory(plan, jax.make_mesh((4, 2), ("data", "model")))
    assert sw.memory(plan, AbstractMesh((4, 2), ("data", "model"))) == real
    assert sw.memory(plan, {"data": 4, "model": 2}) == real
    assert sw.memory(plan.abstract(), {"data": 4, "model": 2}) == real
    assert real.devices == 8


def test_gradients_are_of_what_has_an_optimizer_and_lie_as_it_does() -> None:
    plan = kinds_of(fsdp).plan(model(), optimizers={"params": optax.sgd(1.0)})
    counted = sw.memory(plan, {"data": 4, "model": 2})
    assert counted.gradients == counted["params"].per_device
    assert sw.memory(plan, {"data": 4, "model": 2}, gradients=False).gradients == 0
    assert sw.memory(kinds_of(fsdp).plan(model()), {"data": 4, "model": 2}).gradients == 0
    assert counted.total == sum(one.per_device for one in counted.kinds) + counted.gradients


def test_what_splitting_a_replicated_kind_would_save() -> None:
    counted = sw.memory(
        kinds_of(fsdp).plan(nnx.Dict(a=linear(), n=nnx.BatchNorm(15, rngs=nnx.Rngs(0)))), {"data": 4, "model": 2}
    )
    assert counted["params"].saving_if_sharded == 0
    assert counted["stats"].per_device == 120
    assert counted["stats"].saving_if_sharded == 120 - 15
    assert counted["cache"].saving_if_sharded == 0


def test_the_largest_leaves_come_first_and_a_leaf_counts_with_all_its_arrays() -> None:
    pair = nnx.Param({"a": jnp.zeros(10), "b": jnp.zeros(10)})
    plan = sw.plan(
        nnx.Dict(many=pair, one=nnx.Param(jnp.zeros(15)), **{f"s{n}": nnx.Param(jnp.zeros(1)) for n in range(20)})
    )
    largest = sw.memory(plan, {"data": 8}).largest
    assert [(leaf.path, here) for leaf, here in largest[:3]] == [(("many",), 80), (("one",), 60), (("s0",), 4)]
    assert len(largest) == 10


def test_it_says_loudly_that_activations_are_not_in_it() -> None:
    counted = sw.memory(sw.plan(model()), {"data": 8})
    assert "ACTIVATIONS ARE NOT INCLUDED" in str(counted).splitlines()[0]
    assert "ACTIVATIONS ARE NOT INCLUDED" in counted._repr_html_()
    assert json.loads(counted.to_json())["note"] == "ACTIVATIONS ARE NOT INCLUDED"


def test_the_table_has_a_column_for_other_memory_where_there_is_some() -> None:
    counted = sw.memory(kinds_of(sw.Replicated(memory="pinned_host")).plan(linear(use_bias=False)), {"data": 2})
    assert str(counted).splitlines() == [
        "memory of each of 2 devices, mesh (data=2): ACTIVATIONS ARE NOT INCLUDED",
        "kind    arrays    bytes  per device     host  saved if sharded",
        "--------------------------------------------------------------",
        "params       1  4.0 KiB         0 B  4.0 KiB                 -",
        "--------------------------------------------------------------",
        "total                           0 B",
        "",
        "the largest leaves",
        "path  kind  per device",
        "----------------------",
    ]


def test_as_json_it_says_what_the_attributes_do() -> None:
    counted = sw.memory(
        kinds_of(fsdp).plan(linear(use_bias=False), optimizers={"params": optax.sgd(1.0)}), {"data": 4, "model": 2}
    )
    told = json.loads(counted.to_json())
    assert told["mesh"] == {"data": 4, "model": 2}
    assert (told["devices"], told["gradients"], told["total"]) == (8, 512, 1024)
    assert told["kinds"][0] == {
        "name": "params",
        "arrays": 1,
        "nbytes": 4096,
        "per_device": 512,
        "host": 0,
        "saving_if_sharded": 0,
        "compute": None,
        "copies": 0,
    }
    assert [(leaf["path"], leaf["per_device"]) for leaf in told["largest"]] == [("kernel", 512)]


# --- a model of 405 billion parameters ---------------------------------------------------------------------------


class Layer(nnx.Module):
    """One layer of a decoder like Llama's largest: grouped queries, a gated linear unit."""

    def __init__(
        self, rngs: nnx.Rngs, wide: int = 16384, inner: int = 53248, heads: int = 128, groups: int = 8
    ) -> None:
        each = wide // heads
        sizes = {"q": (wide, wide), "k": (wide, groups * each), "v": (wide, groups * each), "o": (wide, wide)}
        sizes |= {"gate": (wide, inner), "up": (wide, inner), "down": (inner, wide)}
        for name, (inside, outside) in sizes.items():
            setattr(self, name, nnx.Linear(inside, outside, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs))
        self.before = nnx.RMSNorm(wide, param_dtype=jnp.bfloat16, rngs=rngs)
        self.after = nnx.RMSNorm(wide, param_dtype=jnp.bfloat16, rngs=rngs)


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(128256, 16384, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.RMSNorm(16384, param_dtype=jnp.bfloat16, rngs=rngs)
        self.head = nnx.Linear(16384, 128256, use_bias=False, param_dtype=jnp.bfloat16, rngs=rngs)


def decoder(layers: int) -> nnx.Dict:
    """The whole, abstract; one layer is traced, the others are clones: tracing them all takes half a minute."""
    one = nnx.eval_shape(lambda: Layer(nnx.Rngs(0)))
    ends = nnx.eval_shape(lambda: Ends(nnx.Rngs(0)))
    return nnx.Dict(ends=ends, layers=nnx.List([nnx.clone(one) for _ in range(layers)]))


def test_a_decoder_of_405_billion_parameters_is_counted_without_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(path: Any, shape: Any) -> Any:
        return sw.Sharded("data", "model") if len(shape) == 2 else sw.Replicated()

    llama = decoder(126)
    traces = []
    eval_shape = jax.eval_shape
    before = set(map(id, jax.live_arrays()))
    monkeypatch.setattr(jax, "eval_shape", lambda *args, **kwargs: traces.append(1) or eval_shape(*args, **kwargs))
    plan = kinds_of(place).plan(llama, optimizers={"params": optax.adamw(1e-4)})
    counted = sw.memory(plan, {"data": 128, "model": 128})
    # The optimizer's init alone, and not one for each leaf.
    assert len(traces) <= 2
    assert all(array.nbytes < 1024 for array in jax.live_arrays() if id(array) not in before)
    norms = (2 * 126 + 1) * 16384 * 2
    params = counted["params"]
    assert params.nbytes == 2 * 405_853_388_800
    assert params.per_device == (params.nbytes - norms) // 128**2 + norms
    assert counted.gradients == params.per_device
    assert counted["optimizer"].per_device == 2 * params.per_device + 4


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [{}, {"data": 0}, {"data": True}, {"data": 2.0}, {1: 2}])
def test_axes_that_are_none(mesh: Any) -> None:
    with refused(
        sw.PlacementError,
        f"{mesh!r} is not a mesh: the name of each axis, and its number of devices.",
        hint="{'data': 16, 'model': 8}",
    ):
        sw.memory(sw.plan(linear()), mesh)


def test_a_mesh_in_words_is_none() -> None:
    with refused(sw.PlacementError, "A str is not a mesh.", hint="mesh = jax.make_mesh((8,), ('data',))"):
        sw.memory(sw.plan(linear()), "data=8")


def test_a_model_is_no_plan() -> None:
    with refused(sw.DeclarationError, "Memory is counted for a plan.", hint="sw.memory(sw.plan(model), {'data': 8})"):
        sw.memory(linear(), {"data": 8})


def test_a_kind_that_is_not_there() -> None:
    counted = sw.memory(sw.Kinds(params=sw.Kind(nnx.Param)).plan(linear()), {"data": 8})
    with refused(sw.DeclarationError, "There is no kind 'cache'.", kind="cache", hint="one of: params"):
        counted["cache"]


def test_what_does_not_fit_the_mesh_is_listed() -> None:
    with refused(
        sw.PlacementError,
        "1 leaf cannot be placed on the mesh (data=7).",
        leaves=["kernel: Param(16, 64) float32  kind=params  (axis 0 of 16 does not divide by (data=7))"],
        kind="params",
        hint="place by shape: placement=lambda path, shape: sw.Sharded('data') "
        "if len(shape) > 0 and shape[0] % 7 == 0 else sw.Replicated()",
    ):
        sw.memory(kinds_of(sw.Sharded("data")).plan(linear(use_bias=False)), {"data": 7})
