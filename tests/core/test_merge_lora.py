"""Adapters folded into their kernels: the plain model's plan, and the same outputs."""

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

NORMAL = nnx.initializers.normal(1.0)


def linear(lora: bool, features: tuple[int, int], rngs: nnx.Rngs, **options: Any) -> nnx.Module:
    """An `nnx.Linear`, as it is or with the adapter that Flax has for it."""
    if lora:
        return nnx.LoRALinear(*features, lora_rank=2, b_initializer=NORMAL, rngs=rngs, **options)
    return nnx.Linear(*features, rngs=rngs, **options)


def around(lora: bool, features: tuple[int, int], rngs: nnx.Rngs, base: nnx.Module | None = None) -> nnx.Module:
    """A layer, as it is or with an `nnx.LoRA` around it."""
    base = nnx.Linear(*features, use_bias=False, rngs=rngs) if base is None else base
    return nnx.LoRA(features[0], 2, features[1], base_module=base, b_initializer=NORMAL, rngs=rngs) if lora else base


class Net(nnx.Module):
    """Adapters of each form, in each container; one layer is shared, one has two adapters."""

    def __init__(self, lora: bool, rngs: nnx.Rngs) -> None:
        self.first = linear(lora, (8, 8), rngs)
        self.second = around(lora, (8, 8), rngs)
        self.blocks = nnx.List([linear(lora, (8, 8), rngs, use_bias=False) for _ in range(2)])
        self.others = nnx.data((linear(lora, (8, 8), rngs), {"deep": around(lora, (8, 8), rngs)}))
        self.twice = around(lora, (8, 8), rngs, linear(lora, (8, 8), rngs))
        self.flat = around(lora, (8, 8), rngs, nnx.LinearGeneral(8, 8, rngs=rngs))
        self.shared = self.first
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        layers: tuple[Any, ...] = (self.first, self.second, *self.blocks, self.others[0], self.others[1]["deep"])
        for layer in (*layers, self.twice, self.flat, self.shared):
            x = self.norm(jnp.tanh(layer(x)))
        return x


X = jax.random.normal(jax.random.key(0), (5, 8))


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    return bool(jnp.abs(found - expected).max() <= tolerance * jnp.abs(expected).max())


def product(kernel: Any, a: Any, b: Any) -> np.ndarray:
    """The merged kernel, by NumPy in float64."""
    wide = [np.asarray(array).astype(np.float64) for array in (kernel, a, b)]
    return wide[0] + wide[1] @ wide[2]


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(True, nnx.Rngs(0))


def test_the_plan_is_that_of_the_plain_model(net: Net) -> None:
    state = sw.plan(net, optimizers={"lora": optax.adam(1e-3)}, averages={"lora": sw.EMA(0.9)}).take(net)
    merged = sw.merge_lora(state)
    assert merged.plan is sw.plan(Net(False, nnx.Rngs(1)))
    assert sw.count(merged.plan.build(merged), nnx.LoRAParam) == 0


def test_averaged_adapters(net: Net) -> None:
    plan = sw.plan(net, averages={"lora": sw.EMA(0.9)})
    state = plan.take(net)
    state = state.replace(lora=jax.tree.map(jnp.zeros_like, state["lora"]))
    averaged = sw.merge_lora(state.with_averages("ema"))
    assert close(averaged.plan.build(averaged)(X), net(X))
    assert not close(sw.merge_lora(state).plan.build(sw.merge_lora(state))(X), net(X), 1e-2)


def test_the_outputs_are_those_of_the_model_with_adapters(net: Net) -> None:
    state = sw.plan(net).take(net)
    before = jax.tree.map(jnp.copy, state)
    merged = sw.merge_lora(state)
    plain = merged.plan.build(merged)
    assert type(plain.first) is nnx.Linear
    assert plain.shared is plain.first
    assert close(plain(X), net(X))
    assert not close(Net(False, nnx.Rngs(0))(X), net(X), 1e-2)  # the adapters mattered
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(before)))


def test_each_kernel_is_the_sum_to_rounding(net: Net) -> None:
    params = sw.merge_lora(sw.plan(net).take(net))["params"]
    expected = product(net.first.kernel, net.first.lora.lora_a, net.first.lora.lora_b)  # type: ignore[attr-defined]
    np.testing.assert_allclose(params["first"]["kernel"][...], expected, rtol=1e-6, atol=1e-6)
    inner: Any = net.twice.base_module  # type: ignore[attr-defined]
    expected = product(inner.kernel, inner.lora.lora_a, inner.lora.lora_b)
    expected = product(expected, net.twice.lora_a, net.twice.lora_b)  # type: ignore[attr-defined]
    np.testing.assert_allclose(params["twice"]["kernel"][...], expected, rtol=1e-6, atol=1e-6)


def test_what_has_no_adapter_is_shared(net: Net) -> None:
    state = sw.plan(net).take(net)
    merged = sw.merge_lora(state)
    assert merged["stats"]["norm"]["mean"][...] is state["stats"]["norm"]["mean"][...]
    assert merged["params"]["first"]["bias"][...] is state["params"]["first"]["bias"][...]
    assert merged["params"]["first"]["kernel"][...] is not state["params"]["first"]["kernel"][...]


@pytest.mark.parametrize(
    ("base", "adapter"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]
)
def test_products_are_computed_in_float32(base: str, adapter: str) -> None:
    options: dict[str, Any] = {"param_dtype": base, "lora_param_dtype": adapter}
    model: Any = linear(True, (8, 8), nnx.Rngs(0), **options)
    merged = sw.merge_lora(sw.plan(model).take(model))
    kernel = merged["params"]["kernel"][...]
    assert kernel.dtype == base
    # At most one rounding, to the nearest: half of the last bit.
    expected = product(model.kernel, model.lora.lora_a, model.lora.lora_b)
    error = np.abs(np.asarray(kernel).astype(np.float64) - expected) / np.abs(expected)
    assert error.max() <= 1e-6 + (0 if base == "float32" else float(jnp.finfo(base).eps) / 2)
    assert merged.plan is sw.plan(nnx.Linear(8, 8, param_dtype=base, rngs=nnx.Rngs(0)))


class Scanned(nnx.Module):
    """Layers that are stacked, as a model has them that scans over its layers."""

    def __init__(self, lora: bool, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return linear(lora, (8, 8), rngs)

        self.layers = make(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers() -> None:
    model = Scanned(True, nnx.Rngs(0))
    merged = sw.merge_lora(sw.plan(model).take(model))
    assert merged["params"]["layers"]["kernel"].shape == (3, 8, 8)
    assert merged.plan is sw.plan(Scanned(False, nnx.Rngs(0)))
    assert close(merged.plan.build(merged)(X), model(X))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_kernels_keep_their_shardings(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    model: Any = linear(True, (8, 8), nnx.Rngs(0))
    kinds = sw.Kinds.standard().replace(
        params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), placement=sw.Sharded("model")),
        lora=sw.Kind(nnx.LoRAParam, placement=sw.Sharded("data")),
    )
    state = kinds.plan(model).take(model, mesh=mesh)
    merged = sw.merge_lora(state)
    own = state["params"]["kernel"][...]
    kernel = merged["params"]["kernel"][...]
    assert kernel.sharding == own.sharding
    assert not kernel.sharding.is_fully_replicated
    expected = product(model.kernel, model.lora.lora_a, model.lora.lora_b)
    np.testing.assert_allclose(kernel, expected, rtol=1e-6, atol=1e-6)
    abstract = sw.merge_lora(kinds.plan(model).abstract(mesh))
    assert abstract["params"]["kernel"].sharding == own.sharding


def test_an_abstract_state_gives_the_plan_alone(net: Net) -> None:
    merged = sw.merge_lora(sw.plan(net).abstract())
    assert merged.plan is sw.plan(Net(False, nnx.Rngs(0)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(merged))


def test_inside_jit(net: Net) -> None:
    state = sw.plan(net).take(net)
    merged, inside = sw.merge_lora(state), jax.jit(sw.merge_lora)(state)
    assert inside.plan is merged.plan
    assert all(map(close, jax.tree.leaves(inside["params"]), jax.tree.leaves(merged["params"])))


def test_a_packed_state_stays_packed(net: Net) -> None:
    state = sw.plan(net).take(net, pack=True)
    merged = sw.merge_lora(state)
    plain = Net(False, nnx.Rngs(0))
    assert merged.plan is sw.plan(plain).take(plain, pack=True).plan
    assert close(sw.plan(plain).build(merged)(X), net(X))


def test_of_several_objects_optimizers_are_left_out(net: Net) -> None:
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.LoRAParam)
    metric = nnx.metrics.Average()
    state = sw.plan(net, optimizer, metric).take(net, optimizer, metric)
    merged = sw.merge_lora(state)
    assert merged.plan is sw.plan(Net(False, nnx.Rngs(0)), nnx.metrics.Average())
    state = sw.plan(model=net, optimizer=optimizer).take(model=net, optimizer=optimizer)
    assert sw.merge_lora(state).plan is sw.plan(model=Net(False, nnx.Rngs(0)))
    both = nnx.ModelAndOptimizer(net, optax.adam(1e-3), wrt=nnx.LoRAParam)
    assert sw.merge_lora(sw.plan(both).take(both)).plan is sw.plan(Net(False, nnx.Rngs(0)))


def test_raw_arrays_and_objects_that_hold_themselves() -> None:
    class Table(nnx.Module):
        def __init__(self, lora: bool) -> None:
            self.layer = linear(lora, (8, 8), nnx.Rngs(0))
            self.table = nnx.data((jnp.arange(3.0), [np.ones(2, np.float32)], jax.random.key(0)))
            self.parent = self

    state = sw.plan(Table(True)).take(Table(True))
    merged = sw.merge_lora(state)
    assert merged.plan is sw.plan(Table(False))
    assert merged.plan.build(merged).table[0].tolist() == [0, 1, 2]


def test_kinds_of_paths_stay_declared() -> None:
    kinds = sw.Kinds(lora=sw.Kind(sw.Path("**/lora/*")), rest=sw.Kind(...))
    model: Any = nnx.List([linear(True, (8, 8), nnx.Rngs(0))])
    merged = sw.merge_lora(kinds.plan(model, optimizers={"lora": optax.adam(1e-3)}).take(model))
    optional = kinds.replace(lora=sw.Kind(sw.Path("**/lora/*"), optional=True))
    assert merged.plan is optional.plan(nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0))]))


def test_what_depends_on_the_parameters_is_stale(net: Net) -> None:
    @sw.step(writes="cache")
    def look(model: Net, x: Any) -> Any:
        model.seen[...] += 1
        return model(x)

    kinds = sw.Kinds.standard()
    kinds = kinds.replace(
        cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, depends_on=("params", "lora")),
    )
    state = kinds.plan(net).take(net)
    state, out = look(state, X)
    merged = sw.merge_lora(state)
    with pytest.raises(sw.StaleError):
        look(merged, X)
    state, _ = look(state, X)  # the source is not stale
    merged = sw.merge_lora(state)
    merged, after = look(merged.restart("cache"), X)
    assert close(after, out)
