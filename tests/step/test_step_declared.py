"""Declarations of a step that no plan can keep: refused when the step is first called, and nothing is lost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from refusals import refused
from strategies import Node

KINDS = sw.Kinds(
    params=sw.Kind(sw.Exactly(nnx.Param)),
    lora=sw.Kind(nnx.LoRAParam),
    base=sw.Kind(nnx.BatchStat, frozen=True),
    tagged=sw.Kind("tag", saved=False),
    rest=sw.Kind(...),
)
SGD = optax.sgd(0.1)


def model() -> Node:
    return Node(
        w=nnx.Param(jnp.ones(2)),
        a=nnx.LoRAParam(jnp.ones(2)),
        base=nnx.BatchStat(jnp.ones(2)),
        seen=nnx.Variable(jnp.ones(2), tag="tag"),
        n=nnx.Variable(jnp.array(0)),
    )


def loss(model: Any) -> Any:
    return (model.w[...] * model.a[...]).sum()


def refuses(step: Any, message: str, *, hint: str, kind: str | None = None, optimizers: Any = None) -> None:
    """Refused by a call and by lowering, again and again; the state is as it was."""
    state = KINDS.plan(model(), optimizers=optimizers).take(model())
    for use in (step, step, step.lower):
        with refused(sw.DeclarationError, message, kind=kind, hint=hint):
            use(state)
    assert same(state, KINDS.plan(model(), optimizers=optimizers).take(model()))
    assert float(sw.step(loss)(state)) == 2


@pytest.mark.parametrize("decorate", [sw.step, sw.train_step], ids=["step", "train_step"])
@pytest.mark.parametrize("writes", ["base", ("rest", "base")], ids=str)
def test_a_frozen_kind_in_writes(decorate: Any, writes: Any) -> None:
    refuses(
        decorate(loss, writes=writes),
        "loss declares that it writes 'base', which is frozen.",
        kind="base",
        hint="take 'base' out of writes, or declare the kind with frozen=False",
        optimizers={"params": SGD},
    )


@pytest.mark.parametrize(
    "step",
    [
        sw.step(loss, writes="gates"),
        sw.step(loss, writes=("rest", "gates")),
        sw.step(loss, capture="gates"),
        sw.step(loss, capture=["gates"]),
        sw.train_step(loss, writes="gates"),
        sw.train_step(loss, wrt="gates"),
        sw.train_step(loss, wrt=("params", "gates")),
        sw.train_step(loss, capture="gates"),
    ],
)
def test_a_kind_that_is_not_there(step: Any) -> None:
    refuses(
        step,
        "There is no kind 'gates'.",
        kind="gates",
        hint="one of: params, lora, base, tagged, rest, optimizer",
        optimizers={"params": SGD},
    )


def test_training_without_an_optimizer() -> None:
    for step in (sw.train_step(loss), sw.train_step(loss, wrt="params")):
        refuses(
            step,
            "loss trains, but the plan has no optimizer.",
            hint="plan = kinds.plan(model, optimizers={'params': optax.adamw(3e-4)})",
        )


@pytest.mark.parametrize("wrt", ["lora", ("params", "lora"), "base", "optimizer"], ids=str)
def test_training_what_has_no_optimizer(wrt: Any) -> None:
    kind = wrt if isinstance(wrt, str) else wrt[1]
    refuses(
        sw.train_step(loss, wrt=wrt),
        f"loss differentiates {kind!r}, which has no optimizer in the plan.",
        kind=kind,
        hint=f"optimizers={{{kind!r}: optax.adamw(3e-4)}}; for gradients alone: sw.value_and_grad",
        optimizers={"params": SGD},
    )


def test_half_of_a_joint_update() -> None:
    refuses(
        sw.train_step(loss, wrt="lora"),
        "params, lora are updated jointly; loss names only some of them in wrt.",
        kind="params",
        hint="wrt=('params', 'lora'), or a separate optimizer for each",
        optimizers={("params", "lora"): SGD},
    )


def test_training_nothing() -> None:
    refuses(
        sw.train_step(loss, wrt=()),
        "loss differentiates nothing: wrt is empty.",
        hint="wrt='params', or @sw.step",
        optimizers={"params": SGD},
    )


def test_capturing_by_more_than_the_type() -> None:
    refuses(
        sw.step(loss, capture="tagged"),
        "Kind 'tagged' cannot be captured: its filter looks at more than the type.",
        kind="tagged",
        hint="tagged=sw.Kind(nnx.Intermediate, saved=False)",
    )


def test_an_option_that_jit_does_not_have() -> None:
    with pytest.raises(
        sw.DeclarationError, match=r"^A step does not take the option 'donate'\.\n  hint: one of: backend, "
    ):
        sw.step(loss, donate=True)


def test_a_parameter_that_the_function_does_not_have() -> None:
    for options in ({"static_argnames": "mode"}, {"donate_argnames": ("mode",)}):
        with pytest.raises(sw.DeclarationError, match=r"has no parameter mode\.\n  hint: one of: model$"):
            sw.step(loss, **options)


def test_options_of_arguments_without_a_name_of_their_own() -> None:
    """As in `jax.jit`: a position among `*rest`, and any name if there is a `**named`."""

    def fn(model: Any, *rest: Any, scale: jax.Array, **named: Any) -> jax.Array:
        return rest[1] * scale * (2 if named["mode"] == "twice" else 1)

    model = nnx.Dict(w=nnx.Param(jnp.ones(3)))
    state, x, y, scale = sw.plan(model).take(model), jnp.ones(3), jnp.ones(3), jnp.ones(3)
    step = sw.step(fn, donate_argnames="scale", static_argnames="mode")
    assert step(state, x, y, scale=scale, mode="twice").tolist() == [2.0] * 3
    assert scale.is_deleted()
    assert not y.is_deleted()
    step = sw.step(fn, donate_argnums=2, static_argnames="mode")
    step(state, x, y, scale=x, mode="once")
    assert y.is_deleted()
    assert not x.is_deleted()


def test_what_a_train_step_writes_by_default_and_what_it_refuses() -> None:
    @sw.train_step
    def train(model: Any) -> Any:
        model.n[...] += 1
        model.seen[...] *= 2
        model.base[...] *= 2
        model.a[...] *= 2
        model.w[...] *= 2
        return loss(model)

    state = KINDS.plan(model(), optimizers={"params": SGD}).take(model())
    with refused(
        sw.UndeclaredWriteError,
        "train writes params, lora, base, tagged, which it does not declare.",
        kind="params",
        leaves=[
            "w: Param(2,) float32  kind=params  (written in Node; written by its optimizer alone)",
            "a: LoRAParam(2,) float32  kind=lora  (written in Node)",
            "base: BatchStat(2,) float32  kind=base  (written in Node; the kind is frozen)",
            "seen: Variable(2,) float32  kind=tagged  (written in Node)",
        ],
        hint="@sw.train_step(writes=('lora', 'tagged'))\n"
        "or, if a layer normalizes its own weights: @sw.train_step(writes=('params',))",
    ):
        train(state)
    assert same(state, KINDS.plan(model(), optimizers={"params": SGD}).take(model()))
