"""NNX objects among a step's arguments: what only is read may pass, what is written is refused.

What is written into a reference is not lost, so these objects are made of plain Variables, and of references below.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import data
from refusals import refused

X = jnp.ones((4, 3))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        return self.dropout(self.norm(self.linear(x)), rngs=rngs)


def linear() -> nnx.Linear:
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def name_of(thing: Any) -> str:
    """A hijax Variable's own class is another one."""
    return (thing.var_type if isinstance(thing, nnx.Variable) else type(thing)).__name__


def state_of(*objects: Any) -> sw.State:
    return sw.plan(*objects).take(*objects)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    x: Any
    rngs: Any


def use_rngs(thing: Any) -> None:
    thing.noise()


def use_metric(thing: Any) -> None:
    thing.update(values=jnp.ones(2))


def use_variable(thing: Any) -> None:
    thing[...] = thing[...] + 1


def use_module(thing: Any) -> None:
    thing(X)


def use_optimizer(thing: Any) -> None:
    thing.step[...] += 1


def use_state(thing: Any) -> None:
    thing["kernel"][...] = thing["kernel"][...] * 2


def use_raw_array(thing: Any) -> None:
    thing.kernel = thing.kernel * 2


def replace_variable(thing: Any) -> None:
    thing.kernel = nnx.Param(thing.kernel[...] * 2)


def make_variable(thing: Any) -> None:
    thing.more = nnx.Param(jnp.ones(2))


def remove_variable(thing: Any) -> None:
    del thing.bias


def reshape_variable(thing: Any) -> None:
    thing.kernel.set_raw_value(thing.kernel[...].astype(jnp.float16))


class Raw(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.data(jnp.ones(2))


KINDS: dict[str, tuple[Any, Any, str]] = {
    "rngs": (lambda: nnx.Rngs(noise=0), use_rngs, "noise/count: RngCount() uint32  (written)"),
    "metric": (nnx.metrics.Average, use_metric, "count: MetricState() int32  (written)"),
    "variable": (lambda: nnx.Variable(jnp.zeros(2)), use_variable, ": Variable(2,) float32  (written)"),
    "module": (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), use_module, "mean: BatchStat(3,) float32  (written)"),
    "optimizer": (
        lambda: nnx.Optimizer(linear(), optax.sgd(0.1), wrt=nnx.Param),
        use_optimizer,
        "step: OptState() uint32  (written)",
    ),
    "state": (lambda: nnx.State(nnx.state(linear())), use_state, "kernel: Param(3, 2) float32  (written)"),
    "raw array": (Raw, use_raw_array, "kernel: Array(2,) float32  (written)"),
    "replaced": (linear, replace_variable, "kernel: Param(3, 2) float32  (written)"),
    "made": (linear, make_variable, "more: Param(2,) float32  (made)"),
    "removed": (linear, remove_variable, "bias: Param(2,) float32  (removed)"),
    "another dtype": (
        linear,
        reshape_variable,
        "kernel: Param(3, 2) float32  (becomes a value of another shape, dtype or structure)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deep", ["itself", "dict", "list", "dataclass", "keyword"])
@pytest.mark.parametrize("trains", [False, True], ids=["step", "train_step"])
def test_an_argument_that_is_written_is_refused_at_any_depth(kind: str, deep: str, trains: bool) -> None:
    make, use, leaf = KINDS[kind]
    with nnx.var_defaults(ref=False):
        thing = make()
    get = {"dict": lambda a: a["in"], "list": lambda a: a[1], "dataclass": lambda a: a.rngs}.get(deep, lambda a: a)
    given = {"dict": {"in": thing}, "list": [1.0, thing], "dataclass": Batch(X, thing)}.get(deep, thing)

    def f(model: Any, x: Any, extra: Any) -> Any:
        use(get(extra))
        return model(x).mean()

    model = linear()
    if trains:
        step, state = sw.train_step(f), sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    else:
        step, state = sw.step(f), state_of(model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(thing))) if isinstance(thing, nnx.Module) else None
    with pytest.raises(sw.StructureError) as caught:
        _ = step(state, X, extra=given) if deep == "keyword" else step(state, X, given)
    expression = "extra" + {"dict": "['in']", "list": "[1]", "dataclass": ".rngs"}.get(deep, "")
    assert caught.value.message == (
        f"f writes to its argument `{expression}` ({name_of(thing)}), and the write would be lost: the function "
        "receives a copy."
    )
    slash = "" if leaf.startswith(":") else "/"
    assert f"{expression}{slash}{leaf}" in map(str, caught.value.leaves)
    assert f"kinds.plan(model, {expression}" in str(caught.value.hint)
    if before is not None:  # it is as it was
        jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(thing)))


def test_all_written_arguments_are_named_at_once() -> None:
    def f(model: Any, x: Any, rngs: Any, metric: Any) -> Any:
        metric.update(values=x)
        return model(x) + rngs.noise.uniform((4, 2))

    with refused(
        sw.StructureError,
        "f writes to its arguments `rngs` (Rngs), `metric` (Average), and the write would be lost: the function "
        "receives a copy.",
        leaves=[
            "rngs/noise/count: RngCount() uint32  (written)",
            "metric/count: MetricState() int32  (written)",
            "metric/total: MetricState() float32  (written)",
        ],
        hint="plan = kinds.plan(model, rngs, metric)\nstate = plan.take(model, rngs, metric)\n"
        "def f(model, rngs, metric, x): ...",
    ):
        with nnx.var_defaults(ref=False):
            rngs, metric = nnx.Rngs(noise=0), nnx.metrics.Average()
        sw.step(f)(state_of(linear()), X, rngs, metric)


def test_a_static_argument_is_no_way_around() -> None:
    step = sw.step(lambda model, x, rngs: rngs.noise.uniform((2,)), static_argnames="rngs")
    with pytest.raises(sw.StructureError, match="writes to `rngs`, a static argument"), nnx.var_defaults(ref=False):
        step(state_of(linear()), X, nnx.Rngs(noise=0))
    # A reference would be one of the constants of the step, and `plan.put` may replace it.
    with nnx.var_defaults(ref=True, hijax=False):
        rngs = nnx.Rngs(noise=0)
    with pytest.raises(sw.StructureError, match=r"(reads Variables of|writes to) `rngs`, a static"):
        step(state_of(linear()), X, rngs)
    step = sw.step(lambda model, x, other: other(x), static_argnames="other")
    for hijax in (False, True):
        with nnx.var_defaults(hijax=hijax, ref=False):
            other = linear()
        with refused(
            sw.StructureError,
            "<lambda> reads Variables of `other`, a static argument: they would be constants of the compiled step.",
            leaves=["other/bias: Param(2,) float32", "other/kernel: Param(3, 2) float32"],
            hint="take 'other' out of static_argnames: Variables that are only read may be passed",
        ):
            step(state_of(linear()), X, other)


@pytest.mark.parametrize("kind", ["rngs", "metric", "variable", "module", "optimizer", "state"])
@pytest.mark.parametrize("trains", [False, True], ids=["step", "train_step"])
def test_what_is_written_into_a_reference_is_not_lost(kind: str, trains: bool) -> None:
    """As under `nnx.jit`: the reference itself is passed, and is written at each call."""
    make, use, _ = KINDS[kind]
    with nnx.var_defaults(ref=True, hijax=False):
        thing, judge = make(), make()

    def f(model: Any, x: Any, extra: Any) -> Any:
        use(extra[0])
        return model(x).mean()

    model = linear()
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)}) if trains else sw.plan(model)
    state, step, out = plan.take(model), sw.train_step(f) if trains else sw.step(f), []
    for _ in range(3):
        result = step(state, X, [thing])
        state, loss = result if trains else (state, result)
        out.append(float(loss))
        use(judge)
        jax.tree.map(np.testing.assert_allclose, contents(thing), contents(judge))
    assert len(set(out)) == (3 if trains else 1)


def contents(thing: Any) -> dict[str, np.ndarray]:
    """What flax reads of each Variable."""
    leaves = jax.tree_util.tree_flatten_with_path(thing, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    return {jax.tree_util.keystr(keys): data(leaf.get_value()) for keys, leaf in leaves}


def test_what_is_read_is_fresh_at_every_call_as_under_nnx_jit() -> None:
    def f(model: Any, x: Any, other: Any, count: Any) -> Any:
        return model(x) + other["net"](x) * count[...]

    model, other, count = linear(), {"net": linear()}, nnx.Variable(jnp.ones(()))
    step, jitted, state = sw.step(f), nnx.jit(f), state_of(model)
    for factor in (1.0, 2.0, 3.0):
        other["net"].kernel[...] = other["net"].kernel[...] * factor
        count[...] = count[...] + factor
        np.testing.assert_array_equal(step(state, X, other, count), jitted(model, X, other, count))


def test_reading_under_nnx_jit_and_remat_is_no_write() -> None:
    def f(model: Any, x: Any, other: Any) -> Any:
        other.kernel[...] = other.kernel[...]  # the same value is no write
        return nnx.jit(lambda m, x: m(x))(other, x) + nnx.remat(lambda m, x: m(x))(other, x)

    other = linear()
    np.testing.assert_allclose(sw.step(f)(state_of(linear()), X, other), 2 * other(X), rtol=1e-6)


def test_a_copy_in_the_function_may_be_written_and_what_is_returned_is_not_lost() -> None:
    def cloned(model: Any, x: Any, rngs: Any) -> Any:
        return model(x) + nnx.clone(rngs).noise.uniform((4, 2))

    def handed_on(model: Any, x: Any, rngs: Any) -> Any:
        return model(x) + rngs.noise.uniform((4, 2)), rngs

    with nnx.var_defaults(ref=False):
        rngs = nnx.Rngs(noise=0)
    state = state_of(linear())
    first = sw.step(cloned)(state, X, rngs)
    out, rngs = sw.step(handed_on)(state, X, rngs)
    np.testing.assert_array_equal(out, first)
    assert int(rngs.noise.count[...]) == 1


def test_a_dict_of_arrays_may_be_changed_in_the_function() -> None:
    def f(model: Any, batch: Any) -> Any:
        batch["x"] = batch["x"] * 2
        return model(batch.pop("x"))

    assert sw.step(f)(state_of(linear()), {"x": X}).shape == (4, 2)


def test_an_object_that_is_no_pytree_is_refused_in_words() -> None:
    class Opaque(nnx.Module, pytree=False):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

    with refused(
        sw.StructureError,
        "The argument extra of f holds a Opaque, which is not a pytree: JAX cannot pass it.",
        hint="plan = kinds.plan(model, extra)  # as an additional object",
    ):

        def f(model: Any, extra: Any) -> Any:
            return extra.w[...]

        sw.step(f)(state_of(linear()), Opaque())


# --- flax's own train step -------------------------------------------------------------------------------------------


def flax_train_step(model: Any, optimizer: Any, metrics: Any, batch: Any, rngs: Any) -> Any:
    def loss_fn(model: Any, rngs: Any, batch: Any) -> Any:
        out = model(batch["x"], rngs)
        return ((out - batch["y"]) ** 2).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model, rngs, batch)
    metrics.update(loss=loss)
    optimizer.update(model, grads)
    return loss


def parts() -> tuple[Any, Any, Any, Any]:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    return model, optimizer, nnx.MultiMetric(loss=nnx.metrics.Average("loss")), nnx.Rngs(dropout=1)


def test_flax_s_train_step_is_refused_with_the_hint_that_makes_it_equal_nnx_jit() -> None:
    batch = {"x": jnp.arange(12.0).reshape(4, 3), "y": jnp.ones((4, 2))}
    with nnx.var_defaults(ref=False):
        model, optimizer, metrics, rngs = parts()
    everything = ("params", "stats", "rng", "metrics", "optimizer", "variables")
    plan = sw.plan(model)
    step = sw.step(flax_train_step, writes=("params", "stats"))
    with pytest.raises(sw.StructureError) as caught:
        step(plan.take(model), optimizer, metrics, batch, rngs)
    assert caught.value.message.startswith(
        "flax_train_step writes to its arguments `optimizer` (Optimizer), `metrics` (MultiMetric), `rngs` (Rngs)"
    )
    assert caught.value.hint == (
        "plan = kinds.plan(model, optimizer, metrics, rngs)\nstate = plan.take(model, optimizer, metrics, rngs)\n"
        "def flax_train_step(model, optimizer, metrics, rngs, batch): ..."
    )

    kinds = sw.Kinds.standard()
    plan = kinds.plan(model, optimizer, metrics, rngs)
    state = plan.take(model, optimizer, metrics, rngs)

    def hinted(model: Any, optimizer: Any, metrics: Any, rngs: Any, batch: Any) -> Any:
        return flax_train_step(model, optimizer, metrics, batch, rngs)

    ours = sw.step(hinted, writes=[kind for kind in everything if kind in plan.kinds and plan[kind]])
    theirs = nnx.jit(flax_train_step)
    for _ in range(4):
        state, loss = ours(state, batch)
        expected = theirs(model, optimizer, metrics, batch, rngs)
        np.testing.assert_array_equal(loss, expected)
    built = plan.build(state)
    for mine, other in zip(built, (model, optimizer, metrics, rngs), strict=True):
        leaves = zip(jax.tree.leaves(nnx.state(mine)), jax.tree.leaves(nnx.state(other)), strict=True)
        for one, two in leaves:
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, two = jax.random.key_data(one), jax.random.key_data(two)
            np.testing.assert_array_equal(one, two)


# --- beside steps ----------------------------------------------------------------------------------------------------


def test_value_and_grad_writes_its_arguments_as_it_says() -> None:
    metric = nnx.metrics.Average()

    def loss(model: Any, x: Any, inside: Any) -> Any:
        inside["metric"].update(values=x)
        return model(x).mean()

    sw.value_and_grad(loss)(linear(), X, {"metric": metric})
    assert float(metric.compute()) == 1.0


def test_scan_layers_refuses_an_object_that_a_layer_writes_and_drops() -> None:
    layers = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    with nnx.var_defaults(ref=False):
        carried, left = nnx.Rngs(noise=0), nnx.Rngs(noise=0)

    def run(layer: Any, x: Any) -> Any:
        h, rngs = x
        return layer(h) + rngs.noise.uniform((4, 3)), rngs

    def dropped(layer: Any, x: Any) -> Any:
        h, rngs = x
        return layer(h) + rngs.noise.uniform((4, 3)), nnx.Rngs(noise=0)

    out, rngs = sw.scan_layers(run, layers, (X, carried))
    assert out.shape == X.shape
    assert int(rngs.noise.count[...]) == 2  # handed on from layer to layer
    with pytest.raises(sw.StructureError, match=r"writes to its argument `x\[1\]` \(Rngs\)"):
        sw.scan_layers(dropped, layers, (X, left))
