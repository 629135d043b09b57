"""Programs without a fault of which lint once said something; and, beside each, the fault that it still finds."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from linted import clean, codes, finds


def rngs(seed: int = 0) -> nnx.Rngs:
    return nnx.Rngs(seed)


class Holds(nnx.Module):
    def __init__(self, **held: Any) -> None:
        for name, value in held.items():
            setattr(self, name, value)


# --- numbers of NumPy, and scalars that functions hold -----------------------------------------------------------


@pytest.mark.parametrize("number", [np.int64(4), np.int32(4), np.uint8(4), np.shape(np.ones(4))[0]])
def test_sizes_that_are_numbers_of_numpy(number: Any) -> None:
    clean(nnx.Linear(number, 6, rngs=rngs()))
    clean(nnx.Conv(number, 6, (3,), rngs=rngs()))
    clean(nnx.Embed(number, 6, rngs=rngs()))


@pytest.mark.parametrize("number", [np.float32(0.5), np.bool_(True), np.float64(1e-5), np.complex64(1j)])
def test_settings_that_are_numbers_of_numpy(number: Any) -> None:
    clean(Holds(setting=number, weight=nnx.Param(jnp.ones(2))))
    clean(sw.plan(Holds(setting=number, weight=nnx.Param(jnp.ones(2)))))


def test_an_array_made_under_tracing_is_still_found() -> None:
    abstract = nnx.eval_shape(lambda: Holds(table=jnp.ones(3), scale=jnp.float32(2), weight=nnx.Param(jnp.ones(2))))
    assert codes(abstract) == ["array-turned-static"]
    assert [leaf.path for leaf in sw.lint(abstract)[0].leaves] == [("scale",), ("table",)]


@dataclasses.dataclass
class Config:
    scale: Any


@pytest.mark.parametrize("scale", [jnp.float32(0.02), np.float32(0.02), np.array(0.02), jnp.array(2)])
def test_scalars_that_functions_and_settings_hold(scale: Any) -> None:
    held = (
        nnx.initializers.normal(scale),
        nnx.initializers.constant(scale),
        lambda x: x * scale,
        functools.partial(jnp.multiply, scale),
        Config(scale),
    )
    for one in held:
        clean(Holds(held=one, weight=nnx.Param(jnp.ones(2))))


def test_arrays_and_keys_that_functions_hold_are_still_found() -> None:
    table, key = jnp.ones(3), jax.random.key(0)
    for held in (lambda x: x * table, Config(table), lambda x: jax.random.normal(key, x.shape)):
        assert codes(Holds(held=held, weight=nnx.Param(jnp.ones(2)))) == ["hidden-array"]


# --- infinite bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [nnx.Param, nnx.BatchStat])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bounds_that_do_not_bind(of: Any, dtype: str) -> None:
    inf = np.array(np.inf, jnp.dtype(dtype))

    def cls(value: Any) -> Any:
        return of(jax.tree.map(jnp.array, value))

    clean(
        nnx.Dict(
            input_min=cls(-inf),
            input_max=cls(inf),
            clip=nnx.Dict(low=cls(jnp.full(3, -inf)), high=cls(jnp.array([6, jnp.inf, jnp.inf], dtype))),
            best_loss=cls(inf),
            span=cls(jnp.array([-jnp.inf, jnp.inf], dtype)),
            pair=cls({"a": -inf, "b": inf}),
            wide=cls(jnp.full(1 << 17, inf)),
        )
    )


@pytest.mark.parametrize(
    "value",
    [
        jnp.array([1.0, jnp.inf]),
        jnp.array([jnp.nan, jnp.inf]),
        jnp.array(jnp.nan),
        jnp.ones(1 << 17).at[3].set(jnp.inf),
    ],
)
def test_what_is_not_finite_is_still_found(value: Any) -> None:
    assert codes(nnx.Dict(kernel=nnx.Param(value))) == ["not-finite"]
    assert codes(nnx.Dict(kernel=nnx.Param({"a": jnp.full(2, jnp.inf), "b": value}))) == ["not-finite"]


def test_a_bound_that_is_not_a_number_is_still_found() -> None:
    assert codes(nnx.Dict(clip_max=nnx.Param(jnp.array([jnp.nan, 1.0])))) == ["not-finite"]


# --- streams -----------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, streams: nnx.Rngs) -> None:
        self.layer = nnx.Linear(2, 3, rngs=streams)
        self.drop = nnx.Dropout(0.5, rngs=streams)


@pytest.mark.parametrize("name", ["ema", "ema_params", "target", "target_net", "teacher", "average", "reference"])
def test_the_streams_of_a_copy(name: str) -> None:
    model = Net(rngs())
    clean(nnx.Dict(**{"model": model, name: copy.deepcopy(model)}))
    clean(model, copy.deepcopy(model))
    state = sw.plan(model, copy.deepcopy(model)).take(model, copy.deepcopy(model))
    clean(state)


def test_the_streams_of_an_average_of_nnx() -> None:
    model = Net(rngs())
    ema = nnx.EMA(model, 0.9)
    assert codes(model, ema) == ["ema-over-non-floats"]
    assert codes(nnx.Dict(model=model, ema=ema)) == ["ema-over-non-floats"]
    clean(model, nnx.EMA(model, 0.9, only=nnx.Param))


def test_streams_of_one_seed_are_still_found() -> None:
    assert codes(nnx.Dict(a=Net(rngs()), b=Net(rngs()))) == ["duplicate-rng-keys"]
    assert codes(Net(rngs()), nnx.Dict(drop=nnx.Dropout(0.5, rngs=rngs()))) == []
    assert codes(nnx.List([Net(rngs()), Net(rngs())])) == ["duplicate-rng-keys"]


class Shares(nnx.Module):
    def __init__(self, streams: nnx.Rngs) -> None:
        self.rngs = streams
        self.part = nnx.Dict(rngs=streams, layer=nnx.Linear(2, 3, rngs=streams))
        self.other = nnx.Dict(streams=streams)


def test_an_rngs_that_is_handed_on_is_no_weight() -> None:
    clean(Shares(rngs()))
    clean(Shares(rngs()), rngs(1))
    shared = rngs()
    clean(nnx.Dict(a=nnx.Dict(rngs=shared), b=nnx.Dict(rngs=shared)))


def test_weights_beside_a_shared_rngs_are_still_found() -> None:
    model = Shares(rngs())
    model.again = model.part.layer
    findings = sw.lint(model)
    assert [found.code for found in findings] == ["tied-weights"]
    assert {str(leaf.path[-1]) for leaf in findings[0].leaves} == {"bias", "kernel"}


# --- 64-bit numbers, and plans -----------------------------------------------------------------------------------


def test_each_wide_leaf_has_its_own_dtype() -> None:
    finds(
        "wide-numpy-value",
        "3 leaves of 64-bit NumPy numbers, which JAX takes as 32-bit ones.",
        [
            "a: Variable(3,) int32  kind=variables  (int64 in NumPy)",
            "b: Variable(2,) float32  kind=variables  (float64 in NumPy)",
            "c: Variable- -  kind=variables  (uint64 and complex128 in NumPy)",
        ],
        "nnx.Variable(jnp.asarray(value))  # the dtype that it will have anyway\n"
        "or, for 64 bits: jax.config.update('jax_enable_x64', True)  # before any array is made",
        nnx.Dict(
            a=nnx.Variable(np.zeros(3, np.int64)),
            b=nnx.Variable(np.zeros(2, np.float64)),
            c=nnx.Variable(
                {"u": np.zeros(1, np.float32), "x": np.zeros(2, np.uint64), "y": np.zeros(2, np.complex128)}
            ),
            d=nnx.Variable(np.zeros(3, np.float32)),
        ),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    one: Any
    other: Any


RAW = {
    "an attribute": lambda: jnp.ones(3),
    "NumPy's": lambda: np.ones(3, np.float32),
    "a tuple": lambda: nnx.data((jnp.ones(2), jnp.zeros(3))),
    "a list": lambda: nnx.data([jnp.ones(2)]),
    "a dict": lambda: nnx.data({"x": jnp.ones(2), "y": (jnp.ones(1),)}),
    "a dataclass": lambda: nnx.data(Pair(jnp.ones(2), jnp.zeros(2))),
    "an nnx.List": lambda: nnx.List([jnp.ones(2), nnx.Linear(2, 3, rngs=rngs())]),
    "a key": lambda: jax.random.key(0),
}


@pytest.mark.parametrize("make", RAW.values(), ids=RAW.keys())
@pytest.mark.parametrize("several", [False, True])
def test_a_plan_shows_the_raw_arrays_that_its_model_has(make: Any, several: bool) -> None:
    objects = [nnx.Dict(held=Holds(raw=make(), weight=nnx.Param(jnp.ones(2))))]
    if several:
        objects.append(nnx.Dict(stat=nnx.BatchStat(jnp.ones(2))))
    of_model = sw.lint(*objects)
    plan = sw.plan(*objects)
    assert [found.code for found in of_model] == ["raw-array"]
    for other in (sw.lint(plan), sw.lint(plan.take(*objects))):
        assert [found.to_dict() for found in other] == [found.to_dict() for found in of_model]


# --- more of what people build -----------------------------------------------------------------------------------


def optimized() -> tuple[Any, ...]:
    model = Net(rngs())
    rate = optax.warmup_cosine_decay_schedule(0.0, jnp.float32(1e-2), 3, 10)
    tx = optax.chain(optax.clip_by_global_norm(np.float32(1.0)), optax.inject_hyperparams(optax.adamw)(rate))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.MultiMetric(loss=nnx.metrics.Average("loss"))


class Bridge(nnx.Module):
    def __init__(self) -> None:
        from flax import linen

        self.linen = nnx.bridge.ToNNX(linen.Dense(3), rngs=rngs()).lazy_init(jnp.ones((1, 2)))
        self.norm = nnx.bridge.ToNNX(linen.BatchNorm(use_running_average=False), rngs=rngs(1)).lazy_init(
            jnp.ones((1, 2))
        )


class Quantized(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(2))
        self.observed_min, self.observed_max = nnx.BatchStat(jnp.array(jnp.inf)), nnx.BatchStat(jnp.array(-jnp.inf))
        self.bits, self.eps = np.int32(8), np.float32(1e-6)
        self.round = functools.partial(jnp.round, decimals=np.int64(2))


class Critics(nnx.Module):
    def __init__(self) -> None:
        self.online, self.target = Net(rngs()), Net(rngs())
        self.tau, self.shape = np.float64(0.005), tuple(np.array([2, 3]))


@pytest.mark.parametrize(
    "make",
    [
        optimized,
        lambda: (Bridge(),),
        lambda: (Quantized(),),
        lambda: (Critics(),),
        lambda: (nnx.Sequential(nnx.Linear(2, 3, rngs=rngs()), nnx.relu, nnx.Dropout(0.1, rngs=rngs(1))),),
        lambda: (nnx.LoRALinear(np.int64(4), 6, lora_rank=np.int64(2), rngs=rngs()),),
        lambda: (nnx.RNN(nnx.LSTMCell(np.int64(2), 3, rngs=rngs())),),
        lambda: (nnx.GroupNorm(np.int64(4), 2, rngs=rngs()), nnx.metrics.Accuracy()),
        lambda: (nnx.BatchNorm(np.int64(3), momentum=np.float32(0.9), epsilon=np.float64(1e-5), rngs=rngs()),),
        lambda: (nnx.MultiHeadAttention(np.int64(2), np.int64(4), rngs=rngs()),),
        lambda: (nnx.Linear(2, 3, kernel_init=nnx.initializers.normal(jnp.float32(0.02)), rngs=rngs()),),
        lambda: (nnx.SpectralNorm(nnx.Linear(2, 3, rngs=rngs()), rngs=rngs(1)),),
    ],
)
def test_models_without_a_fault(make: Any) -> None:
    objects = make()
    clean(*objects)
    plan = sw.plan(*objects)
    clean(plan)
    clean(plan.take(*objects))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda: nnx.Dict(layers=nnx.List([jnp.ones(2)])), "self.layers[0]"),
        (lambda: nnx.List([jnp.ones(2)]), "model[0]"),
        (lambda: nnx.Dict(table=nnx.data({("a", 1): jnp.ones(2)})), "self.table[('a', 1)]"),
        (lambda: nnx.Dict(inner=nnx.Dict(raw=jnp.ones(2))), "self.raw"),
    ],
)
def test_where_a_hint_assigns(make: Any, target: str) -> None:
    assert [found.hint for found in sw.lint(make())] == [
        f"{target} = nnx.Variable(...)  # or a subclass of it that says what it is"
    ]
