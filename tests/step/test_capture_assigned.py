"""What a function assigns is captured as what it sows is; uncaptured it is refused, with the hint that helps."""

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
from hints import parses
from refusals import refused


class Loss(nnx.Variable):
    """As flax's own VAE has it."""


class Aux(nnx.Intermediate):
    """The same, derived from the type that `sow` uses."""


KINDS = sw.Kinds.standard() | sw.Kinds(losses=sw.Kind(Loss, saved=False))
X = jax.random.normal(jax.random.key(0), (3, 4))


class Vae(nnx.Module):
    def __init__(self, cls: Any = Loss) -> None:
        self.encoder = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        # No nnx.List: flax 0.12.8 sorts its keys with what nnx.capture puts there, and fails under nnx.remat.
        self.by_name, self.by_place, self.held = nnx.Dict(), nnx.data([]), nnx.data({})
        self.cls = cls

    def __call__(self, x: Any) -> Any:
        h = self.encoder(x)
        self.kl_loss = self.cls((h**2).mean())
        self.by_name.a = self.cls({"sum": h.sum(), "h": h})
        self.held["b"] = self.cls(h.min())
        if self.by_place:
            self.by_place[0] = self.cls(h.max())
        else:
            self.by_place.append(self.cls(h.max()))
        return nnx.tanh(h)


def loss_of(model: Any, x: Any) -> Any:
    out = model(x)
    return ((out - x) ** 2).mean() + 3 * model.kl_loss.get_value()


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(("cls", "kind"), [(Loss, "losses"), (Aux, "intermediates")])
@pytest.mark.parametrize("wrap", [lambda fn: fn, nnx.remat, nnx.jit], ids=["", "remat", "jit"])
def test_what_is_assigned_is_handed_out(wrap: Any, cls: Any, kind: str, called_before: bool) -> None:
    model, plain = Vae(cls), Vae(cls)
    if called_before:
        model(X + 1)
    out = plain(X)
    plan = KINDS.plan(model)
    state = plan.take(model)
    found, captured = sw.step(wrap(lambda model, x: model(x)), capture=kind)(state, X)
    np.testing.assert_allclose(found, out, rtol=1e-6)
    np.testing.assert_allclose(captured["kl_loss"], plain.kl_loss.get_value(), rtol=1e-6)
    np.testing.assert_allclose(captured["by_name"]["a"]["h"], plain.by_name.a.get_value()["h"], rtol=1e-6)
    np.testing.assert_allclose(captured["by_place"][0], plain.by_place[0].get_value(), rtol=1e-6)
    np.testing.assert_allclose(captured["held"]["b"], plain.held["b"].get_value(), rtol=1e-6)
    assert set(captured) == {"kl_loss", "by_name", "by_place", "held"}
    plan.put(state, model)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(("cls", "kind"), [(Loss, "losses"), (Aux, "intermediates")])
def test_gradients_flow_through_it(cls: Any, kind: str, called_before: bool) -> None:
    model, plain = Vae(cls), Vae(cls)
    if called_before:
        model(X)
    state = KINDS.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    state, (loss, captured) = sw.train_step(loss_of, capture=kind)(state, X)
    (expected, grads) = nnx.value_and_grad(loss_of)(plain, X)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(
        state["params"]["encoder"]["kernel"],
        plain.encoder.kernel[...] - 0.1 * grads["encoder"]["kernel"][...],
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(captured["kl_loss"], plain.kl_loss.get_value(), rtol=1e-6)


def test_an_older_one_of_any_ephemeral_type_is_replaced() -> None:
    """The kind decides, not the type: the state goes on with what it had, and keeps its structure."""
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), loss=Loss(jnp.zeros(2)))

    def run(model: Any) -> None:
        model.loss = Loss(model.w[...].sum())  # of another shape, too

    state = KINDS.plan(model).take(model)
    _, captured = sw.step(run, capture="losses")(state)
    assert float(captured["loss"]) == 2.0
    assert state["losses"]["loss"].shape == (2,)


def test_several_objects() -> None:
    one, other = Vae(), Vae()
    one(X)
    plan = KINDS.plan(one, other)
    step = sw.step(lambda one, other, x: other(one(x)), capture="losses")
    _, captured = step(plan.take(one, other), X)
    np.testing.assert_allclose(captured[0]["kl_loss"], one.kl_loss.get_value(), rtol=1e-6)
    assert set(captured) == {0, 1}


# --- refused ---------------------------------------------------------------------------------------------------------

CAPTURE = "capture='losses'  # in the step's decorator: returns what is sown or assigned beside the output"


class Small(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(2))

    def __call__(self) -> Any:
        self.kl_loss = Loss(self.w[...].sum())
        return self.w[...]


def called(model: Any) -> Any:
    model()
    return model


def run(model: Any) -> Any:
    return model()


MESSAGE = "run changes which Variables the model has; a state cannot take new ones."
REPLACED = "assign values, not Variables: self.count[...] = self.count[...] + 1"


@pytest.mark.parametrize(
    ("make", "kinds", "leaf", "hint"),
    [
        (Small, KINDS, "kl_loss: Loss() float32  (made by the function)", CAPTURE),
        (
            lambda: called(Small()),
            KINDS,
            "kl_loss: Loss() float32  kind=losses  (replaced by another Variable)",
            CAPTURE,
        ),
        (
            Small,
            sw.Kinds.standard(),
            "kl_loss: Loss() float32  (made by the function)",
            "kinds = kinds | sw.Kinds(loss=sw.Kind(Loss, saved=False))\ncapture='loss'  # in the step's decorator",
        ),
        (
            lambda: called(Small()),
            sw.Kinds.standard(),
            "kl_loss: Loss() float32  kind=variables  (replaced by another Variable)",
            f"{REPLACED}\nor, kinds = kinds | sw.Kinds(loss=sw.Kind(Loss, saved=False))\n"
            "capture='loss'  # in the step's decorator",
        ),
        (
            lambda: called(Small()),
            sw.Kinds(params=sw.Kind(nnx.Param), loss=sw.Kind(Loss)),
            "kl_loss: Loss() float32  kind=loss  (replaced by another Variable)",
            f"{REPLACED}\nor, kinds = kinds.replace(loss=dataclasses.replace(kinds['loss'], saved=False))\n"
            "capture='loss'  # in the step's decorator",
        ),
        (
            lambda: called(Small()),
            sw.Kinds(all=sw.Kind(nnx.Variable)),
            "kl_loss: Loss() float32  kind=all  (replaced by another Variable)",
            f"{REPLACED}\n"
            "or, kinds = kinds.replace(all=dataclasses.replace(kinds['all'], "
            "of=nnx.All(kinds['all'].of, nnx.Not(Loss))))"
            " | sw.Kinds(loss=sw.Kind(Loss, saved=False))\ncapture='loss'  # in the step's decorator",
        ),
    ],
)
def test_uncaptured_the_hint_is_the_declaration_that_lets_it_through(
    make: Any, kinds: sw.Kinds, leaf: str, hint: str
) -> None:
    model = make()
    with refused(sw.StructureError, MESSAGE, leaves=[leaf], hint=hint) as caught:
        sw.step(run)(kinds.plan(model).take(model))
    assert caught.value.hint
    parses(caught.value.hint)
    scope: dict[str, Any] = {"sw": sw, "nnx": nnx, "dataclasses": dataclasses, "kinds": kinds, "Loss": Loss}
    for line in hint.splitlines():
        if not line.startswith("assign"):
            exec(line.removeprefix("or, "), scope)
    _, captured = sw.step(run, capture=scope["capture"])(scope["kinds"].plan(model).take(model))
    assert float(captured["kl_loss"]) == 2.0


def test_popped_by_the_function_it_needs_no_capture() -> None:
    def loss(model: Any) -> Any:
        model()
        return sum(jax.tree.leaves(nnx.pop(model, Loss)), jnp.zeros(()))

    model = Small()
    state = KINDS.plan(model, optimizers={"params": optax.sgd(0.5)}).take(model)
    with refused(
        sw.StructureError,
        "The function pops leaves of a captured kind ('losses'); nnx.capture does not let it.",
        kind="losses",
        hint="take capture= out of the step's decorator: a function that pops its own leaves needs none\n"
        "or, read the Variables instead: model.loss.get_value()",
    ):
        sw.train_step(loss, capture="losses")(state)
    state, value = sw.train_step(loss)(state)
    assert (float(value), state["params"]["w"].tolist()) == (2.0, [0.5, 0.5])

    for hijax in (False, True):
        with nnx.var_defaults(hijax=hijax, ref=False):
            model = called(Small())
        plan = KINDS.plan(model, optimizers={"params": optax.sgd(0.5)})
        with pytest.raises(sw.StructureError, match=r"kl_loss: .*\(removed\)") as caught:
            sw.train_step(loss)(plan.take(model))
        parses(caught.value.hint)
        assert ("nnx.pop does not find hijax Variables" in str(caught.value.hint)) == hijax
        exec(caught.value.hint or "", {"nnx": nnx, "sw": sw, "Loss": Loss, "model": model})
        plan = KINDS.plan(model, optimizers={"params": optax.sgd(0.5)})
        assert float(sw.train_step(loss)(plan.take(model))[1]) == 2.0


def test_one_name_both_sown_and_assigned() -> None:
    def both(model: Any) -> None:
        model.x = Aux(jnp.ones(2))
        model.sow(Aux, "x", jnp.zeros(2))

    with refused(
        sw.StructureError,
        "The function sows under a name to which it also assigns a Variable.",
        leaves=["x: Aux- -"],
        hint="self.sow(nnx.Intermediate, 'another_name', value)",
    ):
        sw.step(both, capture="intermediates")(sw.plan(Small()).take(Small()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sown_onto_what_an_earlier_call_left() -> None:
    class Sower(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self) -> Any:
            self.sow(Loss, "loss", self.w[...].sum())

    model = called(Sower())
    state = KINDS.plan(model).take(model)
    with pytest.raises(sw.StructureError, match="changes the shape or dtype of leaves") as caught:
        sw.step(run)(state)
    assert (caught.value.hint or "").startswith("capture='losses'  # in the step's decorator, where it is sown\nor, ")
    _, captured = sw.step(run, capture="losses")(state)
    assert float(captured["loss"][0]) == 2.0


# --- model.eval() as a hint ------------------------------------------------------------------------------------------


def refusal(fn: Any, model: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(fn, **options)(sw.plan(model).take(model), *args)
    parses(caught.value.hint)
    return caught.value.hint or ""


def test_eval_is_offered_where_it_helps_and_nowhere_else() -> None:
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    rnn = nnx.RNN(nnx.LSTMCell(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    both = nnx.Dict(norm=norm, rnn=rnn)

    def all_of(model: Any, x: Any) -> Any:
        return model.rnn(model.norm(x)[None])

    helps = "or, if the function only evaluates: model.eval() as its first line"
    assert refusal(lambda model, x: model(x), norm, X) == f"@sw.step(writes=('stats',))\n{helps}"
    assert refusal(lambda model, x: model(x), rnn, X[None]) == "@sw.step(writes=('rng',))"
    assert refusal(all_of, both, X) == f"@sw.step(writes=('stats', 'rng'))\n{helps}, and @sw.step(writes=('rng',))"

    def evaluated(model: Any, x: Any) -> Any:
        model.eval()
        return all_of(model, x)

    assert refusal(evaluated, both, X) == "@sw.step(writes=('rng',))"
    sw.step(evaluated, writes="rng")(sw.plan(both).take(both), X)


def test_eval_is_not_offered_where_the_function_then_fails() -> None:
    def trains(model: Any, x: Any) -> Any:
        assert not model.use_running_average, "only for training"
        return model(x)

    assert refusal(trains, nnx.BatchNorm(4, rngs=nnx.Rngs(0)), X) == "@sw.step(writes=('stats',))"


def test_what_is_sown_and_not_captured_names_the_kind_that_would_catch_it() -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

    def sow(model: Sowing) -> None:
        model.seen = nnx.Intermediate((model.w[...],))

    params, inter = sw.Kind(nnx.Param), sw.Kind(nnx.Intermediate, saved=False)
    for kinds, hint in (
        (sw.Kinds(params=params, inter=inter), "capture='inter'  # in the step's decorator: "),
        (
            sw.Kinds(params=params),
            "kinds = kinds | sw.Kinds(sown=sw.Kind(nnx.Intermediate, saved=False))",
        ),
    ):
        with pytest.raises(sw.StructureError) as caught:
            sw.step(sow)(kinds.plan(Sowing()).take(Sowing()))
        assert (caught.value.hint or "").startswith(hint)
