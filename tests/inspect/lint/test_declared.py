"""Rules of the declaration: kinds that do not fit the leaves, or that lose something."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from linted import clean, codes, finds
from statewise.examples.multi_state import BatchStat

PARAMS = sw.Kinds(params=sw.Kind(nnx.Param))
LORA = sw.Kinds(params=sw.Kind(nnx.Param), lora=sw.Kind(nnx.LoRAParam))


def linear() -> nnx.Linear:
    return nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))


def test_leaves_that_no_kind_claims_are_a_finding_not_an_error() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), stat=nnx.BatchStat(jnp.ones(2)))
    with pytest.raises(sw.UnclaimedError) as caught:
        PARAMS.plan(model)
    finds(
        "unclaimed-leaf",
        "1 leaf is claimed by no kind.",
        ["stat: BatchStat(2,) float32"],
        caught.value.hint or "",
        model,
        kinds=PARAMS,
    )
    clean(model, kinds=PARAMS | sw.Kinds(rest=sw.Kind(...)))


def test_other_traps_are_seen_where_the_kinds_do_not_fit() -> None:
    model = nnx.Dict(var=nnx.BatchStat(jnp.zeros(2)))
    assert codes(model, kinds=PARAMS) == ["statistic-starts-at-zero", "unclaimed-leaf"]


def test_leaves_that_two_kinds_claim_are_a_finding_not_an_error() -> None:
    model = nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0))
    with pytest.raises(sw.OverlapError) as caught:
        LORA.plan(model)
    finds(
        "overlapping-leaf",
        "2 leaves are claimed by more than one kind.",
        [
            "lora_a: LoRAParam(2, 1) float32  (claimed by params and lora)",
            "lora_b: LoRAParam(1, 3) float32  (claimed by params and lora)",
        ],
        caught.value.hint or "",
        model,
        kinds=LORA,
    )


def test_an_overlap_that_no_leaf_shows_yet() -> None:
    LORA.plan(linear())
    finds(
        "overlapping-kinds",
        "The kinds 'params' and 'lora' both claim every LoRAParam; this model has none yet.",
        [],
        "kinds = kinds.replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))",
        linear(),
        kinds=LORA,
    )


@pytest.mark.parametrize(
    "one", [nnx.Param, nnx.Any(nnx.Param, nnx.Cache), (nnx.Param, nnx.Cache), nnx.OfType(nnx.Param)]
)
@pytest.mark.parametrize("first", [True, False])
def test_an_overlap_is_seen_in_any_order_and_form(one: Any, first: bool) -> None:
    pair = {"wide": sw.Kind(one, frozen=True), "narrow": sw.Kind(nnx.LoRAParam)}
    kinds = sw.Kinds(**(pair if first else dict(reversed(pair.items()))))
    (found,) = sw.lint(linear(), kinds=kinds)
    assert found.code == "overlapping-kinds"
    assert found.hint.startswith("kinds = kinds.replace(wide=dataclasses.replace(kinds['wide'], of=nnx.All(")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sw.Exactly(nnx.Param), nnx.LoRAParam),
        (nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), nnx.LoRAParam),
        (nnx.Param, nnx.Cache),
        (nnx.Param, ...),
        (nnx.Param & sw.Path("kernel"), nnx.Param & ~sw.Path("kernel")),
    ],
    ids=["exactly", "all but", "apart", "rest", "by path"],
)
def test_kinds_that_do_not_overlap(one: Any, other: Any) -> None:
    clean(linear(), kinds=sw.Kinds(one=sw.Kind(one), other=sw.Kind(other)))


def test_the_standard_kinds_do_not_overlap() -> None:
    clean(linear(), kinds=sw.Kinds.standard())


def test_the_hint_of_an_overlap_works() -> None:
    kinds = LORA
    (found,) = sw.lint(linear(), kinds=kinds)
    scope = {"kinds": kinds, "sw": sw, "nnx": nnx}
    exec(found.hint, scope)
    clean(linear(), kinds=scope["kinds"])


def test_a_cache_in_a_kind_that_is_saved() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), hits=nnx.Cache(jnp.zeros(2)))
    finds(
        "cache-saved",
        "The kind 'rest' is saved, and holds 1 leaf of the cache.",
        ["hits: Cache(2,) float32  kind=rest"],
        "kinds = kinds | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like))",
        model,
        kinds=PARAMS | sw.Kinds(rest=sw.Kind(...)),
    )
    finds(
        "cache-saved",
        "The kind 'cache' is saved, and holds 1 leaf of the cache.",
        ["hits: Cache(2,) float32  kind=cache"],
        "kinds = kinds.replace(cache=dataclasses.replace(kinds['cache'], saved=False))",
        model,
        kinds=PARAMS | sw.Kinds(cache=sw.Kind(nnx.Cache)),
    )
    clean(model, kinds=PARAMS | sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False)))
    clean(model)


def test_a_plan_brings_its_kinds() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.zeros(2)))
    plan = sw.Kinds(cache=sw.Kind(nnx.Cache)).plan(model)
    assert codes(plan) == codes(plan.take(model)) == codes(plan.abstract()) == ["cache-saved"]


def test_streams_in_a_kind_that_is_not_saved() -> None:
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    finds(
        "rng-not-saved",
        "The kind 'rng' is not saved, and holds 2 leaves of the RNG streams.",
        ["rngs/count: RngCount() uint32  kind=rng", "rngs/key: RngKey() key<fry>  kind=rng"],
        "kinds = kinds.replace(rng=dataclasses.replace(kinds['rng'], saved=True))",
        model,
        kinds=sw.Kinds(rng=sw.Kind(nnx.RngState, saved=False)),
    )
    clean(model, kinds=sw.Kinds(rng=sw.Kind(nnx.RngState)))


@pytest.mark.parametrize("cls", [nnx.BatchStat, BatchStat], ids=["nnx's", "the user's"])
def test_statistics_in_a_kind_that_is_not_saved(cls: Any) -> None:
    model = nnx.Dict(mean=cls(jnp.zeros(2)), hits=nnx.Cache(jnp.zeros(2)))
    kinds = sw.Kinds(stats=sw.Kind(cls, saved=False), cache=sw.Kind(nnx.Cache, saved=False))
    finds(
        "statistics-not-saved",
        "The kind 'stats' is not saved, and holds 1 leaf of running statistics.",
        ["mean: BatchStat(2,) float32  kind=stats"],
        "kinds = kinds.replace(stats=dataclasses.replace(kinds['stats'], saved=True))",
        model,
        kinds=kinds,
    )
    clean(model, kinds=kinds.replace(stats=sw.Kind(cls)))


def test_a_trained_kind_that_is_not_saved() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, saved=False))
    optimizers = {"params": optax.sgd(0.1)}
    finds(
        "trained-but-not-saved",
        "The kind 'params' is trained, and not saved.",
        ["kernel: Param(2, 3) float32  kind=params"],
        "kinds = kinds.replace(params=dataclasses.replace(kinds['params'], saved=True))",
        kinds.plan(linear(), optimizers=optimizers),
    )
    clean(kinds.plan(linear()))
    clean(PARAMS.plan(linear(), optimizers=optimizers))
