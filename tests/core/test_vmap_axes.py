"""Ensembles and per-example state under plain `jax.vmap`: equal to each model alone, and to NNX's own."""

from __future__ import annotations

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

TRACES: list[str] = []


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        # Before a norm a bias has no gradient but rounding, which Adam would blow up.
        self.dense = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.out = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(nnx.tanh(self.norm(self.dense(x)))))


def make(key: jax.Array) -> Model:
    return Model(nnx.Rngs(key))


KEYS = jax.random.split(jax.random.key(0), 3)
XS = jax.random.normal(jax.random.key(1), (3, 5, 3))
YS = XS.sum(-1, keepdims=True)
PLAN = sw.plan(make(KEYS[0]), optimizers={"params": optax.adam(1e-2)})
ALL = {"params": 0, "stats": 0, "rng": 0}


def loss_of(model: Model, x: jax.Array, y: jax.Array) -> jax.Array:
    TRACES.append("loss")
    return ((model(x) - y) ** 2).mean()


train = sw.train_step(loss_of)
forward = sw.step(writes=("stats", "rng"))(lambda model, x: model(x))


def one_of(states: sw.State, number: int, axes: sw.State | None = None) -> sw.State:
    axes = axes or jax.tree.map(lambda _: 0, states)
    return jax.tree.map(
        lambda axis, array: array if axis is None else jnp.take(array, number, axis),
        axes,
        states,
        is_leaf=lambda leaf: leaf is None,
    )


def close(one: Any, other: Any) -> None:
    mine, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
    assert mine[1] == theirs[1]
    for a, b in zip(mine[0], theirs[0], strict=True):
        np.testing.assert_allclose(data(a), data(b), rtol=2e-5, atol=1e-6)


def axes_of(axes: sw.State, kind: str) -> list[int | None]:
    return list(axes.part(kind).arrays)


# --- ensembles -------------------------------------------------------------------------------------------------------


def ensemble() -> sw.State:
    return jax.vmap(lambda key: PLAN.take(make(key)), out_axes=PLAN.axes(**ALL))(KEYS)


@pytest.mark.parametrize("graph", [True, False])
def test_stacked_initialisation_is_each_one_alone(graph: bool) -> None:
    with nnx.set_graph_mode(graph):
        states = ensemble()
        for number, key in enumerate(KEYS):
            close(one_of(states, number), PLAN.take(make(key)))


@pytest.mark.parametrize("graph", [True, False])
def test_an_ensemble_trains_as_each_model_alone(graph: bool) -> None:
    axes = PLAN.axes(**ALL)
    with nnx.set_graph_mode(graph):
        states, alone = ensemble(), [PLAN.take(make(key)) for key in KEYS]
        for _ in range(3):
            states, losses = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)
            for number in range(3):
                alone[number], loss = train(alone[number], XS[number], YS[number])
                close(losses[number], loss)
                close(one_of(states, number), alone[number])


def test_an_ensemble_trains_as_under_nnx_vmap() -> None:
    @nnx.vmap
    def born(key: jax.Array) -> tuple[Model, nnx.Optimizer]:
        model = make(key)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.vmap
    def trained(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    model, optimizer = born(KEYS)
    axes, states = PLAN.axes(**ALL), ensemble()
    for _ in range(3):
        theirs = trained(model, optimizer, XS, YS)
        states, losses = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)
        close(losses, theirs)
    for kind, type_ in {"params": nnx.Param, "stats": nnx.BatchStat, "rng": nnx.RngState}.items():
        close(jax.tree.leaves(states[kind]), jax.tree.leaves(nnx.as_pure(nnx.state(model, type_))))


def test_an_nnx_optimizer_among_the_objects_follows_too() -> None:
    def born(key: jax.Array) -> tuple[Model, nnx.Optimizer]:
        model = make(key)
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @sw.step(writes=("params", "stats", "rng", "optimizer"))
    def update(model: Model, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    plan = sw.plan(*nnx.eval_shape(lambda: born(KEYS[0])))
    axes = plan.axes(**ALL)
    assert set(axes_of(axes, "optimizer")) == {0}
    states = jax.vmap(lambda key: plan.take(*born(key)), out_axes=axes)(KEYS)
    _, losses = jax.vmap(update, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)
    close(losses, jnp.stack([train(PLAN.take(make(key)), XS[at], YS[at])[1] for at, key in enumerate(KEYS)]))


def test_an_ensemble_is_traced_once() -> None:
    fresh = sw.train_step(loss_of)
    axes, states = PLAN.axes(**ALL), ensemble()
    mapped = jax.jit(jax.vmap(fresh, in_axes=(axes, 0, 0), out_axes=(axes, 0)))
    TRACES.clear()
    for _ in range(3):
        states, _ = mapped(states, XS, YS)
    assert TRACES == ["loss"]


def test_ensembles_along_another_axis() -> None:
    def second(path: Any, shape: tuple[int, ...]) -> int:
        return min(1, len(shape))

    axes = PLAN.axes(params=second, stats=1, rng=0)
    states = jax.vmap(lambda key: PLAN.take(make(key)), out_axes=axes)(KEYS)
    assert states["params"]["dense"]["kernel"].shape == (3, 3, 4)
    assert states["stats"]["norm"]["mean"].shape == (4, 3)
    states, losses = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)
    for number, key in enumerate(KEYS):
        state, loss = train(PLAN.take(make(key)), XS[number], YS[number])
        close((losses[number], one_of(states, number, axes)), (loss, state))


def test_a_packed_ensemble() -> None:
    packed = PLAN.take(make(KEYS[0]), pack=True)
    axes = packed.plan.axes(**ALL)
    assert [len(part) for part in packed.tables.stored.values()] == [len(axes_of(axes, kind)) for kind in packed]
    states = jax.vmap(lambda key: PLAN.take(make(key), pack=True), out_axes=axes)(KEYS)
    states, losses = jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)
    for number, key in enumerate(KEYS):
        state, loss = train(PLAN.take(make(key)), XS[number], YS[number])
        close(losses[number], loss)
        alone = one_of(states, number)
        for kind in state:
            close(alone[kind], state[kind])


# --- shared parameters -----------------------------------------------------------------------------------------------


def test_shared_parameters_with_statistics_of_each_example() -> None:
    """Equal to `jax.vmap` by hand over flat leaves."""
    state = PLAN.take(make(KEYS[0]))
    axes = PLAN.axes(stats=0, rng=0)
    assert {kind: set(axes_of(axes, kind)) for kind in ("params", "stats", "rng", "optimizer")} == {
        "params": {None},
        "stats": {0},
        "rng": {0},
        "optimizer": {None},
    }

    def replica(number: jax.Array) -> sw.State:
        def split(array: jax.Array) -> jax.Array:
            is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
            return jax.random.fold_in(array, number) if is_key else array

        return state.replace(rng=jax.tree.map(split, state["rng"]))

    many = jax.vmap(replica, out_axes=axes)(jnp.arange(3))
    assert many["params"]["dense"]["kernel"].shape == (3, 4)
    many, out = jax.vmap(forward, in_axes=(axes, 0), out_axes=(axes, 0))(many, XS)

    graphdef, params, stats, rng = nnx.split(make(KEYS[0]), nnx.Param, nnx.BatchStat, nnx.RngState)
    pure = [nnx.as_pure(part) for part in (params, stats, rng)]

    def by_hand(number: jax.Array, x: jax.Array) -> Any:
        rng = jax.tree.map(
            lambda a: jax.random.fold_in(a, number) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a, pure[2]
        )
        model = nnx.merge(graphdef, pure[0], pure[1], rng)
        return model(x), jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.BatchStat)))

    expected, stats_after = jax.vmap(by_hand)(jnp.arange(3), XS)
    close(out, expected)
    close(jax.tree.leaves(many["stats"]), stats_after)


def test_a_kind_that_is_written_without_an_axis_is_named() -> None:
    axes = PLAN.axes(params=0, rng=0)
    states = jax.vmap(lambda key: PLAN.take(make(KEYS[0])).replace(rng=PLAN.take(make(key))["rng"]), out_axes=axes)(
        KEYS
    )
    with pytest.raises(ValueError, match=r"vmap out_axes\[0\]\['stats/norm/mean'\], got axis spec None"):
        jax.vmap(train, in_axes=(axes, 0, 0), out_axes=(axes, 0))(states, XS, YS)


def test_heads_of_their_own_on_a_shared_trunk() -> None:
    kinds = sw.Kinds(trunk=sw.Kind(nnx.Param & sw.Path("dense/*")), rest=sw.Kind(...))
    plan = kinds.plan(make(KEYS[0]), optimizers={"trunk": optax.sgd(0.1, momentum=0.9)})
    assert set(axes_of(plan.axes(rest=0), "optimizer")) == {None}
    assert set(axes_of(plan.axes(trunk=0, rest=None), "optimizer")) == {0}
    assert set(axes_of(plan.axes(trunk=0, rest=None, optimizer=None), "optimizer")) == {None}
    joint = sw.plan(make(KEYS[0]), optimizers={"params": optax.adam(0.1)})
    axes = joint.axes(params=lambda path, shape: 0 if path[0] == "out" else None, rng=None)
    assert set(axes_of(axes, "optimizer")) == {0}
    assert axes["params"]["out"]["kernel"] == 0
    assert axes["params"]["dense"]["kernel"] is None


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_a_leaf_of_too_few_dimensions_is_named() -> None:
    plan = sw.plan(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with refused(
        sw.StructureError,
        "4 leaves have too few dimensions for the axis.",
        leaves=[
            "bias: Param(3,) float32  kind=params  (has rank 2 with the new axis, which cannot be -3)",
            "scale: Param(3,) float32  kind=params  (has rank 2 with the new axis, which cannot be -3)",
            "mean: BatchStat(3,) float32  kind=stats  (has rank 2 with the new axis, which cannot be 2)",
            "var: BatchStat(3,) float32  kind=stats  (has rank 2 with the new axis, which cannot be 2)",
        ],
        hint="the first axis, which every array can have: plan.axes(params=0, stats=0)\n"
        "or one for each: plan.axes(params=lambda path, shape: 1 if len(shape) > 1 else 0)",
    ):
        plan.axes(params=-3, stats=2)
    assert axes_of(plan.axes(params=1, stats=-2), "stats") == [-2, -2]
    thing = nnx.Dict(count=nnx.Variable(jnp.array(0)))
    with refused(
        sw.StructureError,
        "1 leaf has too few dimensions for the axis.",
        leaves=["count: Variable() int32  kind=variables  (has rank 1 with the new axis, which cannot be 1)"],
        kind="variables",
        hint="the first axis, which every array can have: plan.axes(variables=0)\n"
        "or one for each: plan.axes(variables=lambda path, shape: 1 if len(shape) > 1 else 0)",
    ):
        sw.plan(thing).axes(variables=1)


def test_a_function_that_gives_no_axis_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "The function of kind 'stats' returns something other than axes.",
        leaves=[
            "norm/mean: BatchStat(4,) float32  kind=stats  (given 'mean')",
            "norm/var: BatchStat(4,) float32  kind=stats  (given 'var')",
        ],
        kind="stats",
        hint="plan.axes(stats=lambda path, shape: 0 if path[0] == 'head' else None)",
    ):
        PLAN.axes(stats=lambda path, shape: path[-1], rng=0)


def test_arrays_packed_together_have_one_axis() -> None:
    leaves = [nnx.Variable(jnp.ones(2)) for _ in range(4)]
    plan = sw.plan(nnx.List(leaves)).take(nnx.List(leaves), pack=True).plan
    with refused(
        sw.StructureError,
        "Arrays that are packed into one buffer must have one axis.",
        leaves=["3: Variable(2,) float32  kind=variables  (axis 0, packed with others of axis None)"],
        kind="variables",
        hint="one axis for all of the kind, or take the state without pack=",
    ):
        plan.axes(variables=lambda path, shape: 0 if path == (3,) else None)


def test_paths_given_to_a_function_are_those_of_its_object() -> None:
    plan = sw.plan(nnx.Dict(a=nnx.Param(jnp.ones(2))), nnx.Dict(b=nnx.Param(jnp.ones(3))))
    seen = []
    plan.axes(params=lambda path, shape: seen.append((path, shape)))
    assert seen == [(("a",), (2,)), (("b",), (3,))]


def test_random_streams_have_to_be_told() -> None:
    streams = [
        "drop/rngs/count: RngCount() uint32  kind=rng",
        "drop/rngs/key: RngKey() key<fry>  kind=rng",
    ]
    message = "The model has random streams in rng, and plan.axes does not say whether they are shared."
    for given, said in (({}, ""), ({"params": 0, "stats": None}, "params=0, stats=None, ")):
        hint = (
            f"plan.axes({said}rng=0)  # each member draws noise of its own\n"
            f"or plan.axes({said}rng=None)  # the same noise in all of them"
        )
        with refused(sw.DeclarationError, message, leaves=streams, kind="rng", hint=hint):
            PLAN.axes(**given)
        for line in hint.splitlines():
            axes = eval(line.removeprefix("or ").partition("#")[0], {"plan": PLAN})
            assert axes.plan is PLAN


@pytest.mark.parametrize("variable", [nnx.RngKey(jax.random.key(0), tag="own"), nnx.Variable(jax.random.key(0))])
def test_streams_are_found_in_whichever_kind(variable: nnx.Variable) -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
    plan = kinds.plan(nnx.Dict(w=nnx.Param(jnp.ones(2)), key=variable))
    with pytest.raises(sw.DeclarationError, match="The model has random streams in rest") as caught:
        plan.axes(params=0)
    assert [leaf.path for leaf in caught.value.leaves] == [("key",)]
    assert plan.axes(params=0, rest=None)["rest"]["key"] is None
    assert plan.axes(rest=lambda path, shape: 0)["rest"]["key"] == 0
