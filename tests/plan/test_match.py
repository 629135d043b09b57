"""Each leaf in exactly one kind, or every problem at once, with a hint that runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from comparing import plannable
from refusals import refused
from statewise._src.filters.combinators import predicate
from statewise._src.plan.match import claimants
from strategies import Constrained, Node, OwnBatchStat, OwnStat, filters, leaves_of


class _Hidden(nnx.Variable):
    """A type whose name starts as no kind's may."""


def fixed(kinds: sw.Kinds, error: sw.StatewiseError) -> sw.Kinds:
    """The declaration after the hint's code lines have run."""
    assert error.hint
    space: dict[str, Any] = {"sw": sw, "nnx": nnx, "jax": jax, "dataclasses": dataclasses, "kinds": kinds}
    space |= {cls.__name__: cls for cls in (OwnStat, OwnBatchStat, Constrained, _Hidden)}
    for line in error.hint.splitlines():
        if line.startswith("kinds = "):
            exec(line, space)
    return space["kinds"]


def is_attribute(path: tuple[Any, ...]) -> bool:
    return isinstance(path[-1], str)


def ways_to(model: Node, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Every path of a leaf.  Drawn models tie a leaf in one place only."""
    leaf = dict(leaves_of(model))[path]
    tied = isinstance(leaf, nnx.Variable) and getattr(model, "zz_tied", None) is leaf
    return [path, ("zz_tied",)] if tied else [path]


# --- laws --------------------------------------------------------------------------------------------------------


@given(plannable())
def test_the_standard_kinds_claim_each_leaf_once(model: Node) -> None:
    plan = sw.plan(model)
    kinds = sw.Kinds.standard()
    for leaf in plan.leaves:
        live = dict(leaves_of(model))[leaf.path]
        by = [name for name, kind in kinds.items() if not kind.rest and predicate(kind.of)(leaf.path, live)]
        assert (by or ["variables"]) == [leaf.kind]
    assert sum(len(plan[kind]) for kind in plan) == len(plan.leaves)
    # An Intermediate that is an attribute of a module was sown there: it is dropped, at whatever path it has.
    sown = {path for path, leaf in leaves_of(model) if isinstance(leaf, nnx.Intermediate) and is_attribute(path)}
    assert {leaf.path for leaf in plan.excluded} == sown
    assert {leaf.path for leaf in plan.leaves} >= {path for path, _ in leaves_of(model)} - sown
    assert len(plan.leaves) + len(sown) >= len(leaves_of(model))


@given(plannable(), filters(), filters())
def test_any_declaration_claims_each_leaf_once_or_says_which_not(model: Node, one: Any, other: Any) -> None:
    try:
        kinds = sw.Kinds(one=sw.Kind(one, optional=True), other=sw.Kind(other, optional=True))
    except sw.DeclarationError:
        return  # an empty filter, or `...` twice
    matches = {name: predicate(kind.of) for name, kind in kinds.items()}
    ways = {path: ways_to(model, path) for path, _ in leaves_of(model)}  # a tied leaf is claimed by any of its paths
    claims = {
        path: [name for name in kinds if not kinds[name].rest and any(matches[name](way, leaf) for way in ways[path])]
        or [name for name in kinds if kinds[name].rest]
        for path, leaf in leaves_of(model)
    }
    odd = {path for path, names in claims.items() if len(names) != 1}
    try:
        plan = kinds.plan(model)
    except (sw.UnclaimedError, sw.OverlapError) as error:
        assert {leaf.path for leaf in error.leaves} == odd  # noqa: PT017 - which one is raised depends on the draw
        assert isinstance(error, sw.OverlapError) == any(len(names) > 1 for names in claims.values())  # noqa: PT017
        return
    assert not odd
    assert {leaf.path: [leaf.kind] for leaf in plan.leaves} == claims


@given(plannable())
def test_mends_of_unclaimed_leaves_run(model: Node) -> None:
    kinds = sw.Kinds(params=sw.Kind(sw.Exactly(nnx.Param)))
    try:
        kinds.plan(model)
    except sw.UnclaimedError as error:
        assert len(fixed(kinds, error).plan(model).leaves) == len(leaves_of(model))  # noqa: PT017


# --- no kind -----------------------------------------------------------------------------------------------------


def test_every_unclaimed_leaf_is_listed() -> None:
    model = Node(
        kernel=nnx.Param(jnp.ones((2, 3))),
        mean=OwnStat(jnp.zeros((3,), jnp.bfloat16)),
        deep=Node(key=nnx.Variable(jax.random.key(0)), mean=OwnStat(jnp.zeros(()))),
        raw=nnx.data(jnp.ones((0, 2), jnp.int32)),
        both=_Hidden({"a": jnp.ones(1), "b": None}),
    )
    kinds = sw.Kinds(params=sw.Kind(nnx.Param))
    with refused(
        sw.UnclaimedError,
        "5 leaves are claimed by no kind.",
        leaves=[
            "both: _Hidden- -",
            "deep/key: Variable() key<fry>",
            "deep/mean: OwnStat() float32",
            "mean: OwnStat(3,) bfloat16",
            "raw: Array(0, 2) int32",
        ],
        hint="kinds = kinds | sw.Kinds(hidden_kind=sw.Kind(sw.Exactly(_Hidden)))\n"
        "kinds = kinds | sw.Kinds(variable_kind=sw.Kind(sw.Exactly(nnx.Variable)))\n"
        "kinds = kinds | sw.Kinds(ownstat_kind=sw.Kind(sw.Exactly(OwnStat)))\n"
        "kinds = kinds | sw.Kinds(array_kind=sw.Kind(sw.Exactly(jax.Array)))\n"
        "or, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))",
    ) as caught:
        kinds.plan(model)
    plan = fixed(kinds, caught.value).plan(model)
    assert [(leaf.kind, sw.format_path(leaf.path)) for leaf in plan.leaves] == [
        ("hidden_kind", "both"),
        ("variable_kind", "deep/key"),
        ("ownstat_kind", "deep/mean"),
        ("params", "kernel"),
        ("ownstat_kind", "mean"),
        ("array_kind", "raw"),
    ]


def test_one_unclaimed_leaf_of_several_objects() -> None:
    with refused(
        sw.UnclaimedError,
        "1 leaf is claimed by no kind.",
        leaves=["1/a: Cache(1,) float32"],
        hint="kinds = kinds | sw.Kinds(cache_kind=sw.Kind(sw.Exactly(nnx.Cache)))\n"
        "or, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))",
    ):
        sw.Kinds(params=sw.Kind(nnx.Param)).plan(Node(a=nnx.Param(jnp.ones(1))), Node(a=nnx.Cache(jnp.ones(1))))


def test_a_hint_pushes_out_no_kind_of_the_declaration() -> None:
    kinds = sw.Kinds(cache_kind=sw.Kind(nnx.Param), rest=sw.Kind("tag"))
    with pytest.raises(sw.UnclaimedError) as caught:
        kinds.plan(Node(a=nnx.Param(jnp.ones(1)), b=nnx.Cache(jnp.ones(1))))
    assert caught.value.hint == (
        "kinds = kinds | sw.Kinds(cache_kind_2=sw.Kind(sw.Exactly(nnx.Cache)))\n"
        "or, for all of them at once: kinds = kinds | sw.Kinds(rest_2=sw.Kind(...))"
    )


def test_an_empty_declaration_claims_nothing() -> None:
    with pytest.raises(sw.UnclaimedError, match=r"^1 leaf is claimed by no kind\."):
        sw.Kinds().plan(Node(a=nnx.Param(jnp.ones(1))))


# --- several kinds -----------------------------------------------------------------------------------------------


def test_every_contested_leaf_is_listed_and_the_hint_keeps_the_treatment() -> None:
    model = Node(
        kernel=nnx.Param(jnp.ones((2, 3))),
        lora=nnx.LoRAParam(jnp.ones((2, 1))),
        free=Constrained(jnp.ones(1)),
        gate=OwnStat(jnp.ones(1)),
        alone=nnx.Cache(jnp.ones(4)),
    )
    kinds = sw.Kinds(
        base=sw.Kind(nnx.Param, frozen=True),
        lora=sw.Kind(nnx.LoRAParam),
        free=sw.Kind(Constrained),
        other=sw.Kind(OwnStat),
    )
    with refused(
        sw.OverlapError,
        "2 leaves are claimed by more than one kind.  1 leaf is claimed by none: alone.",
        leaves=[
            "free: Constrained(1,) float32  (claimed by base and free)",
            "lora: LoRAParam(2, 1) float32  (claimed by base and lora)",
            "alone: Cache(4,) float32",
        ],
        hint="kinds = kinds.replace(base=dataclasses.replace(kinds['base'], "
        "of=nnx.All(nnx.Param, nnx.Not(Constrained), nnx.Not(nnx.LoRAParam))))",
    ) as caught:
        kinds.plan(model)
    after = fixed(kinds, caught.value)
    assert after["base"].frozen
    plan = (after | sw.Kinds(rest=sw.Kind(...))).plan(model)
    assert {sw.format_path(leaf.path): leaf.kind for leaf in plan.leaves} == {
        "alone": "rest",
        "free": "free",
        "gate": "other",
        "kernel": "base",
        "lora": "lora",
    }


@pytest.mark.parametrize("order", [("general", "special"), ("special", "general")])
def test_the_wider_kind_gives_way_in_whatever_order(order: tuple[str, str]) -> None:
    of = {"general": sw.Kind(nnx.Variable), "special": sw.Kind(nnx.BatchStat)}
    kinds = sw.Kinds(**{name: of[name] for name in order})
    model = Node(a=nnx.BatchStat(jnp.ones(1)), b=nnx.Param(jnp.ones(1)))
    with refused(
        sw.OverlapError,
        "1 leaf is claimed by more than one kind.",
        leaves=[f"a: BatchStat(1,) float32  (claimed by {order[0]} and {order[1]})"],
        hint="kinds = kinds.replace(general=sw.Kind(nnx.All(nnx.Variable, nnx.Not(nnx.BatchStat))))",
    ) as caught:
        kinds.plan(model)
    assert [leaf.kind for leaf in fixed(kinds, caught.value).plan(model).leaves] == ["special", "general"]


@pytest.mark.parametrize("order", [("reference", "params", "rng"), ("params", "rng", "reference")])
def test_types_give_way_to_a_kind_that_spells_a_path(order: tuple[str, ...]) -> None:
    """The other way round the hint would have a model trained that is declared frozen."""
    of = {
        "reference": sw.Kind(sw.Path("reference/**"), frozen=True),
        "params": sw.Kind(nnx.Param),
        "rng": sw.Kind(nnx.RngState),
    }
    kinds = sw.Kinds(**{name: of[name] for name in order})
    objects = {name: Node(w=nnx.Param(jnp.ones(1)), r=nnx.Rngs(0)) for name in ("policy", "reference")}
    with pytest.raises(sw.OverlapError) as caught:
        kinds.plan(**objects)
    plan = fixed(kinds, caught.value).plan(**objects)
    assert {leaf.kind for leaf in plan.leaves if leaf.path[0] == "reference"} == {"reference"}
    assert {leaf.kind for leaf in plan.leaves if leaf.path[0] == "policy"} == {"params", "rng"}


def test_three_kinds_claim_one_leaf() -> None:
    kinds = sw.Kinds(all=sw.Kind(nnx.Variable), params=sw.Kind(nnx.Param), lora=sw.Kind(nnx.LoRAParam, saved=False))
    model = Node(a=nnx.LoRAParam(jnp.ones(1)), b=nnx.Param(jnp.ones(1)), c=nnx.Cache(jnp.ones(1)))
    with pytest.raises(sw.OverlapError) as caught:
        kinds.plan(model)
    assert [leaf.note for leaf in caught.value.leaves] == [
        "claimed by all and params and lora",
        "claimed by all and params",
    ]
    assert [leaf.kind for leaf in fixed(kinds, caught.value).plan(model).leaves] == ["lora", "params", "all"]


def test_a_tied_leaf_claimed_by_each_of_its_paths() -> None:
    shared = nnx.Param(jnp.ones((2, 3)))
    model = Node(embed=shared, head=shared, bias=nnx.Param(jnp.ones(3)))
    kinds = sw.Kinds(first=sw.Kind(sw.Path("embed")), second=sw.Kind(sw.Path("head")), rest=sw.Kind(...))
    with refused(
        sw.OverlapError,
        "1 leaf is claimed by more than one kind.",
        leaves=["embed: Param(2, 3) float32  (claimed by first and second)"],
        hint="kinds = kinds.replace(first=sw.Kind(nnx.All(sw.Path('embed'), nnx.Not(sw.Path('head')), "
        "nnx.Not(sw.Path('embed'))), optional=True))",
    ) as caught:
        kinds.plan(model)
    plan = fixed(kinds, caught.value).plan(model)
    assert {sw.format_path(leaf.path): leaf.kind for leaf in plan.leaves} == {"embed": "second", "bias": "rest"}


def test_a_type_of_two_standard_kinds() -> None:
    class Both(nnx.BatchStat, nnx.Cache):
        pass

    with pytest.raises(sw.OverlapError, match=r"a: Both\(1,\) float32  \(claimed by stats and cache\)"):
        sw.plan(Node(a=Both(jnp.ones(1))))


# --- how it asks -------------------------------------------------------------------------------------------------


def test_a_filter_of_types_is_asked_once_for_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand leaves of three types: each kind's filter answers three times."""
    asked: list[str] = []

    def counting(filter: Any) -> Any:
        def matches(path: Any, leaf: Any) -> bool:
            asked.append(type(leaf).__name__)
            return original(path, leaf)

        original = predicate(filter)
        return matches

    monkeypatch.setattr("statewise._src.plan.match.predicate", counting)
    types = (nnx.Param, nnx.BatchStat, nnx.Variable)
    value = jnp.ones(())
    model = nnx.List([types[number % 3](value) for number in range(10_000)])
    plan = sw.plan(model)
    assert len(plan.leaves) == 10_000
    assert len(plan["params"]) == 3334
    typed_kinds = len(sw.Kinds.standard()) - 1
    assert len(asked) == 3 * typed_kinds


def test_a_filter_that_looks_at_more_is_asked_for_every_leaf() -> None:
    seen: list[Any] = []

    def odd(path: Any, leaf: Any) -> bool:
        seen.append(path)
        return path[0] % 2 == 1

    model = nnx.List([nnx.Param(jnp.ones(())) for _ in range(6)])
    plan = sw.Kinds(odd=sw.Kind(odd), rest=sw.Kind(...)).plan(model)
    assert [leaf.kind for leaf in plan.leaves] == ["rest", "odd"] * 3
    assert seen == [(number,) for number in range(6)]


def test_filters_see_paths_relative_to_their_object() -> None:
    kinds = sw.Kinds(a=sw.Kind(sw.Path("a")), rest=sw.Kind(...))
    plan = kinds.plan(Node(a=nnx.Param(jnp.ones(1))), Node(a=nnx.Cache(jnp.ones(1)), b=nnx.Cache(jnp.ones(1))))
    assert [(leaf.path, leaf.kind) for leaf in plan.leaves] == [((0, "a"), "a"), ((1, "a"), "a"), ((1, "b"), "rest")]


def test_a_predicate_that_raises_names_the_leaf() -> None:
    kinds = sw.Kinds(small=sw.Kind(sw.Where(lambda path, leaf: leaf.ndim < 1 / 0)), rest=sw.Kind(...))
    with pytest.raises(sw.FilterError, match=r"raised ZeroDivisionError: division by zero\.\n  a: Param\(1,\) float32"):
        kinds.plan(Node(a=nnx.Param(jnp.ones(1))))


def test_names_come_in_the_order_of_the_declaration() -> None:
    kinds = sw.Kinds(late=sw.Kind(sw.Where(lambda path, leaf: True)), types=sw.Kind(nnx.Param), rest=sw.Kind(...))
    assert claimants(kinds)(("a",), nnx.Param(jnp.ones(1))) == ("late", "types")


class Tied(nnx.Module):
    def __init__(self) -> None:
        self.dec = nnx.Param(jnp.ones(2))
        self.enc = nnx.Dict(w=self.dec, b=nnx.Param(jnp.zeros(2)))


def test_a_frozen_kind_claims_a_tied_leaf_by_any_of_its_paths() -> None:
    plan = sw.Kinds(frozen=sw.Kind(sw.Path("enc/**"), frozen=True), rest=sw.Kind(...)).plan(Tied())
    assert [leaf.path for leaf in plan["frozen"]] == [("dec",), ("enc", "b")]
    assert plan["rest"] == ()


def test_kinds_that_claim_a_tied_leaf_by_different_paths_contest_it() -> None:
    kinds = sw.Kinds(one=sw.Kind(sw.Path("enc/**")), two=sw.Kind(sw.Path("dec")))
    with pytest.raises(sw.OverlapError) as caught:
        kinds.plan(Tied())
    assert [leaf.path for leaf in caught.value.leaves] == [("dec",)]
    assert caught.value.leaves[0].note == "claimed by two and one"
