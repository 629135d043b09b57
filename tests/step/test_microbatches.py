"""Microbatches: judged by the whole batch, by a loop with Optax and NNX alone, and by `optax.MultiSteps`."""

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
from statewise.errors import DeclarationError
from training_models import (
    BATCHES,
    OPTIMIZERS,
    PARTS,
    Attention,
    Mlp,
    X,
    Y,
    by_hand,
    close,
    loss_of,
    refused,
    token_loss,
    trained,
)


class Normed(Mlp):
    """With statistics, noise, and a plain counter."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.norm, self.noise = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.last(self.noise(self.norm(nnx.tanh(self.first(x)))))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_equal_the_whole_batch_and_a_loop_by_hand(name: str) -> None:
    model = Mlp(nnx.Rngs(0))
    whole, losses = trained(model, OPTIMIZERS[name], loss_of, BATCHES)
    parts, same = trained(model, OPTIMIZERS[name], loss_of, BATCHES, microbatches=PARTS)
    hand, of_hand = by_hand(model, OPTIMIZERS[name], loss_of, BATCHES)
    close((parts, same), (whole, losses))
    close((nnx.state(parts.plan.build(parts)), same), (hand, of_hand))


def test_a_transformer() -> None:
    model = Attention(nnx.Rngs(0))
    batches = [(jax.random.randint(jax.random.key(seed), (8, 7), 0, 11),) for seed in range(2)]
    parts, losses = trained(model, OPTIMIZERS["adamw"], token_loss, batches, microbatches=PARTS)
    close((parts, losses), trained(model, OPTIMIZERS["adamw"], token_loss, batches))
    hand, of_hand = by_hand(model, OPTIMIZERS["adamw"], token_loss, batches)
    close((nnx.state(parts.plan.build(parts)), losses), (hand, of_hand))


def test_statistics_counters_and_random_streams_are_carried_as_in_the_loop_by_hand() -> None:
    model = Normed(nnx.Rngs(0))
    parts, losses = trained(model, OPTIMIZERS["adamw"], loss_of, BATCHES, microbatches=PARTS)
    hand, of_hand = by_hand(model, OPTIMIZERS["adamw"], loss_of, BATCHES)
    close((nnx.state(parts.plan.build(parts)), losses), (hand, of_hand))
    assert int(parts["variables"]["calls"]) == PARTS * len(BATCHES)


def test_as_optax_multi_steps() -> None:
    """`MultiSteps` sees one part in each step, and updates after the last."""
    model = Mlp(nnx.Rngs(0))
    parts, _ = trained(model, optax.adamw(1e-2), loss_of, BATCHES, microbatches=PARTS)
    own = [(x[rows], y[rows]) for x, y in BATCHES for rows in np.split(np.arange(16), PARTS)]
    multi, _ = trained(model, optax.MultiSteps(optax.adamw(1e-2), PARTS), loss_of, own)
    close(parts["params"], multi["params"])


def test_aux_and_what_is_captured_get_an_axis_for_the_parts() -> None:
    class Sowing(Mlp):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "hidden", self.first(x))
            return super().__call__(x)

    def with_aux(model: Any, x: jax.Array, y: jax.Array) -> Any:
        out = model(x)
        return ((out - y) ** 2).mean(), {"out": out, "rows": jnp.array(x.shape[0])}

    model = Sowing(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    step = sw.train_step(has_aux=True, capture="intermediates", microbatches=PARTS)(with_aux)
    state, ((loss, aux), captured) = step(state, X, Y)
    plain = Mlp(nnx.Rngs(0))
    assert (loss.shape, aux["out"].shape, aux["rows"].tolist()) == ((), (PARTS, 4, 3), [4] * PARTS)
    np.testing.assert_allclose(aux["out"].reshape(16, 3), plain(X), rtol=1e-5, atol=1e-6)
    (hidden,) = jax.tree.leaves(captured)
    np.testing.assert_allclose(hidden.reshape(16, 8), plain.first(X), rtol=1e-5, atol=1e-6)


def test_averages_and_two_optimizers_run_once() -> None:
    model = nnx.Dict(body=Mlp(nnx.Rngs(0)), scale=nnx.LoRAParam(jnp.ones(3)))

    def fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((model.body(x) * model.scale[None] - y) ** 2).mean()

    def run(**options: Any) -> sw.State:
        optimizers = {"params": optax.adam(1e-2), "lora": optax.sgd(0.1)}
        plan = sw.Kinds.standard().plan(model, optimizers=optimizers, averages={"params": sw.EMA(0.9)})
        state, step = plan.take(model), sw.train_step(**options)(fn)
        for batch in BATCHES:
            state, _ = step(state, *batch)
        return state

    close(run(microbatches=PARTS), run())


def test_several_objects() -> None:
    model, metric = Mlp(nnx.Rngs(0)), nnx.metrics.Average()

    def fn(model: Any, metric: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        loss = loss_of(model, x, y)
        metric.update(values=loss)
        return loss

    plan = sw.plan(model, metric, optimizers={"params": optax.sgd(0.1)})
    state, loss = sw.train_step(microbatches=PARTS)(fn)(plan.take(model, metric), X, Y)
    plan.put(state, model, metric)
    np.testing.assert_allclose(metric.compute(), loss, rtol=1e-6)
    assert int(metric.count[...]) == PARTS


def test_packed_and_inside_a_scan() -> None:
    model, step = Mlp(nnx.Rngs(0)), sw.train_step(microbatches=PARTS)(loss_of)
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})
    xs, ys = (jnp.stack(arrays) for arrays in zip(*BATCHES, strict=True))
    plain, losses = trained(model, optax.adam(1e-2), loss_of, BATCHES)
    for state in (plan.take(model), plan.take(model, pack=True)):
        after, scanned = jax.lax.scan(lambda state, batch: step(state, *batch), state, (xs, ys))
        close((after["params"], scanned), (plain["params"], jnp.stack(losses)))


@pytest.mark.parametrize("kind", ["replicated", "sharded", "explicit"])
def test_on_eight_devices(kind: str) -> None:
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit if kind == "explicit" else AxisType.Auto,))
    placement = sw.Sharded("data") if kind == "sharded" else sw.Replicated()
    model = nnx.Dict(kernel=nnx.Param(jnp.linspace(-1.0, 1.0, 16).reshape(8, 2)))
    x, y = jax.random.normal(jax.random.key(3), (32, 8)), jax.random.normal(jax.random.key(4), (32, 2))

    def fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((x @ model.kernel[...] - y) ** 2).mean()

    plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=placement)).plan(model, optimizers={"params": optax.adam(1e-2)})
    one, loss = sw.train_step(lambda *args: fn(*args))(plan.take(model), x, y)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    step, batch = sw.train_step(microbatches=2)(fn), (jax.device_put(x, rows), jax.device_put(y, rows))
    state, same = step(plan.take(model, mesh=mesh), *batch)
    close((state["params"], same), (one["params"], loss))
    sharding = state["params"]["kernel"].sharding
    state, _ = step(state, *batch)
    assert state["params"]["kernel"].sharding == sharding


def test_the_rows_of_each_part_stay_on_all_devices() -> None:
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    model = nnx.Dict(kernel=nnx.Param(jnp.ones((8, 2))))
    plan, seen = sw.plan(model, optimizers={"params": optax.sgd(0.1)}), []

    @sw.train_step(microbatches=2)
    def fn(model: Any, x: jax.Array) -> jax.Array:
        jax.debug.inspect_array_sharding(x, callback=seen.append)
        return (x @ model.kernel[...]).mean()

    x = jax.device_put(jnp.ones((32, 8)), jax.NamedSharding(mesh, jax.P("data")))
    fn(plan.take(model, mesh=mesh), x)
    assert {sharding.shard_shape((16, 8)) for sharding in seen} == {(2, 8)}


# --- values for each device ------------------------------------------------------------------------------------------


def per_device(weighted: bool) -> tuple[Any, Any]:
    """Trains with a counter for each device, with microbatches, and without state per device on one device."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    model = nnx.Dict(kernel=nnx.Param(jnp.linspace(-1.0, 1.0, 6).reshape(6, 1)), count=nnx.BatchStat(jnp.zeros(())))

    def fn(model: Any, x: jax.Array, mask: jax.Array) -> Any:
        losses, model.count[...] = ((x @ model.kernel[...])[:, 0] - 1) ** 2, model.count[...] + x.shape[0]
        return ((losses * mask).sum() / mask.sum(), mask.sum()) if weighted else losses.mean()

    mask = (jnp.arange(16) % 3 > 0).astype(jnp.float32)
    results = []
    for placement, options in ((sw.PerDevice("data"), {"mesh": mesh}), (None, {})):
        kinds = sw.Kinds(params=sw.Kind(nnx.Param), stats=sw.Kind(nnx.BatchStat, placement=placement))
        plan = kinds.plan(model, optimizers={"params": optax.sgd(0.1)})
        step = sw.train_step(fn, microbatches=2, weighted=weighted) if weighted else sw.train_step(fn, microbatches=2)
        state, loss = step(plan.take(model, **options), X, mask)
        results.append((state["params"], loss))
        assert np.asarray(state["stats"]["count"]).sum() == 16
    return results[0], results[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_values_per_device(weighted: bool) -> None:
    close(*per_device(weighted))


# --- arguments -------------------------------------------------------------------------------------------------------


def test_scalars_and_whole_arguments_reach_every_part() -> None:
    shapes = []

    def fn(model: Any, batch: Any, scale: Any, *, table: jax.Array) -> jax.Array:
        shapes.append((batch["x"].shape, jnp.shape(scale), table.shape))
        return ((model(batch["x"]) * table[None, :3] - batch["y"]) ** 2).mean() * scale

    model, table = Mlp(nnx.Rngs(0)), jnp.arange(5.0)
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)})
    batch = {"x": X, "y": np.asarray(Y)}
    parts = sw.train_step(fn, microbatches=PARTS, whole_argnames="table")(plan.take(model), batch, 2.0, table=table)
    close(parts, sw.train_step(fn)(plan.take(model), batch, 2.0, table=table))
    assert shapes == [((4, 6), (), (5,)), ((16, 6), (), (5,))]  # and each is traced once


def test_one_trace_and_one_compilation_for_each_signature() -> None:
    traces = []

    @sw.train_step(microbatches=PARTS)
    def fn(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return loss_of(model, x, y)

    model = Mlp(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    for x, y in BATCHES:
        state, _ = fn(state, x, y)
    state, _ = fn(state, X[:8], Y[:8])
    assert traces == [(4, 6), (2, 6)]


def test_without_compilation() -> None:
    model = Mlp(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    step = sw.train_step(loss_of, microbatches=PARTS)
    with jax.disable_jit():
        eager = step(state, X, Y)
    close(eager, step(state, X, Y))


def test_the_backward_pass_of_twelve_layers_needs_memory_for_one_part() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.attend = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attend(x)
            return x + self.down(nnx.gelu(self.up(x)))

    model = nnx.Sequential(*(Block(nnx.Rngs(number)) for number in range(12)))
    plan = sw.plan(model, optimizers={"params": optax.adamw(1e-3)})
    x = jax.ShapeDtypeStruct((64, 64, 32), jnp.float32)
    whole, parts = (
        sw.train_step(lambda model, x: (model(x) ** 2).mean(), microbatches=count)
        .lower(plan.abstract(), x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for count in (1, 8)
    )
    assert parts <= whole / 4, (parts, whole)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_argument_that_does_not_divide() -> None:
    match = r"loss_of splits its arguments into 4 microbatches, and the first axis does not divide by 4 in x of shape "
    error = refused(match + r"\(15, 6\); y of shape \(15, 3\)\.", X[:15], Y[:15], microbatches=4)
    assert error.hint.splitlines()[0] == "a batch whose size is a multiple of 4"
    within = refused(r"in batch\['x'\] of shape \(15, 6\)", {"x": X[:15]}, fn=lambda model, batch: 0.0, microbatches=4)
    assert "whole_argnames='batch'" in within.hint
    other = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    within = refused(r"in other.bias.value of shape \(3,\)", X, other, fn=lambda model, x, other: 0.0, microbatches=2)
    assert "whole_argnames='other'" in within.hint


def test_no_array_argument() -> None:
    match = "loss_of runs in 4 microbatches, and no argument is an array that could be split"
    assert "leave microbatches out" in refused(match, 1.0, 2.0, microbatches=4).hint
    refused(match, X, Y, microbatches=4, whole_argnames=("x", "y"))


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "4", None])
def test_a_number_of_parts_that_is_none(count: Any) -> None:
    with pytest.raises(DeclarationError, match="is not a number of parts"):
        sw.train_step(loss_of, microbatches=count)


def test_arguments_without_a_name_of_their_own() -> None:
    """`*rest` takes every further position, though other parameters come after it; and `**named` takes any name."""

    def fn(model: Any, x: jax.Array, *rest: jax.Array, table: jax.Array, **named: jax.Array) -> Any:
        seen.append((x.shape, *(each.shape for each in rest), table.shape, named["codes"].shape))
        return model.w[...] * x.sum()

    model, four, two = nnx.Dict(w=nnx.Param(jnp.array(1.0))), jnp.ones(4), jnp.ones(2)
    for whole in (("table",), ("table", "rest"), ("table", "codes")):
        seen: list[Any] = []
        state = sw.plan(model, optimizers={"params": optax.sgd(1.0)}).take(model)
        sw.train_step(fn, microbatches=2, whole_argnames=whole)(state, four, four, four, table=four, codes=four)
        rest, codes = four if "rest" in whole else two, four if "codes" in whole else two
        assert seen == [(two.shape, rest.shape, rest.shape, four.shape, codes.shape)]


def test_an_argument_that_the_function_does_not_have() -> None:
    with pytest.raises(DeclarationError, match="whole: loss_of has no parameter z") as raised:
        sw.train_step(loss_of, microbatches=2, whole_argnames="z")
    assert raised.value.hint == "one of: model, x, y"
