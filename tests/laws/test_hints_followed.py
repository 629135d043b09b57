"""Hints are followed: the program fails, the code of its hint is applied, and it goes through with the right value.

Filters, kinds, plans, steps, averages and restarts; what is stored or laid out is in test_hints_followed_stored.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from following import decorated, hint_of, options, run, value

X, Y = jnp.arange(8.0).reshape(4, 2) / 8, jnp.ones((4, 3))
ADAM = optax.adam(1e-2)


def linear() -> nnx.Linear:
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def norm() -> nnx.BatchNorm:
    return nnx.BatchNorm(2, rngs=nnx.Rngs(0))


def loss_of(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


def trained() -> tuple[sw.State, jax.Array]:
    """A step of NNX by hand, which every followed train step has to give."""
    model = linear()
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    loss, grads = nnx.value_and_grad(loss_of)(model, X, Y)
    optimizer.update(model, grads)
    return sw.plan(model).take(model), loss


def is_trained(step: Any, plan: sw.Plan, *args: Any) -> None:
    state, loss = step(plan.take(linear()), *(args or (X, Y)))
    wanted, its_loss = trained()
    np.testing.assert_allclose(loss, its_loss, rtol=1e-6)
    for path in ("kernel", "bias"):
        np.testing.assert_allclose(state["params"][path], wanted["params"][path], rtol=1e-5)


def claimed(model: Any, filter: Any) -> list[str]:
    plan = sw.Kinds(it=sw.Kind(filter), rest=sw.Kind(...)).plan(model)
    return ["/".join(map(str, leaf.path)) for leaf in plan.leaves if leaf.kind == "it"]


# --- filters ---------------------------------------------------------------------------------------------------------


def test_a_path_with_an_empty_segment() -> None:
    fixed = value(hint_of(sw.FilterError, lambda: sw.Path("layers//kernel")))
    assert claimed(nnx.Dict(layers=linear()), fixed) == ["layers/kernel"]


def test_exactly_is_given_an_object() -> None:
    fixed = value(hint_of(sw.FilterError, lambda: sw.Exactly(nnx.Param(jnp.ones(2)))))  # type: ignore[arg-type]
    assert fixed == sw.Exactly(nnx.Param)


def test_a_set_of_filters() -> None:
    code = hint_of(sw.FilterError, lambda: sw.Kind({nnx.Param, nnx.Cache}))  # type: ignore[arg-type]
    assert sw.Kinds(all=sw.Kind(value(code))).plan(linear()).leaves[0].kind == "all"


def test_where_of_a_function_with_one_argument() -> None:
    code = hint_of(sw.FilterError, lambda: sw.Where(lambda path: True))
    assert claimed(linear(), value(code.replace("...", "True"))) == ["bias", "kernel"]


# --- kinds -----------------------------------------------------------------------------------------------------------


def test_leaves_that_no_kind_claims() -> None:
    kinds = sw.Kinds(stats=sw.Kind(nnx.BatchStat))
    scope = run(hint_of(sw.UnclaimedError, lambda: kinds.plan(norm())), kinds=kinds)
    assert {leaf.kind for leaf in scope["kinds"].plan(norm()).leaves} == {"stats", "param_kind"}


def test_leaves_that_two_kinds_claim() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), lora=sw.Kind(nnx.LoRAParam))
    model = nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0))
    scope = run(hint_of(sw.OverlapError, lambda: kinds.plan(model)), kinds=kinds)
    assert [leaf.kind for leaf in scope["kinds"].plan(model).leaves] == ["lora", "lora"]


def test_a_kind_that_restarts_without_a_way_to() -> None:
    fixed = value(hint_of(sw.DeclarationError, lambda: sw.Kind(nnx.Cache, missing="restart")))
    state = sw.Kinds(cache=fixed).plan(model := nnx.Dict(c=nnx.Cache(jnp.ones(2)))).take(model)
    np.testing.assert_array_equal(state.restart("cache")["cache"]["c"], 0)


def test_missing_is_none_of_its_words() -> None:
    given: dict[str, Any] = {"missing": "maybe"}
    given |= options(hint_of(sw.DeclarationError, lambda: sw.Kind(nnx.Param, **given)))
    assert sw.Kind(nnx.Param, **given) == sw.Kind(nnx.Param)


def test_a_filter_where_a_kind_belongs() -> None:
    fixed = value(hint_of(sw.DeclarationError, lambda: sw.Kinds(params=nnx.Param)))  # type: ignore[arg-type]
    assert [leaf.kind for leaf in fixed.plan(linear()).leaves] == ["params", "params"]


def test_a_placement_that_is_a_tuple() -> None:
    given: dict[str, Any] = {"placement": (None, "data")}
    given |= options(hint_of(sw.DeclarationError, lambda: sw.Kind(nnx.Param, **given)))
    assert given["placement"] == sw.Sharded(None, "data")


def test_a_path_that_is_nearly_there() -> None:
    kinds = sw.Kinds(heads=sw.Kind(sw.Path("hed/**")), rest=sw.Kind(...))
    model = nnx.Dict(head=linear())
    code = hint_of(sw.DeclarationError, lambda: kinds.plan(model))
    plan = run(code, kinds=kinds)["kinds"].plan(model)
    assert {leaf.kind for leaf in plan.leaves} == {"heads"}


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_model_of_another_shape() -> None:
    plan, model = sw.plan(linear()), nnx.Linear(2, 4, rngs=nnx.Rngs(0))
    code = hint_of(sw.StructureError, lambda: plan.take(model))
    again = run(code, kinds=sw.Kinds.standard(), model=model)["plan"]
    np.testing.assert_array_equal(again.take(model)["params"]["kernel"], model.kernel[...])


def test_an_optimizer_for_no_kind() -> None:
    given: Any = ADAM
    code = hint_of(sw.DeclarationError, lambda: sw.plan(linear(), optimizers={0: given}))  # type: ignore[dict-item]
    assert list(sw.plan(linear(), **options(code)).kinds) == list(PLAN.kinds)


def test_a_class_in_the_place_of_a_model() -> None:
    code = hint_of(sw.StructureError, lambda: sw.plan(nnx.Linear))
    model = run(code.replace("...", "2, 3"), Linear=nnx.Linear)["model"]
    assert [leaf.path for leaf in sw.plan(model).leaves] == [("bias",), ("kernel",)]


def test_a_state_where_its_model_belongs() -> None:
    plan = sw.plan(model := linear())
    state = plan.take(model)
    code = hint_of(sw.StructureError, lambda: plan.put(model, state), "put")  # type: ignore[arg-type]
    fresh = nnx.Linear(2, 3, rngs=nnx.Rngs(7))
    run(code, plan=plan, state=state, model=fresh)
    np.testing.assert_array_equal(fresh.kernel[...], model.kernel[...])


def test_named_objects_by_another_name() -> None:
    plan = sw.Kinds.standard().plan(policy=linear(), reference=linear())
    policy, reference = linear(), linear()
    code = hint_of(sw.StructureError, lambda: plan.take(policy=policy, other=reference))
    state = value(code, plan=plan, policy=policy, reference=reference)
    np.testing.assert_array_equal(state["params"]["reference"]["kernel"], reference.kernel[...])


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_write_that_is_not_declared() -> None:
    def forward(model: Any, x: jax.Array) -> Any:
        return model(x)

    plan = sw.plan(norm())
    code = hint_of(sw.UndeclaredWriteError, lambda: sw.step(forward)(plan.take(norm()), X), "@")
    state, out = decorated(code, forward)(plan.take(norm()), X)
    model = norm()
    np.testing.assert_allclose(out, model(X), rtol=1e-6)
    np.testing.assert_allclose(state["stats"]["mean"], model.mean[...], rtol=1e-6)


def test_a_write_by_a_function_that_only_evaluates() -> None:
    def forward(model: Any, x: jax.Array, first: str = "") -> Any:
        exec(first, {"model": model})
        return model(x)

    plan = sw.plan(norm())
    code = hint_of(sw.UndeclaredWriteError, lambda: sw.step(forward)(plan.take(norm()), X), "eval")
    out = sw.step(lambda model, x: forward(model, x, code))(plan.take(norm()), X)
    model = norm()
    model.eval()
    np.testing.assert_allclose(out, model(X), rtol=1e-6)


PLAN = sw.plan(linear(), optimizers={"params": ADAM})


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("loss = (model(x) - y) ** 2", "return loss"),
        ("loss = jnp.mean((model(x) - y) ** 2) + 0j", "return loss"),
    ],
)
def test_a_loss_that_is_none(body: str, wrong: str) -> None:
    def step(last: str) -> Any:
        return sw.train_step(run(f"def f(model, x, y):\n    {body}\n    {last}")["f"])

    right = hint_of(sw.StructureError, lambda: step(wrong)(PLAN.take(linear()), X, Y), "return")
    is_trained(step(right), PLAN)


def test_a_loss_with_more_beside_it() -> None:
    def loss(model: Any, x: jax.Array, y: jax.Array) -> Any:
        return loss_of(model, x, y), model(x)

    code = hint_of(sw.StructureError, lambda: sw.train_step(loss)(PLAN.take(linear()), X, Y), "@")
    _, (value_, out) = decorated(code, loss)(PLAN.take(linear()), X, Y)
    np.testing.assert_allclose(value_, trained()[1], rtol=1e-6)
    np.testing.assert_allclose(out, linear()(X), rtol=1e-6)


def test_has_aux_without_it() -> None:
    def step(last: str) -> Any:
        body = f"logits = model(x)\n    loss = jnp.mean((logits - y) ** 2)\n    {last}"
        return sw.train_step(run(f"def f(model, x, y):\n    {body}")["f"], has_aux=True)

    code = hint_of(sw.StructureError, lambda: step("return loss")(PLAN.take(linear()), X, Y))
    _, (loss, aux) = step(code)(PLAN.take(linear()), X, Y)
    np.testing.assert_allclose(loss, trained()[1], rtol=1e-6)
    np.testing.assert_allclose(aux["logits"], linear()(X), rtol=1e-6)


def test_wrt_is_a_type() -> None:
    given: dict[str, Any] = {"wrt": nnx.Param}
    given |= options(hint_of(sw.DeclarationError, lambda: sw.train_step(loss_of, **given), "wrt"))
    is_trained(sw.train_step(loss_of, **given), PLAN)


def test_wrt_is_empty() -> None:
    code = hint_of(sw.DeclarationError, lambda: sw.train_step(loss_of, wrt=())(PLAN.take(linear()), X, Y), "wrt")
    is_trained(sw.train_step(loss_of, **options(code)), PLAN)


def test_a_plan_without_an_optimizer() -> None:
    train, model = sw.train_step(loss_of), linear()
    code = hint_of(sw.DeclarationError, lambda: train(sw.plan(model).take(model), X, Y))
    plan = run(code.replace("adamw(3e-4)", "adam(1e-2)"), kinds=sw.Kinds.standard(), model=model)["plan"]
    is_trained(train, plan)


def test_a_step_that_is_given_a_model() -> None:
    step, model = sw.step(lambda model, x: model(x)), linear()
    code = hint_of(sw.StructureError, lambda: step(model, X))
    state, call = code.splitlines()
    scope = run(state, plan=sw.plan(model), model=model)
    np.testing.assert_allclose(value(call.replace("...", "x"), **scope, step=step, x=X), model(X), rtol=1e-6)


def test_a_step_of_a_lambda_is_called_step_in_its_hints() -> None:
    plan = sw.plan(linear())
    compiled = sw.step(lambda model, x: model(x)).lower(plan.abstract(), X).compile()
    other = sw.plan(model := nnx.Linear(2, 4, rngs=nnx.Rngs(0)))
    state = other.take(model)
    code = hint_of(sw.StructureError, lambda: compiled(state, X))
    again = value(code.replace("...", "x"), step=sw.step(lambda model, x: model(x)), state=state, x=X)
    np.testing.assert_allclose(again(state, X), model(X), rtol=1e-6)


def test_a_function_that_takes_too_little() -> None:
    model = linear()
    plan = sw.plan(model, optimizer := nnx.Optimizer(model, ADAM, wrt=nnx.Param))
    code = hint_of(sw.StructureError, lambda: sw.step(lambda model, x: model(x))(plan.take(model, optimizer), X))
    fn = run(code.replace("...", "return model(x)"))["f"]
    np.testing.assert_allclose(sw.step(fn)(plan.take(model, optimizer), X), model(X), rtol=1e-6)


def test_a_step_made_of_a_model() -> None:
    fn = run(hint_of(sw.StructureError, lambda: sw.step(linear())))["f"]
    np.testing.assert_allclose(fn(sw.plan(linear()).take(linear()), X), linear()(X), rtol=1e-6)


def test_a_step_of_a_compiled_function() -> None:
    @jax.jit
    def forward(model: Any, x: jax.Array) -> Any:
        return model(x)

    code = hint_of(sw.StructureError, lambda: sw.step(forward))
    step = value(code, forward=forward.__wrapped__)
    np.testing.assert_allclose(step(sw.plan(linear()).take(linear()), X), linear()(X), rtol=1e-6)


def test_a_state_that_is_used_twice() -> None:
    train, state = sw.train_step(loss_of), PLAN.take(linear())
    train(state, X, Y)
    code = hint_of(sw.StructureError, lambda: train(state, X, Y), "state, out")
    scope = {"step": train, "state": PLAN.take(linear()), "x": X, "y": Y}
    for _ in range(2):
        scope = run(code.replace("...", "x, y"), **scope)
    assert scope["out"] < trained()[1]


def test_a_copy_is_kept_of_a_state() -> None:
    train, state = sw.train_step(loss_of), PLAN.take(linear())
    train(state, X, Y)
    code = hint_of(sw.StructureError, lambda: train(state, X, Y), "copy")
    state = PLAN.take(linear())
    kept = run(code, state=state)["kept"]
    _, first = train(state, X, Y)
    _, again = train(kept, X, Y)
    assert first == again


# --- averages, casts and restarts ------------------------------------------------------------------------------------


def test_an_average_that_decays_by_nothing() -> None:
    for wrong in (1.5, "0.9", lambda n: "x"):
        code = hint_of(sw.DeclarationError, lambda wrong=wrong: sw.plan(linear(), averages={"params": sw.EMA(wrong)}))  # type: ignore[misc]
        plan = sw.plan(linear(), averages={"params": value(code)})
        assert "ema" in plan.kinds


def test_an_average_by_another_name() -> None:
    plan = sw.plan(linear(), averages={"params": sw.EMA(0.9)})
    with pytest.raises(sw.DeclarationError) as caught:
        plan.take(linear()).with_averages("average")
    used = plan.take(linear()).with_averages((caught.value.hint or "").removeprefix("one of: "))
    np.testing.assert_array_equal(used["params"]["kernel"], linear().kernel[...])


def test_a_cast_to_no_dtype() -> None:
    state = sw.plan(linear()).take(linear())
    code = hint_of(sw.DeclarationError, lambda: state.cast(params="bfloat17"))
    assert eval(f"state.{code}", {"state": state})["params"]["kernel"].dtype == jnp.bfloat16


def test_a_kind_that_cannot_restart() -> None:
    model = nnx.Dict(c=nnx.Cache(jnp.ones(2)))
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache))
    plan = kinds.plan(model)
    code = hint_of(sw.DeclarationError, lambda: plan.take(model).restart("cache"))
    fixed = run(code, plan=plan)["kinds"].plan(model)
    np.testing.assert_array_equal(fixed.take(model).restart("cache")["cache"]["c"], 0)


def test_a_restart_without_its_key() -> None:
    kind = sw.Kind(nnx.Param, restart=lambda array, key: jax.random.normal(key, array.shape, array.dtype))
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    state = sw.Kinds(params=kind).plan(model).take(model)
    code = hint_of(sw.DeclarationError, lambda: state.restart("params"), "key")
    again = value(code.replace("...", "'params'"), state=state)
    assert jnp.all(again["params"]["w"] != 1)
