"""States that are given to another plan: of other forms of Variables they fit, all others say how the plans differ."""

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
from hints import code_of

FORMS = {"plain": {"hijax": False, "ref": False}, "hijax": {"hijax": True, "ref": False}, "ref": {"ref": True}}
ADAM = optax.adam(0.1)
X = jnp.ones((2, 3))


class Net(nnx.Module):
    """A model with a tied weight, a module with a mode, and a static attribute of any type."""

    def __init__(self, fill: float = 1.0, act: Callable[[Any], Any] = nnx.relu, **metadata: Any) -> None:
        self.kernel = nnx.Param(jnp.full((3, 3), fill), **metadata)
        self.tied = self.kernel
        self.unused = nnx.Param(jnp.zeros(3))
        self.calls = nnx.Variable(jnp.array(int(fill)))
        self.dropout = nnx.Dropout(0.5)
        self.act = act

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return self.act(x @ self.kernel[...])


def made(form: str, fill: float = 1.0) -> Net:
    with nnx.var_defaults(**FORMS[form]):
        return Net(fill)


def plan_of(model: Any, **options: Any) -> sw.Plan:
    return sw.plan(model, optimizers={"params": ADAM}, **options)


PAIRS = [(one, other) for one in FORMS for other in FORMS if one != other]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("form", "other"), PAIRS)
def test_a_state_fits_plans_of_all_forms(form: str, other: str, pack: bool) -> None:
    state, target = plan_of(made(form)).take(made(form, 2.0), pack=pack), made(other)
    plan = plan_of(target)
    assert plan is not state.plan
    plan.put(state, target)
    built = plan.build(state)
    for model in (target, built):
        np.testing.assert_array_equal(model.kernel[...], 2.0)
        assert int(model.calls[...]) == 2
        assert model.tied is model.kernel
        assert (model.kernel.hijax, model.kernel.ref) == (target.kernel.hijax, target.kernel.ref)
    assert bool(state.tables.packing) == pack


@pytest.mark.parametrize(("form", "other"), PAIRS)
def test_states_of_all_forms_are_members_of_one_ensemble(form: str, other: str) -> None:
    plan = plan_of(made(form))
    ensemble = plan.stack([plan.take(made(form, 1.0)), plan_of(made(other)).take(made(other, 2.0))])
    assert ensemble.plan is plan.stacked(2)
    np.testing.assert_array_equal(ensemble["params"]["kernel"][:, 0, 0], [1.0, 2.0])
    assert plan_of(made(other)).stacked(2).stack(ensemble).plan is plan_of(made(other)).stacked(2)
    batch = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[plan.take(made(form))] * 2)
    assert plan_of(made(other)).stacked(2).stack(batch).plan is plan_of(made(other)).stacked(2)


@pytest.mark.parametrize(("form", "other"), PAIRS)
def test_a_compiled_step_takes_states_of_all_forms(form: str, other: str) -> None:
    @sw.step(writes="variables")
    def call(model: Any, x: Any) -> Any:
        return model(x)

    plan, given = plan_of(made(form)), plan_of(made(other)).take(made(other, 2.0))
    state, out = call.lower(plan.abstract(), X).compile()(given, X)
    np.testing.assert_array_equal(out, 6.0)
    assert int(state["variables"]["calls"]) == 3
    np.testing.assert_array_equal(plan.build(state).kernel[...], 2.0)


@pytest.mark.parametrize(("form", "other"), PAIRS)
def test_a_layer_may_come_back_in_another_form(form: str, other: str) -> None:
    plan, of_layer = sw.plan(made(form)), sw.plan(made(other))
    states = jax.tree.map(lambda *arrays: jnp.stack(arrays), *[plan.take(made(form, fill)) for fill in (1.0, 2.0)])
    after, out = sw.scan_layers(
        lambda layer, x: (sw.transfer(layer, of_layer), x + layer["params"]["kernel"]), states, jnp.ones((3, 3))
    )
    assert after.plan is plan
    np.testing.assert_array_equal(out, jnp.full((3, 3), 4.0))


# --- all else in which two plans of equal leaves differ ------------------------------------------------------------


def evaluating() -> Net:
    model = Net()
    model.eval(graph=True)
    return model


def of_frozen(model: Any) -> sw.Plan:
    return (sw.Kinds.standard() | sw.Kinds(variables=sw.Kind(sw.Exactly(nnx.Variable), frozen=True))).plan(
        model, optimizers={"params": ADAM}
    )


class Other(Net):
    pass


EMA = sw.EMA(0.9)
DIFFERENT: dict[str, tuple[Callable[[], sw.Plan], str]] = {
    "optimizer": (
        lambda: sw.plan(Net(), optimizers={"params": optax.adam(0.1)}),
        "the optimizer of 'params', which is another object",
    ),
    "mode": (
        lambda: plan_of(evaluating()),
        "dropout/deterministic: False in the plan, True in the state",
    ),
    "function": (lambda: plan_of(Net(act=jnp.abs)), "act: "),
    "class": (lambda: plan_of(Other()), "Other'> in the state"),
    "declaration": (lambda: of_frozen(Net()), "the declaration of the kind 'variables'"),
    "another kind": (
        lambda: sw.Kinds(params=sw.Kind(nnx.Param), variables=sw.Kind(...)).plan(Net(), optimizers={"params": ADAM}),
        "the kind 'cache', which the state does not have",
    ),
    "metadata": (lambda: plan_of(Net(note="mine")), "kernel: Param(3, 3) float32  kind=params"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_and_the_hint_is_followed(name: str) -> None:
    make, note = DIFFERENT[name]
    model, plan, state = (
        Net(0.0),
        plan_of(Net()),
        make().take({"mode": evaluating, "class": Other, "function": lambda: Net(act=jnp.abs)}.get(name, Net)()),
    )
    for verb in (lambda: plan.put(state, model), lambda: plan.build(state)):
        with pytest.raises(sw.StructureError, match="This state is of another plan") as caught:
            verb()
        assert note in str(caught.value)
        scope = {"plan": plan, "state": state, "model": model, "sw": sw}
        built = eval(code_of(caught.value), scope)
        np.testing.assert_array_equal((built or model).kernel[...], 1.0)
