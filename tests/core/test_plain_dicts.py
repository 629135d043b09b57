"""Leaves nested by path: given as Flax gives them, and taken in either container, today and when Flax gives dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import modes
import statewise as sw
from plain_states import as_dicts
from refusals import refused
from statewise._src.common.nnx_graph import ModelError


class Block(nnx.Module):
    def __init__(self, seed: int) -> None:
        self.dense = nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(seed))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.dense(x))


class Model(nnx.Module):
    """Integer keys, a value that is a dict, two kinds that train."""

    def __init__(self) -> None:
        self.blocks = nnx.List([Block(0), Block(1)])
        self.several = nnx.Variable({"a": jnp.ones(2), "b": {"c": jnp.ones(3)}})
        self.head = nnx.LoRA(2, 1, 2, rngs=nnx.Rngs(5))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = jnp.arange(6.0).reshape(3, 2)
KINDS = sw.Kinds.standard()


def loss_of(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def assert_equal(one: Any, other: Any) -> None:
    """The same containers, at the same keys the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def as_dict(state: Any) -> Any:
    """The same as plain dicts, made by Flax."""
    pure = nnx.as_pure(state)
    return pure if type(pure) is dict else nnx.to_pure_dict(pure)


# --- what is given -------------------------------------------------------------------------------------------------


def test_a_kind_of_a_state_is_what_flax_gives(container: type) -> None:
    model = Model()
    plan = KINDS.plan(model, optimizers={"params": optax.adam(0.1)}, averages={"params": sw.EMA(0.9)})
    state = plan.take(model)
    for kind in ("params", "lora", "stats", "variables", "cache"):
        expected = nnx.as_pure(nnx.state(model, KINDS[kind].of))
        assert type(state[kind]) is type(expected) is container
        if kind != "variables":  # `...` claims what no other kind does
            assert_equal(state[kind], expected)
    assert_equal(state["variables"], nnx.as_pure(nnx.state(model, sw.Path("several"))))
    moments = state["optimizer"]["params"][0]
    assert_equal(moments, optax.scale_by_adam().init(nnx.as_pure(nnx.state(model, KINDS["params"].of))))
    assert type(state["ema"]) is container


def test_parts_selections_and_gradients_are_what_flax_gives(container: type) -> None:
    model = Model()
    _, parts = sw.split(model, KINDS)
    _, *expected = nnx.split(model, *(KINDS[kind].of for kind in KINDS))
    assert all(type(part) is container for part in (*parts.values(), sw.select(model, nnx.Cache)))
    for kind, theirs in zip(KINDS, expected, strict=True):
        assert_equal(nnx.as_pure(parts[kind]), nnx.as_pure(theirs))
    assert_equal(sw.select(model, nnx.BatchStat), nnx.state(model, nnx.BatchStat))
    grads = sw.grad(lambda model: loss_of(model, X), wrt=KINDS["params"].of)(nnx.clone(model))
    wrt = nnx.DiffState(0, KINDS["params"].of)
    theirs = nnx.grad(lambda model: loss_of(model, X), argnums=wrt)(nnx.clone(model))
    assert type(grads) is type(theirs) is container
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    # Flax's own optimizer takes them.
    nnx.Optimizer(model, optax.sgd(0.1), wrt=KINDS["params"].of).update(model, grads)


@pytest.mark.usefixtures("plain_variables")  # what comes out of a step are plain Variables
def test_captured_values_and_outputs_are_what_flax_gives(container: type) -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.inner = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "mean", x.mean())
            return self.inner(x)

    model = Sowing()
    state = sw.plan(model).take(model)
    _, captured = sw.step(lambda model, x: model(x), capture="intermediates")(state, X)
    assert type(captured) is container
    assert float(captured["mean"][0]) == 2.5
    out = sw.step(lambda model: nnx.state(model, nnx.Param))(state)
    assert_equal(out, nnx.state(model, nnx.Param))


# --- what is taken -------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Any], Any]] = {
    "nnx.State of arrays": lambda state: nnx.State(as_dict(state)),
    "nnx.State of Variables": lambda state: nnx.State(as_dicts(state)),
    "dicts of arrays": as_dict,
    "dicts of Variables": as_dicts,
    "dicts of NumPy arrays": lambda state: jax.tree.map(np.asarray, as_dict(state)),
}


@pytest.mark.parametrize("form", FORMS)
def test_replace_update_and_merge_take_every_container(form: str, container: type) -> None:
    model, other = Model(), Model()
    nnx.update(other, jax.tree.map(lambda array: array + 1, nnx.state(model, nnx.Param, nnx.BatchStat)[0]))
    params = nnx.state(other, KINDS["params"].of)
    state = sw.plan(model).take(model)
    replaced = state.replace(params=FORMS[form](params))
    assert_equal(replaced["params"], nnx.as_pure(params))
    assert type(replaced["params"]) is container
    sw.update(model, FORMS[form](nnx.state(other)))
    assert_equal(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(other)))
    graphdef, parts = sw.split(other, KINDS)
    for merged in (
        sw.merge(graphdef, {kind: FORMS[form](part) for kind, part in parts.items()}),
        sw.merge(graphdef, [FORMS[form](part) for part in parts.values()]),
        sw.merge(graphdef, FORMS[form](nnx.state(other))),
        sw.merge(nnx.graphdef(other), FORMS[form](nnx.state(other))) if "Variables" in form else model,
    ):
        assert_equal(nnx.as_pure(nnx.state(merged)), nnx.as_pure(nnx.state(other)))


def test_one_dict_of_all_leaves_and_a_dict_of_parts_are_told_apart(container: type) -> None:
    model = nnx.Dict(params=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rest=nnx.Dict(params=nnx.BatchStat(jnp.ones(2))))
    graphdef, parts = sw.split(model, sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...)))
    one = {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "rest": {"params": jnp.zeros(2)}}
    assert float(sw.merge(graphdef, one).params.kernel.sum()) == 4
    assert_equal(nnx.state(sw.merge(graphdef, parts)), nnx.state(model))
    del one["params"]["bias"]
    with refused(
        sw.StructureError,
        "The parts do not make up the model: 1 leaf differs.",
        leaves=["params/bias: Param(2,) float32  (missing from the parts)"],
        hint="graphdef, parts = sw.split(model, kinds)  # both of one model",
    ):
        sw.merge(graphdef, one)


@pytest.mark.parametrize("nest", [dict, nnx.State])
def test_masks_and_labels_train_as_optax_alone_does(nest: Any, container: type) -> None:
    model = Model()
    block = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": True, "bias": False}}
    mask = nest({"blocks": {0: block, 1: block}})
    labels = jax.tree.map(lambda is_kernel: "fast" if is_kernel else "slow", mask)
    transforms = {"fast": optax.sgd(0.1), "slow": optax.adam(0.01)}
    plain = as_dict(nnx.state(model, KINDS["params"].of))
    for make in (
        lambda mask, labels: optax.multi_transform(transforms, labels),
        lambda mask, labels: optax.chain(optax.masked(optax.adam(0.1), mask), optax.sgd(0.1)),
        lambda mask, labels: optax.adamw(0.1, weight_decay=0.3, mask=mask),
    ):
        plan = sw.plan(model, optimizers={"params": make(mask, labels)})
        state, _ = sw.train_step(loss_of)(plan.take(model), X)
        grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, KINDS["params"].of))(nnx.clone(model), X)
        tx = make(as_dict(mask), as_dict(labels))
        updates, moments = tx.update(as_dict(grads), tx.init(plain), plain)
        expected = jax.tree.leaves((optax.apply_updates(plain, updates), moments))
        got = jax.tree.leaves((state["params"], state["optimizer"]["params"]))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    packed, _ = sw.train_step(loss_of)(plan.take(model, pack=True), X)
    for one, other in zip(jax.tree.leaves(packed["params"]), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nest", [dict, nnx.State])
def test_moments_are_placed_as_their_parameters(nest: Any, container: type) -> None:
    """Also those of a parameter whose path ends as that of another one's moment."""

    class Awkward(nnx.Module):
        def __init__(self) -> None:
            self.mu = nnx.Dict(w=nnx.Param(jnp.ones((4, 8))))
            self.w = nnx.Param(jnp.ones((8, 4)))

    model = Awkward()
    kinds = KINDS.replace(
        params=sw.Kind(
            nnx.Param,
            placement=lambda path, shape: sw.Sharded("x") if path == ("w",) else sw.Sharded(None, "x"),
        )
    )
    mask = nest({"mu": {"w": True}, "w": True})
    plan = kinds.plan(model, optimizers={"params": optax.masked(optax.adam(0.1), mask)})
    state = plan.take(model, mesh=jax.make_mesh((8,), ("x",)))
    moments = state["optimizer"]["params"].inner_state[0].mu
    assert moments["w"].sharding.spec == state["params"]["w"].sharding.spec == jax.P("x")
    assert moments["mu"]["w"].sharding.spec == state["params"]["mu"]["w"].sharding.spec == jax.P(None, "x")


def test_a_state_of_variables_is_an_object_like_any_other(container: type) -> None:
    model = Model()
    live = nnx.state(model)
    plan = sw.plan(live)
    assert sw.census(live).to_dict() == sw.census(model).to_dict()
    assert not sw.diff(live, model)
    state = plan.take(live)
    doubled = state.replace(params=jax.tree.map(lambda array: array * 2, state["params"]))
    plan.put(doubled, live)
    assert_equal(nnx.as_pure(nnx.state(model, KINDS["params"].of)), doubled["params"])


def test_an_optimizer_of_flax_among_the_objects(container: type) -> None:
    def train(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of)(model, x)
        optimizer.update(model, grads)
        return loss

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    theirs = nnx.clone(model)
    optimizer, other = (nnx.Optimizer(each, optax.adam(0.1), wrt=nnx.Param) for each in (model, theirs))
    state = sw.plan(model, optimizer).take(model, optimizer)
    for _ in range(2):
        state, loss = sw.step(train, writes=("params", "optimizer"))(state, X)
        assert np.array_equal(loss, nnx.jit(train)(theirs, other, X))
    sw.plan(model, optimizer).put(state, model, optimizer)
    assert_equal(nnx.state((model, optimizer)), nnx.state((theirs, other)))


# --- across the change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize("saved_in", [dict, nnx.State])
def test_a_checkpoint_does_not_say_which_container_it_was(
    saved_in: Any, layout: Any, container: type, tmp_path: Path
) -> None:
    block = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": True, "bias": False}}

    def planned(nest: Any) -> sw.Plan:
        tx = optax.masked(optax.adam(0.1), nest({"blocks": {0: block, 1: block}}))
        return sw.plan(Model(), optimizers={"params": tx})

    state, _ = sw.train_step(loss_of)(planned(saved_in).take(Model()), X)
    sw.save(tmp_path / "saved", state, layout=layout)
    for nest in (dict, nnx.State):
        restored, report = sw.restore(tmp_path / "saved", planned(nest).abstract())
        assert report.ok
        assert type(restored["params"]) is container
        for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            assert np.array_equal(one, other)
        moved = sw.transfer(state, planned(nest))
        assert jax.tree.all(jax.tree.map(np.array_equal, moved["params"], restored["params"]))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_other_containers_than_states_are_refused(container: type, tmp_path: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    plan = sw.plan(model)
    state = plan.take(model)
    given: Any = nnx.state(model)
    name = container.__name__
    with refused(
        sw.StructureError,
        f"The target of a restore is a state, not {name}.",
        hint="sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)",
    ):
        sw.restore(tmp_path, given)
    with refused(
        sw.StructureError,
        f"sw.transfer copies from a state, not {name}.",
        hint="sw.transfer(plan.take(model), target)",
    ):
        sw.transfer(given, plan)
    with refused(
        ModelError,
        "ArrayImpl is not a state, which holds leaves by path.",
        hint=f"an nnx.State, or a dict of arrays by path; {modes.in_mode('nnx.state(model)')} makes one of a model",
    ):
        sw.update(model, jnp.ones(3))  # type: ignore[arg-type]
    for wrong in ([jnp.ones((2, 3))], "text", {"0": {"kernel": jnp.ones((2, 3))}}):
        with pytest.raises(sw.StructureError, match="The replacement of kind 'params' does not fit the plan"):
            state.replace(params=wrong)


def test_keys_of_another_type_are_refused(container: type) -> None:
    """A file of JSON or a checkpoint of Orbax makes text of the integer keys of a list."""
    model = nnx.List([nnx.Param(jnp.ones(2))])
    state = sw.plan(model).take(model)
    with refused(
        sw.StructureError,
        "The replacement of kind 'params' does not fit the plan.",
        kind="params",
        leaves=[
            "0: Param(2,) float32  kind=params  (missing from the replacement)",
            "0: Array(2,) float32  kind=params  (not in the plan)",
        ],
        hint="jax.tree.map(function, state['params']) keeps the structure",
    ):
        state.replace(params={"0": jnp.zeros(2)})


@pytest.mark.parametrize("nest", [dict, nnx.State])
def test_a_write_to_variables_in_a_state_is_refused_in_either(nest: Any, container: type) -> None:
    model, other = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Model()
    state = sw.plan(model).take(model)
    given = nest(as_dicts(nnx.state(other, nnx.BatchStat)))

    def write(model: Any, given: Any) -> jax.Array:
        leaf = given["blocks"][0]["norm"]["mean"]
        leaf[...] = leaf[...] + 1
        return model(leaf[...])

    with pytest.raises(sw.StructureError) as caught:
        sw.step(write)(state, given)
    argument = "given" if nest is nnx.State else "given['blocks'][0]['norm']['mean']"
    assert caught.value.message.startswith(f"write writes to its argument `{argument}` (")
    (leaf,) = caught.value.leaves
    assert (leaf.path[-1], leaf.note) == ("mean" if nest is nnx.State else argument, "written")
    read = sw.step(lambda model, given: model(given["blocks"][1]["norm"]["var"][...]))(state, given)
    assert np.array_equal(read, model(jnp.ones(2)))


@pytest.mark.parametrize("nest", [dict, nnx.State])
def test_a_state_in_a_closure_is_found_in_either(nest: Any, container: type) -> None:
    model, other = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Model()
    deep = nest({"a": {"b": {"c": {"d": {"e": {"f": as_dicts(nnx.state(other, nnx.BatchStat))}}}}}})
    mean = other.blocks[0].norm.mean

    def write(model: Any) -> jax.Array:
        assert deep
        mean[...] = mean[...] + 1
        return model(mean[...])

    with pytest.raises(sw.StructureError, match=r"write writes to .*") as caught:
        sw.step(write)(sw.plan(model).take(model))
    assert any("BatchStat(2,) float32" in str(leaf) for leaf in caught.value.leaves)
