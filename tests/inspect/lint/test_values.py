"""Rules that only values tell."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from linted import clean, codes, finds
from statewise.examples.multi_state import BatchStat, MultiState


class Statistic(nnx.Variable):
    pass


def zeros_in_multi_state() -> MultiState:
    model = MultiState(3, 5, nnx.Rngs(0))
    model.running_var = BatchStat(jnp.zeros(5))
    return model


def test_a_variance_of_zeros_is_named() -> None:
    finds(
        "statistic-starts-at-zero",
        "1 statistic of spread is all zeros.",
        ["running_var: BatchStat(5,) float32  kind=variables"],
        "self.running_var = BatchStat(jnp.ones(...))",
        zeros_in_multi_state(),
    )
    clean(MultiState(3, 5, nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["var", "running_var", "moving_variance", "obs_std", "VAR", "var_x", "var2"])
def test_a_spread_is_known_by_a_word_of_its_name(name: str) -> None:
    model = nnx.Dict({name: Statistic(jnp.zeros(2))})
    assert codes(model) == ["statistic-starts-at-zero"]


@pytest.mark.parametrize(
    "name", ["mean", "variable", "log_var", "invariant", "kernel", "logvar", "covariate", "var_count"]
)
def test_other_names_may_be_zeros(name: str) -> None:
    clean(nnx.Dict({name: Statistic(jnp.zeros(2))}))


@pytest.mark.parametrize(
    "variable",
    [
        nnx.Param(jnp.zeros(2)),
        nnx.Cache(jnp.zeros(2)),
        nnx.metrics.MetricState(jnp.zeros(2)),
        Statistic(jnp.array([0.0, 1.0])),
        Statistic(jnp.zeros(2, int)),
        Statistic(jnp.zeros((0,))),
        Statistic(None, ref=False),
    ],
    ids=["Param", "Cache", "MetricState", "not all", "integers", "empty", "None"],
)
def test_what_is_no_statistic_of_spread_may_be_zeros(variable: Any) -> None:
    clean(nnx.Dict(var=variable))


def test_a_large_statistic_is_judged_on_its_device() -> None:
    large = 1 << 17
    assert codes(nnx.Dict(var=Statistic(jnp.zeros(large)))) == ["statistic-starts-at-zero"]
    clean(nnx.Dict(var=Statistic(jnp.zeros(large).at[-1].set(1.0))))
    assert codes(nnx.Dict(w=nnx.Param(jnp.ones(large).at[7].set(jnp.nan)))) == ["not-finite"]


def test_a_sharded_statistic_is_read(devices: list[jax.Device]) -> None:
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    for size in (8, 1 << 17):
        model = nnx.Dict(var=Statistic(jax.device_put(jnp.zeros(size), sharding)))
        assert codes(model) == ["statistic-starts-at-zero"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_parameters_that_are_not_finite(value: float, dtype: str) -> None:
    finds(
        "not-finite",
        "1 leaf has NaN or infinite elements.",
        [f"w: Param(2,) {dtype}  kind=params"],
        "jax.config.update('jax_debug_nans', True)  # stops where the first NaN is made\n"
        "or go back: state, report = sw.restore(path, state)",
        nnx.Dict(w=nnx.Param(jnp.array([1.0, value]).astype(dtype)), b=nnx.Param(jnp.ones(2, dtype))),
    )


def test_values_of_several_arrays_are_read_too() -> None:
    assert codes(nnx.Dict(w=nnx.Param({"a": jnp.ones(2), "b": (jnp.array(jnp.nan),)}))) == ["not-finite"]
    clean(nnx.Dict(w=nnx.Param({"a": jnp.ones(2), "b": (jnp.array(1.0),)})))


def test_a_mask_may_be_infinite() -> None:
    clean(nnx.Dict(mask=nnx.Variable(jnp.array([0.0, -jnp.inf])), cache=nnx.Cache(jnp.array(-jnp.inf))))


class Twice(nnx.Module):
    def __init__(self, first: nnx.Rngs, second: nnx.Rngs) -> None:
        self.a = nnx.Dropout(0.5, rngs=first)
        self.b = nnx.Dropout(0.5, rngs=second)


def test_streams_at_one_key_and_count() -> None:
    finds(
        "duplicate-rng-keys",
        "1 stream is at the key and the count of another.",
        ["b/rngs/key: RngKey() key<fry>  kind=rng  (as a/rngs/key)"],
        "one nnx.Rngs(seed) for the whole model: layers fork their own streams from it\n"
        "or another seed for each: nnx.Rngs(params=0, dropout=1)",
        Twice(nnx.Rngs(0), nnx.Rngs(0)),
    )
    clean(Twice(nnx.Rngs(0), nnx.Rngs(1)))
    rngs = nnx.Rngs(0)
    clean(Twice(rngs, rngs))


def test_streams_of_one_key_at_different_counts_are_let_be() -> None:
    model = Twice(nnx.Rngs(0), nnx.Rngs(0))
    model.a(jnp.ones(2))
    clean(model)


def attention(length: int, read: int = 0) -> nnx.MultiHeadAttention:
    model = nnx.MultiHeadAttention(num_heads=1, in_features=2, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((1, length, 2))
    for _ in range(read):
        model(jnp.ones((1, 1, 2)))
    return model


def test_a_full_cache() -> None:
    finds(
        "cache-is-full",
        "1 cache has no room for another token.",
        ["cached_key: Cache(1, 2, 1, 2) float32  kind=cache  (2 of 2 are written)"],
        "state = state.restart('cache')  # or model.init_cache((batch, length, features)), longer",
        attention(2, read=2),
    )
    clean(attention(2, read=1))


def test_a_cache_that_is_too_small_for_what_is_to_come() -> None:
    finds(
        "cache-too-small",
        "1 cache has no room for 3 tokens.",
        ["cached_key: Cache(1, 4, 1, 2) float32  kind=cache  (room for 2)"],
        "model.init_cache((batch, 5, features))",
        attention(4, read=2),
        decode_length=3,
    )
    clean(attention(4, read=2), decode_length=2)
    clean(attention(4, read=2))


def test_the_length_of_an_abstract_cache_is_known() -> None:
    abstract = nnx.eval_shape(lambda: attention(4))
    assert codes(abstract, decode_length=5) == ["cache-too-small"]
    clean(abstract, decode_length=4)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", "2,048"), ("bfloat16", "256")])
def test_a_counter_in_half_precision(dtype: str, limit: str) -> None:
    stop = jnp.array(int(limit.replace(",", "")), dtype)
    assert stop + 1 == stop
    finds(
        "counter-stops",
        "1 counter of floating-point numbers stops counting.",
        [f"step: Variable() {dtype}  kind=variables  (stops at {limit})"],
        "self.step = Variable(jnp.array(0, jnp.int32))",
        nnx.Dict(step=nnx.Variable(jnp.zeros((), dtype))),
    )


def test_a_counter_in_single_precision_when_it_has_stopped() -> None:
    stop = jnp.array(2.0**24)
    assert stop + 1 == stop
    assert codes(nnx.Dict(num_steps=nnx.Variable(stop))) == ["counter-stops"]
    clean(nnx.Dict(num_steps=nnx.Variable(stop - 2)))


def half(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.bfloat16)


def test_what_is_no_counter_may_be_in_half_precision() -> None:
    clean(nnx.Dict(scale=nnx.Variable(half()), steps=nnx.Variable(half(1)), step=nnx.Param(half())))
    clean(nnx.Dict(count=nnx.Variable(jnp.array(0)), stepsize=nnx.Variable(half())))
    clean(nnx.Dict(step_size=nnx.Variable(half()), steps_per_epoch=nnx.Variable(half())))


def test_what_cannot_be_read_is_passed_over() -> None:
    clean(nnx.eval_shape(zeros_in_multi_state))
    clean(sw.plan(zeros_in_multi_state()))
    said: list[list[str]] = []
    jax.jit(lambda array: said.append(codes(nnx.Dict(var=Statistic(array)))))(jnp.zeros(3))
    assert said == [[]]


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3fn", "bool", "uint32", "int8"])
def test_values_of_every_dtype_are_read(dtype: str) -> None:
    clean(nnx.Dict(mask=nnx.Variable(jnp.ones(3, dtype)), odd=nnx.Variable(3), text=nnx.Variable(None)))
