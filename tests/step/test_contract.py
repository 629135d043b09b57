"""The contract of a step: which kinds it may write, what it says where it writes others, and which leaves cross."""

from __future__ import annotations

import re
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


class Count(nnx.Variable):
    pass


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.dense(x)))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.calls = Count(jnp.array(0))
        self.hits = nnx.Cache(jnp.zeros(2))
        self.mask = Count(jnp.ones(2), role="mask")

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return x * self.mask[None]


KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param),
    stats=sw.Kind(nnx.BatchStat),
    rng=sw.Kind(nnx.RngState),
    mask=sw.Kind(sw.Meta("role", "mask"), frozen=True),
    counts=sw.Kind(nnx.All(Count, nnx.Not(sw.Meta("role", "mask")))),
    cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
)
X = jnp.arange(6.0).reshape(3, 2)
Y = jnp.zeros((3, 2))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(nnx.Rngs(0))


@pytest.fixture(scope="module")
def plan(model: Model) -> sw.Plan:
    return KINDS.plan(model, optimizers={"params": optax.sgd(0.1)})


@pytest.fixture
def state(plan: sw.Plan, model: Model) -> sw.State:
    return plan.take(model)


def forward(model: Model, x: jax.Array) -> jax.Array:
    return model(x)


def loss(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    return ((model(x) - y) ** 2).mean()


def crossing(step: sw.results.Step, state: sw.State, *args: Any) -> tuple[set[str], set[str]]:
    """The leaves whose arrays go into the compiled function: those donated, and those only read."""
    plan, operands = state.plan, step._entry(state, args, {}).operands
    stored = list(tables_of(plan).stored.values())

    def paths(routes: Any) -> set[str]:
        slots = [stored[route.kind][slot] for route in routes for slot in route.slots]
        return {sw.format_path(array.leaf.path) for slot in slots for array in slot.arrays}

    return paths(operands.donated), paths(operands.read_only)


def both(*names: str) -> set[str]:
    return {f"layers/{number}/{name}" for number in (0, 1) for name in names}


PARAMS = both("dense/kernel", "dense/bias", "norm/scale", "norm/bias")
STATS = both("norm/mean", "norm/var")


# --- an undeclared write ---------------------------------------------------------------------------------------------


def test_an_undeclared_write_names_leaf_module_and_hint(state: sw.State) -> None:
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(forward)(state, X)
    assert str(caught.value) == "\n".join(
        [
            "forward writes stats, rng, counts, which it does not declare.",
            "  layers/0/norm/mean: BatchStat(2,) float32  kind=stats  (written in BatchNorm layers/0/norm)",
            "  layers/0/norm/var: BatchStat(2,) float32  kind=stats  (written in BatchNorm layers/0/norm)",
            "  layers/1/norm/mean: BatchStat(2,) float32  kind=stats  (written in BatchNorm layers/1/norm)",
            "  layers/1/norm/var: BatchStat(2,) float32  kind=stats  (written in BatchNorm layers/1/norm)",
            "  layers/0/drop/rngs/count: RngCount() uint32  kind=rng  (written in Dropout layers/0/drop)",
            "  layers/1/drop/rngs/count: RngCount() uint32  kind=rng  (written in Dropout layers/1/drop)",
            "  calls: Count() int32  kind=counts  (written in Model)",
            "  hint: @sw.step(writes=('stats', 'rng', 'counts'))",
            "        or, if the function only evaluates: model.eval() as its first line,"
            " and @sw.step(writes=('counts',))",
        ]
    )
    assert caught.value.kind == "stats"
    assert [leaf.path for leaf in caught.value.leaves if leaf.kind == "counts"] == [("calls",)]
    assert isinstance(caught.value, ValueError)


def test_declared_kinds_stay_in_the_hint(state: sw.State) -> None:
    step = sw.step(forward, writes=("counts", "stats"))
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        step(state, X)
    assert caught.value.message == "forward writes rng, which it does not declare."
    assert (caught.value.hint or "").startswith("@sw.step(writes=('stats', 'rng', 'counts'))")
    # Nothing has happened: the state is whole, and is refused again.
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))
    with pytest.raises(sw.UndeclaredWriteError):
        step(state, X)


def test_the_hint_hints(state: sw.State, plan: sw.Plan, model: Model) -> None:
    def evaluate(model: Model, x: jax.Array) -> jax.Array:
        model.eval()
        return model.layers[0](x)

    out = sw.step(evaluate)(state, X)
    written, _ = sw.step(forward, writes=("stats", "rng", "counts"))(state, X)
    assert int(written["counts"]["calls"]) == 1
    # What eval() set inside the step stayed inside.
    again = sw.step(evaluate)(plan.take(model), X)
    np.testing.assert_array_equal(out, again)
    assert not model.layers[0].norm.use_running_average


def test_a_frozen_kind_is_never_written(state: sw.State) -> None:
    def unmask(model: Model) -> None:
        model.mask[...] *= 2
        model.hits[...] += 1

    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(unmask)(state)
    assert str(caught.value) == "\n".join(
        [
            "unmask writes mask, cache, which it does not declare.",
            "  mask: Count(2,) float32  kind=mask  (written in Model; the kind is frozen)",
            "  hits: Cache(2,) float32  kind=cache  (written in Model)",
            "  hint: @sw.step(writes=('cache',))",
        ]
    )
    with pytest.raises(sw.DeclarationError) as refused:
        sw.step(unmask, writes=("cache", "mask"))(state)
    assert str(refused.value) == "\n".join(
        [
            "unmask declares that it writes 'mask', which is frozen.",
            "  hint: take 'mask' out of writes, or declare the kind with frozen=False",
        ]
    )


def test_an_unknown_kind_in_writes(state: sw.State) -> None:
    with pytest.raises(sw.DeclarationError, match=re.escape("There is no kind 'stat'.")) as caught:
        sw.step(forward, writes="stat")(state, X)
    assert caught.value.hint == "one of: params, stats, rng, mask, counts, cache, optimizer"


def test_several_objects_are_told_apart() -> None:
    objects = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    state = sw.plan(*objects).take(*objects)
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(lambda dense, norm, x: norm(dense(x)))(state, X)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "1/mean: BatchStat(2,) float32  kind=stats  (written in BatchNorm 1)",
        "1/var: BatchStat(2,) float32  kind=stats  (written in BatchNorm 1)",
    ]


# --- what a training step may write ----------------------------------------------------------------------------------


def test_training_writes_what_training_moves(state: sw.State) -> None:
    train = sw.train_step(loss)
    after, _ = train(state, X, Y)
    assert int(after["counts"]["calls"]) == 1
    assert float(after["stats"]["layers"][0]["norm"]["mean"][0]) != 0
    after, _ = train(after, X, Y)
    assert int(after["counts"]["calls"]) == 2


def test_training_does_not_write_the_ephemeral_unless_named(state: sw.State) -> None:
    def cached(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
        model.hits[...] += 1
        return loss(model, x, y)

    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.train_step(cached)(state, X, Y)
    assert [leaf.path for leaf in caught.value.leaves] == [("hits",)]
    assert re.match(r"@sw\.train_step\(writes=\(.*'cache'", caught.value.hint or "")
    after, _ = sw.train_step(cached, writes="cache")(state, X, Y)
    assert after["cache"]["hits"].tolist() == [1.0, 1.0]
    assert int(after["counts"]["calls"]) == 1  # what it may by default, it still may


def test_training_that_may_write_nothing(state: sw.State) -> None:
    with pytest.raises(sw.UndeclaredWriteError, match="loss writes stats, rng, counts") as caught:
        sw.train_step(loss, writes=())(state, X, Y)
    assert {leaf.kind for leaf in caught.value.leaves} == {"stats", "rng", "counts"}

    def pure(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((model.layers[0].dense(x) - y) ** 2).mean()

    after, _ = sw.train_step(pure, writes=())(state, X, Y)
    assert np.any(after["params"]["layers"][0]["dense"]["kernel"] != 0)


def test_trained_kinds_are_written_by_their_optimizer_alone_unless_named(state: sw.State) -> None:
    def meddling(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
        model.layers[0].dense.bias[...] = jnp.full(2, 5.0)
        return loss(model, x, y)

    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.train_step(meddling)(state, X, Y)
    assert str(caught.value) == "\n".join(
        [
            "meddling writes params, which it does not declare.",
            "  layers/0/dense/bias: Param(2,) float32  kind=params"
            "  (written in Linear layers/0/dense; written by its optimizer alone)",
            "  hint: if a layer normalizes its own weights: @sw.train_step(writes=('params',))",
        ]
    )
    after, _ = sw.train_step(meddling, writes="params")(state, X, Y)
    np.testing.assert_allclose(after["params"]["layers"][0]["dense"]["bias"], 5.0, atol=0.1)


def test_parameters_outside_wrt_need_a_name(model: Model) -> None:
    kinds = KINDS.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(sw.Path("layers/1/**")))))
    kinds = kinds | sw.Kinds(target=sw.Kind(nnx.All(nnx.Param, sw.Path("layers/1/**"))))
    state = kinds.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)

    def follow(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
        model.layers[1].dense.bias[...] = model.layers[0].dense.bias[...]
        return (model.layers[0](x) ** 2).mean()

    with pytest.raises(sw.UndeclaredWriteError, match="follow writes target"):
        sw.train_step(follow)(state, X, Y)
    sw.train_step(follow, writes="target")(state, X, Y)


# --- what crosses ----------------------------------------------------------------------------------------------------


def test_only_what_is_read_goes_in_and_only_what_is_written_comes_out(state: sw.State) -> None:
    def evaluate(model: Model, x: jax.Array) -> jax.Array:
        model.eval()
        return model.layers[0].norm(x)

    step = sw.step(evaluate, writes="stats")
    with pytest.warns(sw.StatewiseWarning, match="but never writes it"):
        crossed = crossing(step, state, X)
    assert crossed == (
        set(),
        {f"layers/0/norm/{name}" for name in ("mean", "var", "scale", "bias")},
    )
    after, _ = step(state, X)
    for kind in state:
        assert after.part(kind) is state.part(kind)


def test_what_is_overwritten_unread_is_donated(state: sw.State) -> None:
    def reset(model: Model) -> None:
        model.hits[...] = jnp.full(2, 3.0)

    step = sw.step(reset, writes="cache")
    assert crossing(step, state) == ({"hits"}, set())
    after, _ = step(state)
    assert after["cache"]["hits"].tolist() == [3.0, 3.0]
    with pytest.raises(sw.StructureError, match="This state was donated: reset has donated its cache"):
        step(state)
    assert after.part("params") is state.part("params")


def test_part_of_a_kind(state: sw.State) -> None:
    def first(model: Model, x: jax.Array) -> jax.Array:
        return model.layers[0].norm(x)

    step = sw.step(first, writes="stats")
    norm = {"layers/0/norm/mean", "layers/0/norm/var"}
    assert crossing(step, state, X) == (norm, {"layers/0/norm/scale", "layers/0/norm/bias"})
    kept = state["stats"]["layers"][1]["norm"]["mean"]
    after, _ = step(state, X)
    assert after["stats"]["layers"][1]["norm"]["mean"] is kept
    assert repr(state) != repr(after)
    assert "stats: 4 arrays (donated)" in repr(state)


def test_what_training_takes_along(state: sw.State) -> None:
    donated, kept = crossing(sw.train_step(loss), state, X, Y)
    assert donated >= PARAMS | STATS | {"calls"} | both("drop/rngs/count")
    assert kept == {"mask"} | both("drop/rngs/key")


def test_momentum_is_donated_with_its_parameters(model: Model) -> None:
    state = KINDS.plan(model, optimizers={"params": optax.sgd(0.1, momentum=0.9)}).take(model)
    donated, _ = crossing(sw.train_step(loss), state, X, Y)
    moments = {path for path in donated if path.startswith("optimizer/params/")}
    assert len(moments) == len(PARAMS)


def test_a_step_that_writes_nothing_spends_nothing(state: sw.State) -> None:
    def evaluate(model: Model, x: jax.Array) -> jax.Array:
        model.eval()
        return model.layers[0](x)

    step = sw.step(evaluate)
    first = step(state, X)
    second = step(state, X)
    np.testing.assert_array_equal(first, second)
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))


# --- the output and the state share no buffer ------------------------------------------------------------------------


def copied(model: Model, x: jax.Array) -> None:
    """A value of another kind; as a target network takes over the trained one."""
    model.hits[...] = model.layers[0].dense.bias[...]


def given(model: Model, x: jax.Array) -> None:
    model.hits[...] = x[0] if x.ndim > 1 else x


@pytest.mark.parametrize("fn, arg", [(copied, X), (given, jnp.ones(2))], ids=["from a leaf", "from an argument"])
def test_no_array_stands_in_two_places(state: sw.State, fn: Callable[..., Any], arg: jax.Array) -> None:
    after, _ = sw.step(fn, writes="cache")(state, arg)
    train = sw.train_step(loss)
    kept = np.array(after["cache"]["hits"])
    trained, _ = train(after, X, Y)
    trained, _ = train(trained, X, Y)
    np.testing.assert_array_equal(trained["cache"]["hits"], kept)
    final, _ = sw.step(fn, writes="cache")(trained, arg)
    assert np.all(np.isfinite(final["cache"]["hits"]))
    assert not arg.is_deleted()


def test_what_came_out_stays(state: sw.State) -> None:
    @sw.step(writes="cache")
    def peek(model: Model) -> tuple[jax.Array, jax.Array, jax.Array]:
        before = model.hits[...]
        model.hits[...] += 1
        return before, model.hits[...], model.layers[0].dense.bias[...]

    state, first = peek(state)
    state, second = peek(state)
    state, _ = sw.train_step(loss)(state, X, Y)
    assert [array.tolist() for array in first] == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert [array.tolist() for array in second] == [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]


def test_two_leaves_change_places(state: sw.State) -> None:
    @sw.step(writes="stats")
    def swap(model: Model) -> None:
        one, other = model.layers[0].norm, model.layers[1].norm
        one.mean[...], other.var[...] = other.var[...], one.mean[...]

    for turn in range(3):
        state, _ = swap(state)
        stats = state["stats"]["layers"]
        assert stats[0]["norm"]["mean"].tolist() == [float(turn % 2 == 0)] * 2
        assert stats[1]["norm"]["var"].tolist() == [float(turn % 2)] * 2
