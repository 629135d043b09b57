"""`cache-without-dependence`: a cache beside what a plan trains, which does not say what it was made from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw
from linted import clean, codes, finds

CODE = "cache-without-dependence"
SGD = optax.sgd(0.1)


def model() -> nnx.Dict:
    return nnx.Dict(scale=nnx.Param(jnp.ones(2)), adapter=nnx.LoRAParam(jnp.ones(2)), keys=nnx.Cache(jnp.zeros(2)))


def follow(hint: str, kinds: sw.Kinds) -> sw.Kinds:
    scope: dict[str, Any] = {"kinds": kinds, "sw": sw, "nnx": nnx, "jnp": jnp, "dataclasses": dataclasses}
    exec(hint, scope)
    return scope["kinds"]


def test_a_cache_that_names_nothing_of_what_is_trained() -> None:
    kinds, both = sw.Kinds.standard(), {"params": SGD, "lora": SGD}
    finds(
        CODE,
        "The kind 'cache' holds 1 leaf of the cache, and depends on nothing that is trained.",
        ["keys: Cache(2,) float32  kind=cache"],
        "kinds = kinds.replace(cache=dataclasses.replace(kinds['cache'], depends_on=('params', 'lora')))",
        kinds.plan(model(), optimizers=both),
        ignore=("base-trained-under-lora",),
    )
    (finding,) = (one for one in sw.lint(kinds.plan(model(), optimizers={"lora": SGD})) if one.code == CODE)
    assert "depends_on=('lora',)" in finding.hint
    clean(follow(finding.hint, kinds).plan(model(), optimizers=both), ignore="base-trained-under-lora")


def test_a_cache_in_the_kind_of_the_rest_gets_one_of_its_own() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(..., saved=False))
    plan = kinds.plan(model(), optimizers={"params": SGD})
    (finding,) = (one for one in sw.lint(plan) if one.code == CODE)
    assert finding.hint == (
        "kinds = kinds | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, "
        "depends_on=('params',)))"
    )
    assert CODE not in codes(follow(finding.hint, kinds).plan(model(), optimizers={"params": SGD}))


def test_an_nnx_optimizer_in_a_plan_trains_too() -> None:
    line = nnx.Dict(scale=nnx.Param(jnp.ones(2)), keys=nnx.Cache(jnp.zeros(2)))
    optimizer = nnx.Optimizer(line, SGD, wrt=nnx.Param)
    assert codes(sw.plan(line, optimizer)) == [CODE]
    clean(line, optimizer)  # without a plan no step of ours would check it


def test_a_plan_that_trains_nothing_is_clean() -> None:
    clean(sw.plan(nnx.Dict(scale=nnx.Param(jnp.ones(2)), keys=nnx.Cache(jnp.zeros(2)))))
