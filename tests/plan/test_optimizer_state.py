"""Optimizers of kinds: what Optax sees, what a state holds of it, and every optimizer that cannot stand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from ids import named
from refusals import refused
from strategies import Node, OwnStat

KINDS = sw.Kinds(
    params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
    lora=sw.Kind(nnx.LoRAParam),
    base=sw.Kind(OwnStat, frozen=True),
    cache=sw.Kind(nnx.Cache),
    rest=sw.Kind(...),
)


def model() -> Node:
    return Node(
        kernel=nnx.Param(jnp.ones((2, 3))),
        deep=Node(bias=nnx.Param(jnp.ones(3)), adapter=nnx.LoRAParam(jnp.ones((2, 1)))),
        frozen=OwnStat(jnp.ones(2)),
        key=nnx.Variable(jax.random.key(0)),
        count=nnx.Variable(jnp.array(0)),
        on=nnx.data(jnp.array(True)),
        ratio=nnx.Variable(jnp.array(0.5)),
    )


def planned(optimizers: Any) -> sw.Plan:
    return KINDS.plan(model(), optimizers=optimizers)


# --- what cannot stand -------------------------------------------------------------------------------------------


def test_optimizers_of_a_kind_that_is_not_there() -> None:
    hint = "one of: params, lora, base, cache, rest"
    for key in ("gates", ("params", "gates")):
        with refused(sw.DeclarationError, "There is no kind 'gates'.", kind="gates", hint=hint):
            planned({key: optax.sgd(0.1)})


def test_an_optimizer_of_a_frozen_kind() -> None:
    for key in ("base", ("params", "base")):
        with refused(
            sw.DeclarationError,
            "The kind 'base' is frozen, so it cannot have an optimizer.",
            kind="base",
            hint="optimizers without 'base', or a declaration of 'base' that is not frozen",
        ):
            planned({key: optax.sgd(0.1)})


def test_two_optimizers_of_one_kind() -> None:
    with refused(
        sw.DeclarationError,
        "The kind 'lora' has two optimizers: under ('params', 'lora') and under 'lora'.",
        kind="lora",
        hint="one optimizer for 'lora'; optax.chain joins transformations",
    ):
        planned({("params", "lora"): optax.sgd(0.1), "lora": optax.sgd(0.2)})
    with pytest.raises(sw.DeclarationError, match=r"^The kind 'lora' has two optimizers"):
        planned({("lora", "lora"): optax.sgd(0.1)})


def test_an_optimizer_of_leaves_that_no_gradient_updates() -> None:
    with refused(
        sw.DeclarationError,
        "The optimizer of params, rest would include leaves that are not made of floating-point numbers.",
        kind="params",
        leaves=[
            "count: Variable() int32  kind=rest  (no gradient updates it)",
            "key: Variable() key<fry>  kind=rest  (no gradient updates it)",
            "on: Array() bool  kind=rest  (no gradient updates it)",
        ],
        hint="claim them by a kind of their own: "
        "sw.Kind(sw.Where(lambda path, leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact)))",
    ):
        planned({("params", "rest"): optax.sgd(0.1)})


def test_an_optimizer_of_a_kind_without_leaves() -> None:
    for key in ("cache", ("params", "cache")):
        with refused(
            sw.DeclarationError,
            "An optimizer is given for 'cache', which claims no leaf of this model.",
            kind="cache",
            hint="leave that optimizer out, or correct the kind's filter",
        ):
            planned({key: optax.sgd(0.1)})


def test_an_optimizer_of_no_kind() -> None:
    with refused(
        sw.DeclarationError,
        "An optimizer is given for no kind, which claims no leaf of this model.",
        hint="leave that optimizer out, or correct the kind's filter",
    ):
        planned({(): optax.sgd(0.1)})


@pytest.mark.parametrize("given", [None, 0.1, optax.sgd, nnx.Param, "adam"], ids=named)
def test_no_optimizer(given: Any) -> None:
    with refused(
        sw.DeclarationError,
        f"The optimizer of 'params' is {type(given).__name__}, not an optax.GradientTransformation.",
        kind="params",
        hint="optimizers={'params': optax.adamw(3e-4)}",
    ):
        planned({"params": given})


@pytest.mark.parametrize("given", [optax.sgd(0.1), optax.sgd, [("params", optax.sgd(0.1))], 0.1], ids=named)
def test_no_mapping_of_optimizers(given: Any) -> None:
    with refused(
        sw.DeclarationError,
        f"optimizers={type(given).__name__}(...) does not say which kinds it updates.",
        hint="optimizers={'params': optax.adamw(3e-4)}",
    ):
        planned(given)
    with pytest.raises(sw.DeclarationError, match=r"does not say which kinds it updates"):
        sw.plan(model(), optimizers=given)


@pytest.mark.parametrize("key", [3, None, nnx.Param, ("params", 3)])
def test_a_key_that_names_no_kinds(key: Any) -> None:
    with refused(
        sw.DeclarationError,
        f"{key!r} is not the name of a kind, nor a tuple of names.",
        hint="optimizers={'params': optax.adamw(3e-4)}",
    ):
        planned({key: optax.sgd(0.1)})


def test_a_frozen_optimizer() -> None:
    kinds = KINDS | sw.Kinds(optimizer=sw.Kind(nnx.OptState, frozen=True))
    with refused(
        sw.DeclarationError,
        "The kind 'optimizer' is frozen, but its leaves change in every update.",
        kind="optimizer",
        hint="kinds.replace(optimizer=sw.Kind(nnx.OptState))",
    ):
        kinds.plan(model(), optimizers={"params": optax.adam(0.1)})
    kinds.plan(model())


# --- what a state holds ------------------------------------------------------------------------------------------


def test_optimizer_state_is_a_kind_of_the_state() -> None:
    plan = planned({"params": optax.adam(0.1), "lora": optax.sgd(0.1, momentum=0.9)})
    assert list(plan.kinds) == [*KINDS, "optimizer"]
    assert [str(leaf) for leaf in plan["optimizer"]] == [
        "optimizer/params/0/count: Array() int32  kind=optimizer",
        "optimizer/params/0/mu/deep/bias: Array(3,) float32  kind=optimizer",
        "optimizer/params/0/mu/kernel: Array(2, 3) float32  kind=optimizer",
        "optimizer/params/0/nu/deep/bias: Array(3,) float32  kind=optimizer",
        "optimizer/params/0/nu/kernel: Array(2, 3) float32  kind=optimizer",
        "optimizer/lora/0/trace/deep/adapter: Array(2, 1) float32  kind=optimizer",
    ]
    state = plan.take(model())
    assert len(state.part("optimizer").arrays) == 6
    moments = state["optimizer"]
    assert set(moments) == {"params", "lora"}
    assert moments["params"][0].mu["deep"]["bias"].shape == (3,)
    assert moments["lora"][0].trace["deep"]["adapter"].shape == (2, 1)


def test_a_joint_update_has_one_state() -> None:
    plan = planned({("params", "lora"): optax.adam(0.1)})
    assert plan.optimizers.keys() == {("params", "lora")}
    assert "optimizer/params+lora/0/mu/deep/adapter" in {sw.format_path(leaf.path) for leaf in plan["optimizer"]}
    mu = plan.take(model())["optimizer"]["params+lora"][0].mu
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(mu)) == {
        "deep": {"adapter": (2, 1), "bias": (3,)},
        "kernel": (2, 3),
    }


def test_optimizer_state_beside_an_nnx_optimizer() -> None:
    inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    theirs = nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    plan = sw.plan(inner, theirs, optimizers={"params": optax.sgd(0.1, momentum=0.9)})
    state = plan.take(inner, theirs)
    assert set(state["optimizer"]) == {"objects", "params"}
    assert len(state.part("optimizer").arrays) == len(plan["optimizer"]) == 6 + 2
    ones = jax.tree.map(jnp.ones_like, state["optimizer"])
    again = state.replace(optimizer=ones)["optimizer"]
    assert all(bool((leaf == 1).all()) for leaf in jax.tree.leaves(again))
    assert jax.tree.structure(again) == jax.tree.structure(state["optimizer"])
    plan.put(state, inner, theirs)
    assert int(theirs.step[...]) == 0


def test_optax_sees_the_nested_state_of_plain_arrays() -> None:
    seen: list[Any] = []

    def init(params: Any) -> Any:
        seen.append(params)
        return optax.EmptyState()

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    planned({"params": tx}).take(model())
    for params in seen:
        assert type(params) is type(nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
        assert set(dict(nnx.to_flat_state(params))) == {("kernel",), ("deep", "bias")}
        assert not any(isinstance(leaf, nnx.Variable) for leaf in jax.tree.leaves(params))


def test_moments_that_are_their_parameters_are_told_apart() -> None:
    """`optax.ema` and `lookahead` start from the parameters: one array would be donated twice."""
    tx = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    for copy in (True, False):
        plan = planned({"params": tx})
        state = plan.take(model(), copy=copy)
        assert len({id(array) for array in jax.tree.leaves(state)}) == len(jax.tree.leaves(state))

        @sw.train_step
        def train(model: Any) -> Any:
            return model.kernel[...].sum() + model.deep.bias[...].sum()

        state, _ = train(state)
        state, _ = train(state)
        assert np.array_equal(state["optimizer"]["params"]["kernel"], np.ones((2, 3)))


def test_optimizer_state_in_the_user_s_own_kind() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), optimizer=sw.Kind(nnx.OptState, saved=False), rest=sw.Kind(...))
    plan = kinds.plan(model(), optimizers={"params": optax.sgd(0.1, momentum=0.9)})
    assert plan.kinds == kinds
    assert not plan.kinds["optimizer"].saved


@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1),
        optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(0.1, 10))),
        optax.masked(optax.adam(0.1), lambda params: jax.tree.map(lambda array: array.ndim > 1, params)),
        optax.multi_transform(
            {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, lambda params: jax.tree.map(lambda _: "a", params)
        ),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.contrib.reduce_on_plateau(),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    ],
    ids=lambda tx: type(tx).__name__,
)
def test_a_state_starts_with_what_the_optimizer_s_init_gives(tx: Any) -> None:
    thing = model()
    plan = planned({"params": tx})
    state = plan.take(thing)
    expected = tx.init(nnx.as_pure(nnx.state(thing, KINDS["params"].of)))
    got = jax.tree.leaves(state["optimizer"]["params"])
    assert len(got) == len(jax.tree.leaves(expected)) == len(plan["optimizer"])
    for one, two, leaf in zip(got, jax.tree.leaves(expected), plan["optimizer"], strict=True):
        assert (one.shape, one.dtype) == (leaf.shape, leaf.dtype) == (jnp.shape(two), jnp.asarray(two).dtype)
        assert np.array_equal(one, two)


@pytest.mark.parametrize("nest", [dict, nnx.State])
def test_labels_of_another_structure_than_the_parameters_are_refused(nest: Any) -> None:
    labels = {"kernel": "fast", "bias": "slow"}
    transforms = {"fast": optax.sgd(1.0), "slow": optax.adam(1.0)}
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    hint = (
        "masks and labels are nested as the parameters are: {'layer': {'kernel': True}}; "
        "or functions of them: lambda params: jax.tree.map_with_path(label_of, params)"
    )
    incomplete = optax.multi_transform(transforms, nest({"kernel": "fast"}))
    with pytest.raises(sw.DeclarationError) as caught:
        sw.plan(model, optimizers={"params": incomplete}).take(model)
    # The reason is the missing label, whichever container the labels are in.
    start = "The optimizer of params cannot be set up for these leaves: pytree structure error: different numbers of "
    assert caught.value.message.startswith(f"{start}pytree children")
    assert "has a subtree of the same type but with 2" in caught.value.message or nest is nnx.State
    assert (caught.value.kind, caught.value.hint) == ("params", hint)
    # As the hint says:
    by_path = optax.multi_transform(
        transforms,
        lambda params: jax.tree.map_with_path(lambda path, _: labels[path[-1].key], params),
    )
    by_name = optax.multi_transform(transforms, nest(labels))
    first, other = (sw.plan(model, optimizers={"params": tx}).take(model) for tx in (by_path, by_name))
    assert [leaf.path for leaf in first.plan["optimizer"]] == [leaf.path for leaf in other.plan["optimizer"]]
