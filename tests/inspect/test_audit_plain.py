"""`audit` on plain functions of objects, as people write them under `nnx.jit` or, by mistake, under `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
import pytest
from flax import nnx

import statewise as sw
from audited import Net, X, loss_of, where
from refusals import refused


def nnx_train(model: Net, optimizer: nnx.Optimizer[Net], x: jax.Array, scale: float = 1.0) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: loss_of(model, x) * scale)(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.parametrize("wrapped", [nnx_train, nnx.jit(nnx_train)], ids=["plain", "nnx.jit"])
def test_a_plain_function_of_several_objects_is_audited(wrapped: Callable[..., Any]) -> None:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    kernel = model.dense.kernel.get_value()
    audit = sw.audit(wrapped, (model, optimizer), X, scale=2.0)
    assert where(audit["params"], "written") == where(audit["params"])
    assert audit.counts["optimizer"].written == len(audit["optimizer"])
    assert where(audit.ephemeral_writes) == ["0/last"]
    assert (audit.error, audit.trains, audit.step) == (None, False, "nnx_train")
    assert model.dense.kernel.get_value() is kernel


def test_a_plain_jit_is_seen_to_write_nothing() -> None:
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    audit = sw.audit(jax.jit(nnx_train), (model, optimizer), X)
    assert where(audit.leaves, "written") == []
    assert "0/dense/kernel" in where(audit.leaves, "read")


def test_a_plain_function_takes_a_state_of_other_kinds_and_flags_as_they_are() -> None:
    kinds = sw.Kinds(weights=sw.Kind(nnx.Param), rest=sw.Kind(...))

    def body(model: Net, x: jax.Array, train: bool, mode: str) -> jax.Array:
        return model(x) if train and mode == "a" else model.dense(x)

    state = kinds.plan(Net(nnx.Rngs(0))).abstract()
    assert where(sw.audit(body, state, X, False, "a").leaves, "written") == []
    assert len(where(sw.audit(body, state, X, True, "a")["rest"], "written")) == 5


def test_a_model_or_a_method_of_one_is_not_taken_for_a_function_of_it() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    told = "contains its own Linear; an audit only covers objects that are passed as arguments."
    with refused(sw.StructureError, f"model {told}", hint="sw.audit(lambda model, *args: model(*args), model, ...)"):
        sw.audit(model, model, X)
    with refused(
        sw.StructureError,
        f"model.__call__ {told}",
        hint="sw.audit(lambda model, *args: model.__call__(*args), model, ...)",
    ):
        sw.audit(model.__call__, model, X)


def test_a_plain_function_with_an_object_among_its_arguments_is_refused() -> None:
    with refused(
        sw.StructureError,
        "nnx_train is given Optimizer as an argument; only the objects before its arguments are audited.",
        hint="sw.audit(nnx_train, (model, optimizer), ...)",
    ):
        model = Net(nnx.Rngs(0))
        sw.audit(nnx_train, model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param), X)
