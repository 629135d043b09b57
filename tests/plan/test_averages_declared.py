"""What is refused when averages are declared, and what each refusal says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused

SCHEDULE = "sw.EMA(lambda n: jnp.minimum(0.999, (1 + n) / (10 + n)))"
WITHOUT_INTEGERS = (
    "claim them by a kind of their own: "
    "sw.Kind(sw.Where(lambda path, leaf: not jnp.issubdtype(leaf.dtype, jnp.inexact)))"
)


def plan(averages: Any, kinds: sw.Kinds | None = None, model: Any = None) -> sw.Plan:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0)) if model is None else model
    return (kinds or sw.Kinds.standard()).plan(model, optimizers={"params": optax.sgd(0.1)}, averages=averages)


@pytest.mark.parametrize("decay", [1.0, -0.1, 2, float("nan")])
def test_a_decay_outside_of_0_to_1_is_refused(decay: float) -> None:
    with refused(sw.DeclarationError, f"decay={decay!r} is not in [0, 1).", hint="sw.EMA(0.999)"):
        sw.EMA(decay)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]  # as any class that defines __eq__ alone

    def __call__(self, count: Any) -> Any:
        return 0.5


@pytest.mark.parametrize(
    ("decay", "shown"), [("0.9", "'0.9'"), (True, "True"), (None, "NoneType"), (int, "type"), (np.ones(2), "ndarray")]
)
def test_a_decay_that_is_no_number_is_refused(decay: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError,
        f"decay={shown} is not a number in [0, 1), nor a function of the number of updates.",
        hint=f"sw.EMA(0.999), or {SCHEDULE}",
    ):
        sw.EMA(decay)


def test_a_schedule_that_cannot_be_hashed_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "decay=Unhashable(...) cannot be hashed, as every part of a declaration must be.",
        hint="sw.EMA(lambda n: ...)",
    ):
        sw.EMA(Unhashable())


def test_a_name_that_is_no_text_is_refused() -> None:
    with refused(sw.DeclarationError, "name=int(...) is not a string.", hint="sw.EMA(0.999, name='ema')"):
        sw.EMA(0.9, name=3)
    with refused(
        sw.DeclarationError,
        "'a b' cannot name a kind: it is not a Python identifier.",
        kind="a b",
        hint="a name of letters, digits and underscores, such as 'params'",
    ):
        plan({"params": sw.EMA(0.9, name="a b")})


@pytest.mark.parametrize(("dtype", "shown"), [(jnp.int32, "int32"), ("float33", "'float33'"), (3, "int")])
def test_a_dtype_of_no_floating_point_numbers_is_refused(dtype: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError, f"dtype={shown} is not a floating-point dtype.", hint="sw.EMA(0.999, dtype=jnp.float32)"
    ):
        sw.EMA(0.9, dtype=dtype)


def test_a_dtype_that_this_process_lacks_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "The average 'ema' cannot be float64: this process has no 64-bit numbers.",
        kind="ema",
        hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
    ):
        plan({"params": sw.EMA(0.9, dtype="float64")})


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [(lambda count: count, "int32[]"), (lambda count: jnp.ones(2), "float32[2]"), (lambda count: None, "NoneType")],
)
def test_a_schedule_that_gives_no_number_is_refused(schedule: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError,
        f"The decay of the average 'ema' is a schedule that returns {shown}, not a number.",
        kind="ema",
        hint=SCHEDULE,
    ):
        plan({"params": sw.EMA(schedule)})


def test_a_schedule_that_cannot_be_asked_is_refused() -> None:
    def broken(count: Any) -> Any:
        raise ValueError("no such step\nand more")

    with refused(
        sw.DeclarationError,
        "The decay of the average 'ema' is a schedule that cannot be called: no such step",
        kind="ema",
        hint=SCHEDULE,
    ):
        plan({"params": sw.EMA(broken)})


def test_a_schedule_may_give_a_number_of_python() -> None:
    assert len(plan({"params": sw.EMA(lambda count: 0.5)})["ema"]) == 3


@pytest.mark.parametrize(
    ("given", "shown"),
    [(0.9, "0.9"), (sw.EMA, repr(sw.EMA)), ([optax.ema(0.9)], "GradientTransformation"), ([None], "NoneType")],
)
def test_something_that_is_no_average_is_refused(given: Any, shown: str) -> None:
    with refused(
        sw.DeclarationError,
        f"The average of 'params' is {shown}, not an sw.EMA.",
        kind="params",
        hint="averages={'params': sw.EMA(0.999)}",
    ):
        plan({"params": given})


def test_averages_that_name_no_kinds_are_refused() -> None:
    hint = "averages={'params': sw.EMA(0.999)}"
    with refused(sw.DeclarationError, "averages=EMA(...) does not say which kinds it tracks.", hint=hint):
        plan(sw.EMA(0.9))
    with refused(sw.DeclarationError, "3 is not the name of a kind, nor a tuple of names.", hint=hint):
        plan({3: sw.EMA(0.9)})
    with refused(
        sw.DeclarationError,
        "An average is given for no kind, which claims no leaf of this model.",
        hint="leave that average out, or correct the kind's filter",
    ):
        plan({(): sw.EMA(0.9)})


def test_an_unknown_kind_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "There is no kind 'weights'.",
        kind="weights",
        hint=f"one of: {', '.join(sw.Kinds.standard())}",
    ):
        plan({"weights": sw.EMA(0.9)})


def test_an_empty_kind_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "An average is given for 'lora', which claims no leaf of this model.",
        kind="lora",
        hint="leave that average out, or correct the kind's filter",
    ):
        plan({("params", "lora"): sw.EMA(0.9)})


def test_a_kind_of_the_training_is_refused() -> None:
    hint = "averages={'params': sw.EMA(0.999)}"
    with refused(
        sw.DeclarationError,
        "The kind 'optimizer' cannot be averaged: it belongs to the training, not to the model.",
        kind="optimizer",
        hint=hint,
    ):
        plan({"optimizer": sw.EMA(0.9)})
    kinds = sw.Kinds.standard() | sw.Kinds(ema=sw.Kind(sw.EMA))
    with refused(
        sw.DeclarationError,
        "The kind 'ema' cannot be averaged: it belongs to the training, not to the model.",
        kind="ema",
        hint=hint,
    ):
        plan({"ema": sw.EMA(0.9, name="second")}, kinds)


def test_a_frozen_kind_is_refused() -> None:
    kinds = sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, frozen=True))
    with refused(
        sw.DeclarationError,
        "The kind 'stats' is frozen, so it cannot have an average.",
        kind="stats",
        hint="averages without 'stats', or a declaration of 'stats' that is not frozen",
    ):
        plan({"stats": sw.EMA(0.9)}, kinds)


def test_leaves_of_no_floating_point_numbers_are_all_listed() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), n=nnx.Variable(jnp.arange(3)), k=nnx.Variable(jax.random.key(0)))
    with refused(
        sw.DeclarationError,
        "The average of params, variables would include leaves that are not made of floating-point numbers.",
        leaves=[
            "k: Variable() key<fry>  kind=variables  (has no average)",
            "n: Variable(3,) int32  kind=variables  (has no average)",
        ],
        kind="params",
        hint=WITHOUT_INTEGERS,
    ):
        plan({("params", "variables"): sw.EMA(0.9)}, model=model)


def test_a_name_that_two_averages_have_is_refused() -> None:
    other = "sw.EMA(..., name='ema_slow')"
    with refused(
        sw.DeclarationError,
        "Two averages are called 'ema': under 'params' and under 'stats'.",
        kind="ema",
        hint=f"averages={{('params', 'stats'): sw.EMA(...)}}  # one for both\nor {other}",
    ):
        plan({"params": sw.EMA(0.9), "stats": sw.EMA(0.9)})
    with refused(
        sw.DeclarationError, "Two averages are called 'ema': under 'params' and under 'params'.", kind="ema", hint=other
    ):
        plan({"params": [sw.EMA(0.9), sw.EMA(0.8)]})


def test_a_name_that_a_kind_has_is_refused() -> None:
    with refused(
        sw.DeclarationError,
        "The average 'stats' has the name of a kind of the model.",
        kind="stats",
        hint="sw.EMA(..., name='stats_slow')\nto declare how averages are handled: stats=sw.Kind(sw.EMA, ...)",
    ):
        plan({"params": sw.EMA(0.9, name="stats")})


@pytest.mark.parametrize("handling", [{"frozen": True}, {"restart": jnp.zeros_like}, {"batch_axis": 0}])
def test_a_treatment_that_averages_cannot_have_is_refused(handling: dict[str, Any]) -> None:
    kinds = sw.Kinds.standard() | sw.Kinds(ema=sw.Kind(sw.EMA, **handling))
    with refused(
        sw.DeclarationError,
        "The kind 'ema' is made of averages: they change in every update, start as the values that they track, "
        "and have no slots.",
        kind="ema",
        hint="ema=sw.Kind(sw.EMA, ...) without frozen, restart and batch_axis",
    ):
        plan({"params": sw.EMA(0.9)}, kinds)


def test_averages_may_be_declared_as_a_kind() -> None:
    declared = sw.Kind(sw.EMA, saved=False, missing="restart")
    made = plan({"params": sw.EMA(0.9)}, sw.Kinds(ema=declared) | sw.Kinds.standard())
    assert next(iter(made.kinds)) == "ema"
    assert made.kinds["ema"] == declared


def test_slots_of_averages_are_refused() -> None:
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    state = plan({"params": sw.EMA(0.9)}).take(model)
    with refused(
        sw.DeclarationError,
        "The averages 'ema' have no slots of their own: they restart completely, or with the kinds that they track.",
        kind="ema",
        hint="state.restart('ema')",
    ):
        state.restart("ema", where=[0])
