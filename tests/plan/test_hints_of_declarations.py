"""Hints that say what to declare keep what was declared: pasted, they lead on, and to no second rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw

SPACE = {"sw": sw, "nnx": nnx, "jax": jax, "jnp": jnp, "dataclasses": dataclasses, "optax": optax}
KEY = jax.random.key(0)


class Adapter(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(2, 2, rngs=rngs)
        self.down = nnx.LoRAParam(jax.random.normal(rngs(), (3, 2, 4)))
        self.up = nnx.LoRAParam(jnp.zeros((3, 4, 2)))
        self.calls = nnx.Variable(jnp.array(0))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        h = self.drop(self.base(x) + x @ self.down[...] @ self.up[...])
        self.h = nnx.Intermediate(h)
        return h


def pasted(hint: str, **names: Any) -> dict[str, Any]:
    space = SPACE | names
    exec(hint, space)
    return space


def test_a_restart_to_declare_makes_no_adapter_of_zeros() -> None:
    plan = sw.plan(Adapter())
    with pytest.raises(sw.DeclarationError) as caught:
        plan.take(Adapter()).restart("lora", key=KEY)
    plan = pasted(caught.value.hint, plan=plan)["kinds"].plan(Adapter())
    with pytest.raises(sw.DeclarationError, match="does not declare a batch_axis") as caught:
        plan.take(Adapter()).restart("lora", where=[1], key=KEY)
    plan = pasted(caught.value.hint, plan=plan)["kinds"].plan(Adapter())
    state = plan.take(Adapter()).restart("lora", where=[1], key=KEY)
    assert state["lora"]["down"][1].any()
    assert not sw.lint(plan)


def test_a_restart_to_declare_of_random_streams_and_of_others() -> None:
    plan = sw.plan(Adapter())
    for kind, given in (("rng", {"key": KEY}), ("variables", {})):
        with pytest.raises(sw.DeclarationError) as caught:
            plan.take(Adapter()).restart(kind, **given)
        plan = pasted(caught.value.hint, plan=plan)["kinds"].plan(Adapter())
        old = sw.plan(Adapter()).take(Adapter())["rng"]["drop"]["rngs"]
        state = plan.take(Adapter()).restart(kind, **given)
        fresh = state["rng"]["drop"]["rngs"]
        assert (fresh["key"] == old["key"]) == (kind == "variables")
    assert plan.kinds["variables"].of == sw.Kinds.standard()["variables"].of


def test_one_value_for_all_slots_is_not_given_a_batch_axis() -> None:
    kinds = sw.Kinds.standard() | sw.Kinds(
        lora=sw.Kind(nnx.LoRAParam, restart=lambda array, key: jax.random.normal(key, array.shape), batch_axis=0),
        counts=sw.Kind(sw.Path("calls"), restart=jnp.zeros_like),
    )
    state, x = kinds.plan(Adapter()).take(Adapter()), [1]
    with pytest.raises(sw.DeclarationError, match="one value for all slots") as caught:
        state.restart("lora", "counts", where=x, key=KEY)
    assert caught.value.hint == (
        "state.restart('lora', where=where)  # and 'counts' keeps its value\n"
        "or all slots: state.restart('lora', 'counts')"
    )
    assert [leaf.path for leaf in caught.value.leaves] == [("calls",)]
    with pytest.raises(sw.DeclarationError, match="one value for all slots") as caught:
        state.restart("counts", where=x)
    assert caught.value.hint == "all slots: state.restart('counts')"


def test_a_decorator_to_write_keeps_its_other_options() -> None:
    model = Adapter()
    plan = sw.plan(model, optimizers={"lora": optax.sgd(0.1), "params": optax.sgd(0.1)})
    x = jnp.ones((3, 4, 2))

    @sw.step(capture="intermediates", static_argnames=("n",))
    def run(model: Any, x: Any, n: int) -> Any:
        return model(x) * n

    with pytest.raises(sw.UndeclaredWriteError) as caught:
        run(plan.take(model), x, n=2)
    hint = caught.value.hint.splitlines()[0]
    assert hint == "@sw.step(writes=('rng', 'variables'), capture='intermediates', static_argnames='n')"
    _, (_, captured) = eval(hint[1:], SPACE)(run.fn)(plan.take(model), x, n=2)
    assert captured["h"].shape == (3, 4, 2)

    @sw.train_step(wrt="lora", writes=(), has_aux=True, capture="intermediates", compiler_options={})
    def train(model: Any, x: Any) -> Any:
        return (model(x) ** 2).mean(), x

    with pytest.raises(sw.UndeclaredWriteError) as caught:
        train(plan.take(model), x)
    hint = caught.value.hint.splitlines()[0]
    assert hint == (
        "@sw.train_step(writes=('rng', 'variables'), wrt='lora', has_aux=True, capture='intermediates', "
        "compiler_options={})"
    )
    _, ((_, aux), captured) = eval(hint[1:], SPACE)(train.fn)(plan.take(model), x)
    assert aux.shape == captured["h"].shape == x.shape


def test_objects_that_kinds_call_by_name_are_to_be_named() -> None:
    kinds = sw.Kinds(
        policy=sw.Kind(nnx.Param & sw.Path("policy/**")),
        reference=sw.Kind(nnx.Param & sw.Path("reference/**"), frozen=True),
    )
    policy, reference = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1))
    with pytest.raises(sw.DeclarationError) as caught:
        kinds.plan(policy, reference)
    line = caught.value.hint.splitlines()[0]
    assert (
        line == "kinds.plan(policy=policy, reference=reference)  # all objects by name: paths then begin with the name"
    )
    plan = eval(line, {"kinds": kinds, "policy": policy, "reference": reference})
    assert [len(plan[name]) for name in kinds] == [2, 2]


def test_a_body_that_updates_its_own_optimizer_is_a_step() -> None:
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def body(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    plan = sw.plan(model, optimizer)
    with pytest.raises(sw.DeclarationError, match="the plan has no optimizer") as caught:
        sw.train_step(body)(plan.take(model, optimizer), jnp.ones((1, 2)))
    first, second = caught.value.hint.splitlines()
    assert second.startswith("or, if it only returns the loss: plan = kinds.plan(model, optimizers=")
    step = eval(first.partition("  #")[0][1:], SPACE)(body)
    state, _ = step(plan.take(model, optimizer), jnp.ones((1, 2)))
    assert all(array.any() for array in jax.tree.leaves(state["params"]))
