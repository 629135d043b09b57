"""Scales and amax histories of fp8 layers, whose gradient must be stored: in a plan, and under an `nnx.Optimizer`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops

import statewise as sw
from following import run
from linted import clean, codes, finds

FP8 = nnx.variable_type_from_name(fp8_ops.OVERWRITE_WITH_GRADIENT, allow_register=True)
ADAM = optax.adam(1e-3)
OVERWRITTEN = "kinds.plan(model, optimizers={'params': tx, 'fp8': sw.overwrite_with_gradient()})"
TYPE = "nnx.variable_type_from_name('_overwrite_with_gradient', allow_register=True)"
DECLARED = f"kinds = kinds | sw.Kinds(fp8=sw.Kind({TYPE}))"


class OverwriteWithGradient(nnx.Variable[jax.Array]):
    """A class of a user's own."""


class Layer(nnx.Module):
    def __init__(self) -> None:
        self.kernel, self.scale = nnx.Param(jnp.ones(3)), OverwriteWithGradient(jnp.ones(1))


OWN = sw.Kinds(params=sw.Kind(nnx.Param), fp8=sw.Kind(OverwriteWithGradient))
SCALE = ["scale: OverwriteWithGradient(1,) float32  kind={}"]


def test_the_layer_of_flax() -> None:
    dense = nn.Dense(3, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
    model = nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(jnp.ones((2, 4)))
    plan = sw.plan(model, optimizers={"params": ADAM})
    (finding,) = sw.lint(plan)
    assert finding.code == "scale-not-overwritten"
    assert finding.message == "6 values that their gradient replaces have no optimizer."
    assert {leaf.type for leaf in finding.leaves} == {FP8}
    assert finding.hint.splitlines() == [DECLARED, OVERWRITTEN]
    fixed = run(finding.hint, kinds=plan.kinds, model=model, tx=ADAM)["kinds"]
    clean(fixed.plan(model, optimizers={"params": ADAM, "fp8": sw.overwrite_with_gradient()}))
    clean(sw.plan(model))  # it does not train
    clean(model)


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ({"params": ADAM}, "1 value that its gradient replaces has no optimizer."),
        (
            {("params", "fp8"): ADAM},
            "The optimizer of params+fp8 trains 1 value that its gradient replaces.",
        ),
        (
            {"params": ADAM, "fp8": optax.chain(optax.clip(1.0), sw.overwrite_with_gradient())},
            "The optimizer of fp8 trains 1 value that its gradient replaces.",
        ),
    ],
    ids=["none", "adam", "chained"],
)
def test_what_does_not_store_the_gradient(optimizers: dict[str, object], message: str) -> None:
    plan = OWN.plan(Layer(), optimizers=optimizers)
    finds("scale-not-overwritten", message, [SCALE[0].format("fp8")], OVERWRITTEN, plan)


def test_a_kind_that_holds_more_than_scales() -> None:
    kinds = sw.Kinds(all=sw.Kind((nnx.Param, OverwriteWithGradient)))
    plan = kinds.plan(Layer(), optimizers={"all": ADAM})
    hint = (
        "kinds = kinds.replace(all=dataclasses.replace(kinds['all'], of=nnx.All((nnx.Param, OverwriteWithGradient), "
        f"nnx.Not(OverwriteWithGradient)))) | sw.Kinds(fp8=sw.Kind(OverwriteWithGradient))\n{OVERWRITTEN}"
    )
    message = "The optimizer of all trains 1 value that its gradient replaces."
    finds("scale-not-overwritten", message, [SCALE[0].format("all")], hint, plan)
    names = {"OverwriteWithGradient": OverwriteWithGradient}
    fixed = run(hint.splitlines()[0], kinds=kinds, **names)["kinds"]
    clean(fixed.plan(Layer(), optimizers={"all": ADAM, "fp8": sw.overwrite_with_gradient()}))


def test_what_is_frozen_or_stored_is_fine() -> None:
    clean(OWN.plan(Layer(), optimizers={"params": ADAM, "fp8": sw.overwrite_with_gradient()}))
    frozen = sw.Kinds(params=sw.Kind(nnx.Param), fp8=sw.Kind(OverwriteWithGradient, frozen=True))
    clean(frozen.plan(Layer(), optimizers={"params": ADAM}))


def test_an_optimizer_of_nnx() -> None:
    model = Layer()
    clean(model, nnx.Optimizer(model, ADAM, wrt=nnx.Param))
    both = nnx.Optimizer(model, ADAM, wrt=nnx.Any(nnx.Param, OverwriteWithGradient))
    assert codes(model, both) == ["scale-not-overwritten"]


def test_the_name_is_that_of_flax() -> None:
    assert fp8_ops.OVERWRITE_WITH_GRADIENT == FP8.__name__ == "_overwrite_with_gradient"
