"""Rules of running statistics: the dtype in which steps compute with them, and the part of the batch they are of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from following import run
from linted import clean, codes, finds
from statewise.errors import DeclarationError
from statewise.examples.multi_state import BatchStat

STATISTICS = ["norm/mean: BatchStat(3,) float32  kind={}", "norm/var: BatchStat(3,) float32  kind={}"]


class Net(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.linear(x))


def fn(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


# --- compute dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "name", "hint"),
    [
        (
            sw.Kinds.standard().replace(stats=sw.Kind(nnx.BatchStat, compute="bfloat16")),
            "stats",
            "kinds = kinds.replace(stats=dataclasses.replace(kinds['stats'], compute=None))",
        ),
        (
            sw.Kinds(all=sw.Kind(..., compute="bfloat16")),
            "all",
            "kinds = kinds | sw.Kinds(stats=sw.Kind(nnx.BatchStat))",
        ),
        (
            sw.Kinds(stats=sw.Kind((nnx.Param, nnx.BatchStat), compute="bfloat16")),
            "stats",
            "kinds = kinds.replace(stats=dataclasses.replace(kinds['stats'], of=nnx.All((nnx.Param, nnx.BatchStat), "
            "nnx.Not(nnx.BatchStat)))) | sw.Kinds(statistics=sw.Kind(nnx.BatchStat))",
        ),
    ],
    ids=["of their own", "all", "mixed"],
)
def test_a_compute_dtype_on_statistics(kinds: sw.Kinds, name: str, hint: str) -> None:
    finds(
        "compute-dtype-on-statistics",
        f"Steps see the kind '{name}' in bfloat16, and it holds 2 leaves of running statistics.",
        [line.format(name) for line in STATISTICS],
        hint,
        Net(),
        kinds=kinds,
    )
    fixed = run(hint, kinds=kinds)["kinds"]
    clean(fixed.plan(Net(), optimizers={}))
    assert {leaf.kind for leaf in fixed.plan(Net()).leaves if leaf.type is nnx.BatchStat} == {
        "statistics" if name == "stats" and "statistics" in fixed else "stats"
    }


def test_why_a_statistic_stops() -> None:
    """The finding's reason, shown: with momentum 0.999 a mean of 1 moves to 2 in float32, and not in bfloat16."""
    model = nnx.Dict(mean=nnx.BatchStat(jnp.ones(1)))

    @sw.step(writes="stats")
    def fn(model: Any) -> None:
        model.mean[...] = 0.999 * model.mean[...] + 0.001 * 2

    means = []
    for compute in ("bfloat16", None):
        state = sw.Kinds(stats=sw.Kind(nnx.BatchStat, compute=compute)).plan(model).take(model)
        for _ in range(100):
            state, _ = fn(state)
        means.append(float(state["stats"]["mean"][0]))
    np.testing.assert_allclose(means[1], 2 - 0.999**100, rtol=1e-5)  # 1.095
    assert means[0] < 1.004  # the next number after 1 in bfloat16 is 1.008


def test_a_class_of_the_users_own_and_a_wider_dtype() -> None:
    model = nnx.Dict(mean=BatchStat(jnp.ones(3)))
    kinds = sw.Kinds(stats=sw.Kind(BatchStat, compute="float16"))
    assert codes(model, kinds=kinds) == ["compute-dtype-on-statistics"]
    clean(model, kinds=sw.Kinds(stats=sw.Kind(BatchStat, compute="float32")))
    clean(nnx.Dict(mean=nnx.BatchStat(jnp.ones(3, jnp.bfloat16))), kinds=sw.Kinds(all=sw.Kind(..., compute="float32")))
    clean(Net(), kinds=sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"), stats=sw.Kind(nnx.BatchStat)))


# --- microbatches ----------------------------------------------------------------------------------------------------

HINT = (
    "a norm of each example alone: nnx.GroupNorm, nnx.LayerNorm or nnx.RMSNorm\n"
    "or, if a part is large enough to normalize by: ignore='microbatches-with-batch-statistics'"
)


@pytest.mark.parametrize("several", [False, True])
def test_microbatches_of_a_model_that_normalizes_by_its_batch(several: bool) -> None:
    train = sw.train_step(fn, microbatches=4)
    plan = sw.plan(Net(), optimizers={"params": optax.sgd(0.1)})
    for target in (plan, plan.take(Net()), Net()):
        finds(
            "microbatches-with-batch-statistics",
            "fn splits its batch into 4 microbatches, and running statistics are updated in each (in norm).",
            [line.format("stats") for line in STATISTICS],
            HINT,
            target,
            steps=[sw.train_step(fn), train] if several else train,
        )
    clean(plan, steps=[sw.train_step(fn), sw.step(fn)])
    clean(plan)


def test_models_without_batch_statistics_may_be_split() -> None:
    train = sw.train_step(fn, microbatches=4)
    rngs = nnx.Rngs(0)
    clean(nnx.Sequential(nnx.Linear(2, 4, rngs=rngs), nnx.GroupNorm(4, 2, rngs=rngs)), steps=train)
    model = Net()
    model.norm.use_running_average = True
    clean(model, steps=train)


def test_the_paths_of_four_norms() -> None:
    model = nnx.Sequential(*(nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(4)))
    (finding,) = sw.lint(model, steps=sw.train_step(fn, microbatches=2))
    assert finding.message.endswith("(in layers/0, layers/1, layers/2 ...).")


def test_each_member_of_an_ensemble() -> None:
    plan = sw.plan(Net())
    state = plan.stack([plan.take(Net()), plan.take(Net())])
    found = codes(state, steps=sw.train_step(fn, microbatches=2))
    assert "microbatches-with-batch-statistics" in found


@pytest.mark.parametrize(
    ("given", "named"),
    [([fn], "fn"), (fn, "fn"), (Net(), "Net"), ("train", "str"), ([sw.step(fn), 3], "int")],
    ids=["a list", "a function", "a model", "a text", "a number"],
)
def test_what_is_not_a_step(given: Any, named: str) -> None:
    with pytest.raises(DeclarationError, match=f"^{named} is not a step") as raised:
        sw.lint(Net(), steps=given)
    assert raised.value.hint == "sw.lint(plan, steps=train), where train is made by @sw.train_step"
