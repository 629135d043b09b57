"""Which leaves a step writes, found in small NNX models under every transform of NNX, in graph and in tree mode.

Three answers must be the same each time: the one written down here, what the step's trace says, and which leaves
have changed after NNX itself ran the function.  (What the contract says about it: test_contract.py.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.core.plan import tables_of
from statewise._src.step.step import definition_of

pytestmark = pytest.mark.usefixtures("plain_variables")  # NNX's own transforms are the judge
MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
GRAPH: dict[str, Any] = {}
TREE: dict[str, Any] = {"graph": False}


class Count(nnx.Variable):
    pass


class Block(nnx.Module):
    """Writes its counter, its statistics and its dropout's count; puts back as they were a table and a key."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = Count(jnp.array(0.0))
        self.table = Count(jnp.ones((2, 3)))
        self.key = Count(jax.random.key(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] = self.calls[...] + 1
        self.table[...] = self.table[...].T.T
        self.key[...] = jax.random.clone(self.key[...])
        return self.drop(self.norm(self.dense(x)))


WRITES = {"calls", "norm/mean", "norm/var", "drop/rngs/count"}


@nnx.vmap(in_axes=0, out_axes=0)
def _blocks(rngs: nnx.Rngs) -> Block:
    return Block(rngs)


def block() -> Block:
    return Block(nnx.Rngs(0))


def stacked() -> Block:
    return _blocks(nnx.Rngs(0).split(3))


def written(fn: Callable[..., Any], model: Any, *args: Any) -> set[str]:
    """The leaves that a step of this function writes, as its trace has it."""
    plan = sw.plan(model)
    step = sw.step(fn, writes=tuple(plan.kinds))
    traced, *_ = definition_of(step).trace_checked(plan.take(model), args, {})
    return {sw.format_path(tables_of(plan).by_kind[kind][position].leaf.path) for kind, position in traced.written}


def changed(fn: Callable[..., Any], model: Any, *args: Any) -> set[str]:
    """The leaves that have other values after NNX ran the function."""
    before = leaves_of(model)
    fn(model, *args)
    after = leaves_of(model)
    return {path for path in before if not all(map(np.array_equal, before[path], after[path]))}


def leaves_of(model: Any) -> dict[str, list[Any]]:
    state = nnx.to_flat_state(nnx.state(model))
    values = {sw.format_path(path): getattr(leaf, "get_raw_value", lambda leaf=leaf: leaf)() for path, leaf in state}
    return {path: [words(array) for array in jax.tree.leaves(value)] for path, value in values.items()}


def words(array: Any) -> np.ndarray:
    is_key = jax.dtypes.issubdtype(jnp.asarray(array).dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(array) if is_key else array)


def apply(module: Any, x: Any) -> Any:
    return module(x)


def idle(module: Any, x: Any) -> Any:
    return module.dense(x)


# --- one transform, and one in another -------------------------------------------------------------------------------


def looped(mode: dict[str, Any], turns: Callable[[Any], Any], body: Callable[..., Any] = apply) -> Callable[..., Any]:
    return lambda m, x: nnx.fori_loop(0, turns(x), lambda _, c: (c[0], body(*c)), (m, x), **mode)[1]


def turned(mode: dict[str, Any], body: Callable[..., Any] = apply) -> Callable[..., Any]:
    def body_of(c: Any) -> Any:
        return c[0] + 1, c[1], body(c[1], c[2])

    return lambda m, x: nnx.while_loop(lambda c: c[0] < 2, body_of, (0, m, x), **mode)[2]


def branched(mode: dict[str, Any], body: Callable[..., Any] = apply) -> Callable[..., Any]:
    return lambda m, x: nnx.cond(x.sum() < 9, body, lambda m, x: x, m, x, **mode)


def switched(mode: dict[str, Any], body: Callable[..., Any] = apply) -> Callable[..., Any]:
    return lambda m, x: nnx.switch((x.sum() < 9).astype(int), [idle, body, lambda m, x: x], m, x, **mode)


def layered(mode: dict[str, Any], body: Callable[..., Any] = apply, **options: Any) -> Callable[..., Any]:
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, **options, **mode)


def carried(mode: dict[str, Any], body: Callable[..., Any] = apply) -> Callable[..., Any]:
    scan = nnx.scan(lambda m, x: (m, body(m, x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **mode)
    return lambda m, x: scan(m, jnp.stack([x] * 2))[1]


def many(x: Any) -> Any:
    return (x.sum() < 9).astype(int) * 2


@pytest.mark.parametrize("mode", [GRAPH, TREE], ids=["graph", "tree"])
@pytest.mark.parametrize(
    "make",
    [
        lambda mode: apply,
        lambda mode: nnx.jit(apply, **mode),
        lambda mode: nnx.remat(apply, **mode),
        lambda mode: nnx.jit(nnx.remat(nnx.jit(apply, **mode), **mode), **mode),
        lambda mode: branched(mode),
        lambda mode: branched(mode, nnx.remat(switched(mode), **mode)),
        lambda mode: switched(mode, nnx.jit(branched(mode), **mode)),
        lambda mode: turned(mode),
        lambda mode: turned(mode, branched(mode, nnx.remat(apply, **mode))),
        lambda mode: looped(mode, lambda x: 2),
        lambda mode: looped(mode, many, nnx.jit(apply, **mode)),
        lambda mode: carried(mode),
        lambda mode: nnx.jit(carried(mode, nnx.remat(apply, **mode)), **mode),
    ],
    ids=lambda make: "",
)
def test_one_module(make: Callable[..., Any], mode: dict[str, Any]) -> None:
    fn = make(mode)
    assert written(fn, block(), X) == WRITES
    assert changed(fn, block(), X) == WRITES


@pytest.mark.parametrize("mode", [GRAPH, TREE], ids=["graph", "tree"])
@pytest.mark.parametrize(
    "make",
    [
        lambda mode: layered(mode),
        lambda mode: layered(mode, reverse=True, unroll=3),
        lambda mode: layered(mode, nnx.remat(apply, **mode)),
        lambda mode: nnx.jit(layered(mode, branched(mode)), **mode),
        lambda mode: nnx.remat(layered(mode, turned(mode)), **mode),
        lambda mode: nnx.vmap(apply, in_axes=(0, None), **mode),
        # Under vmap each block takes a branch of its own, and turns a number of times of its own.
        lambda mode: nnx.vmap(branched(mode, nnx.remat(apply, **mode)), in_axes=(0, None), **mode),
        lambda mode: nnx.vmap(looped(mode, many), in_axes=(0, None), **mode),
    ],
    ids=lambda make: "",
)
def test_stacked_modules(make: Callable[..., Any], mode: dict[str, Any]) -> None:
    fn = make(mode)
    assert written(fn, stacked(), X) == WRITES
    assert changed(fn, stacked(), X) == WRITES


@pytest.mark.parametrize("mode", [GRAPH, TREE], ids=["graph", "tree"])
@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat, branched, switched, turned, carried], ids=lambda w: w.__name__)
def test_no_false_write(wrap: Callable[..., Any], mode: dict[str, Any]) -> None:
    fn = wrap(idle, **mode) if wrap in (nnx.jit, nnx.remat) else wrap(mode, idle)
    assert written(fn, block(), X) == set()
    assert written(lambda m, x: layered(mode, idle)(m, x), stacked(), X) == set()


def test_tree_mode_set_for_all() -> None:
    with nnx.set_graph_mode(False):
        assert written(nnx.jit(branched({}, nnx.remat(apply))), block(), X) == WRITES
        assert written(layered({}, nnx.remat(apply)), stacked(), X) == WRITES
    with nnx.set_graph_mode(True):
        assert written(nnx.jit(branched({}, nnx.remat(apply))), block(), X) == WRITES


def test_one_axis_for_each_kind() -> None:
    axes = nnx.StateAxes({nnx.Param: None, ...: nnx.Carry})
    run = nnx.scan(apply, in_axes=(axes, 0), out_axes=0)
    assert written(lambda m, x: run(m, jnp.stack([x] * 2)), block(), X) == WRITES
    shared = nnx.StateAxes({nnx.RngState: 0, ...: None})
    mapped = nnx.split_rngs(splits=2)(nnx.vmap(lambda m, x: m.drop(idle(m, x)), in_axes=(shared, 0)))
    assert written(lambda m, x: mapped(m, jnp.stack([x] * 2)), block(), X) == {"drop/rngs/count"}


def test_along_another_axis() -> None:
    make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs), out_axes=1)

    def write(layer: nnx.Linear, x: jax.Array) -> jax.Array:
        layer.bias[...] = nnx.remat(lambda m, x: m(x))(layer, x)[0]
        return x

    for fn in (nnx.vmap(write, in_axes=(1, None), out_axes=0), nnx.scan(write, in_axes=(1, None), out_axes=0)):
        assert written(fn, make(nnx.Rngs(0).split(3)), X) == {"bias"}


# --- differentiated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [apply, nnx.remat(apply), carried({}, nnx.remat(apply))], ids=["", "remat", "scan"])
def test_through_gradients(fn: Callable[..., Any]) -> None:
    def run(m: Block, x: jax.Array) -> Any:
        loss, grads = nnx.value_and_grad(lambda m, x: fn(m, x).sum())(m, x)
        return loss, grads["dense"]["kernel"][...]

    assert written(run, block(), X) == WRITES
    assert written(lambda m, x: nnx.vjp(lambda x: m.dense(x), x, graph=False)[0], block(), X) == set()


@pytest.mark.parametrize("mode", [GRAPH, TREE], ids=["graph", "tree"])
def test_through_custom_derivatives(mode: dict[str, Any]) -> None:
    def run(m: Block, x: jax.Array) -> jax.Array:
        def product(m: Block, x: jax.Array) -> jax.Array:
            m.calls[...] += 1
            return m.dense(x)

        rule = nnx.custom_vjp(product, **mode)
        rule.defvjp(lambda m, x: (rule(m, x), x), lambda x, grads: (None, x))
        return rule(m, x)

    @jax.custom_vjp
    def scaled(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kernel, x @ kernel

    scaled.defvjp(lambda kernel, x: (scaled(kernel, x), (kernel, x)), lambda res, grads: (res[0], grads[1]))

    def by_jax(m: Block, x: jax.Array) -> jax.Array:
        m.dense.kernel[...], out = scaled(m.dense.kernel[...], x)
        return m.norm(out)

    assert written(run, block(), X) == {"calls"}
    assert written(nnx.jit(by_jax, **mode), block(), X) == {"norm/mean", "norm/var"}


# --- the modules and functions of NNX --------------------------------------------------------------------------------


def test_attention_with_a_cache() -> None:
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 8, 4))
    cache = {"cache_index", "cached_key", "cached_value"}
    assert written(apply, attention, X[:1, None]) == cache
    assert written(nnx.jit(nnx.remat(apply)), attention, X[:1, None]) == cache
    assert written(lambda m, x: m(x, decode=False), attention, X[:1, None]) == set()


def test_recurrent_layers() -> None:
    rnn = nnx.RNN(nnx.LSTMCell(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    carry = rnn.cell.initialize_carry((1, 4), nnx.Rngs(0))
    assert written(lambda m, x: m(x, initial_carry=carry), rnn, X[None]) == set()
    assert written(apply, rnn, X[None]) == changed(apply, rnn, X[None]) == {"rngs/count"}  # it draws the first carry


def test_model_optimizer_and_metrics() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    objects = nnx.List([model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param), nnx.metrics.Average("loss")])

    def train(objects: Any, x: jax.Array) -> jax.Array:
        model, optimizer, metrics = objects
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        metrics.update(loss=loss)
        return metrics.compute()

    moments = {f"1/opt_state/0/{moment}/{name}" for moment in ("mu", "nu") for name in ("bias", "kernel")}
    steps = {"1/opt_state/0/count", "1/step", "2/count", "2/total"}
    assert written(train, objects, X) == {"0/bias", "0/kernel"} | moments | steps
    assert written(lambda objects, x: objects[2].compute(), objects, X) == set()


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: nnx.checkify(apply)(m, x)[1],
        lambda m, x: nnx.jit_partial(apply, m, graph=False)(x),
        lambda m, x: nnx.cached_partial(nnx.jit(apply), m)(x),
        lambda m, x: nnx.merge(*nnx.split(m))(x),
    ],
    ids=["checkify", "jit_partial", "cached_partial", "split and merge"],
)
def test_other_functions_of_nnx(fn: Callable[..., Any]) -> None:
    assert written(fn, block(), X) == WRITES


def test_split_and_update_by_hand() -> None:
    def run(m: Block, x: jax.Array) -> jax.Array:
        graphdef, params, rest = nnx.split(m, nnx.Param, ...)

        @jax.jit
        def pure(params: Any, rest: Any) -> Any:
            model = nnx.merge(graphdef, params, rest)
            return model(x), nnx.state(model)

        out, after = pure(params, rest)
        nnx.update(m, after)
        return out

    assert written(run, block(), X) == WRITES


def test_modes_of_a_module() -> None:
    assert written(lambda m, x: (m.eval(), m(x))[1], block(), X) == {"calls"}
    assert written(lambda m, x: nnx.view(m, deterministic=True)(x), block(), X) == WRITES - {"drop/rngs/count"}


def test_random_streams() -> None:
    streams = nnx.Dict(rngs=nnx.Rngs(params=0, dropout=1))
    both = {"rngs/params/count", "rngs/dropout/count"}
    assert written(lambda m, x: m.rngs.dropout(), streams, X) == {"rngs/dropout/count"}
    assert written(lambda m, x: m.rngs.split(2), streams, X) == both
    assert written(lambda m, x: nnx.reseed(m, params=7), streams, X) == {"rngs/params/key", "rngs/params/count"}


def test_on_a_mesh() -> None:
    def run(body: Callable[..., Any]) -> set[str]:
        specs = (jax.P(), jax.P("d"))
        return written(nnx.shard_map(body, mesh=MESH, in_specs=specs, out_specs=jax.P("d")), block(), X)

    def count(m: Block, x: jax.Array) -> jax.Array:
        m.calls[...] += 1
        return m.dense(x)

    assert run(idle) == set()
    assert run(count) == {"calls"}


# --- leaves of every form --------------------------------------------------------------------------------------------


class Forms(nnx.Module):
    def __init__(self) -> None:
        self.raw = nnx.data(jnp.ones(3))
        self.idle = nnx.data(jnp.ones(3))
        self.several = nnx.Variable((jnp.ones(2), {"inner": jnp.zeros(2)}))
        self.number = nnx.Variable(3)
        self.numpy = nnx.Variable(np.ones(2, np.float32))
        self.nothing = nnx.Variable(None)
        self.empty = nnx.Variable(jnp.zeros((0, 3)))
        self.tied = self.also = nnx.Param(jnp.ones(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.raw = self.raw + 1
        first, rest = self.several.get_value()
        self.several.set_value((first, {"inner": rest["inner"] + 1}))
        self.number.set_value(self.number.get_value() + 1)
        self.numpy[...] = self.numpy[...] * 2
        self.nothing.set_value(None)
        self.also[...] = self.tied[...] * 2
        return x


@pytest.mark.parametrize("fn", [apply, nnx.jit(apply), nnx.jit(nnx.remat(apply))], ids=["", "jit", "jit remat"])
def test_leaves_of_every_form(fn: Callable[..., Any]) -> None:
    expected = {"raw", "several", "number", "numpy", "also"}
    assert written(fn, Forms(), X) == changed(apply, Forms(), X) == expected


def test_values_handed_from_leaf_to_leaf() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.a, self.b = Count(jnp.zeros(2)), Count(jnp.ones(2))

    def copy(m: Two, x: Any) -> None:
        m.a[...] = m.b[...]

    def swap(m: Two, x: Any) -> None:
        m.a[...], m.b[...] = m.b[...], m.a[...]

    def swap_twice(m: Two, x: Any) -> None:
        nnx.jit(swap)(m, x)
        swap(m, x)

    assert written(copy, Two(), X) == {"a"}
    assert written(nnx.jit(swap), Two(), X) == {"a", "b"}
    assert written(swap_twice, Two(), X) == set()
