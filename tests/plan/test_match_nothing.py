"""A kind that spells a path has to find it: a handling is never lost because a path was mistyped."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw


class Model(nnx.Module):
    def __init__(self) -> None:
        self.backbone = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 1, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.backbone(x))


def kinds_of(filter: Any, **handling: Any) -> sw.Kinds:
    return sw.Kinds(part=sw.Kind(filter, **handling), rest=sw.Kind(...))


def refused(make: Callable[[], Any], error: type[sw.StatewiseError] = sw.DeclarationError) -> sw.StatewiseError:
    with pytest.raises(error) as caught:
        make()
    return caught.value


def fixed(error: sw.StatewiseError, kinds: sw.Kinds) -> list[sw.Kinds]:
    """What each of the hint's lines makes of the kinds."""
    assert error.hint is not None
    made = []
    for line in error.hint.splitlines():
        code = line.removeprefix("or, if there need not be any: ")
        scope: dict[str, Any] = {"kinds": kinds, "sw": sw, "nnx": nnx, "dataclasses": dataclasses}
        exec(code, scope)
        made.append(scope["kinds"])
    return made


SLIPS = {
    "backbone with an underscore": (sw.Path("back_bone/**"), "backbone/bias, backbone/kernel"),
    "with a type": (nnx.Param & sw.Path("backbon/**"), "backbone/bias, backbone/kernel"),
    "the last key": (sw.Path("backbone/kernal"), "backbone/kernel"),
    "without what is above": (sw.Path("kernel"), "backbone/kernel, head/kernel"),
    "upper case": (sw.Path("Backbone/**"), "backbone/bias, backbone/kernel"),
    "by NNX's own": (nnx.All(nnx.Param, nnx.PathContains("backbnoe")), "backbone/bias, backbone/kernel"),
    "negated twice": (nnx.Not(nnx.Not(sw.Path("back_bone/**"))), "backbone/bias, backbone/kernel"),
    "in a list": ([nnx.Cache, sw.Path("haed/*")], "head/bias, head/kernel"),
}


@pytest.mark.parametrize("slip", SLIPS.values(), ids=SLIPS.keys())
def test_a_path_that_is_not_there_is_an_error_that_names_the_nearest_and_both_hints_help(slip: Any) -> None:
    filter, near = slip
    kinds = kinds_of(filter, frozen=True)
    error = refused(lambda: kinds.plan(Model()))
    assert error.message.startswith("Kind 'part' claims no leaf: ")
    assert error.message.endswith(f" matches no path, the nearest are {near}.")
    assert error.kind == "part"
    corrected, optional = fixed(error, kinds)
    plan = corrected.plan(Model())
    assert [sw.format_path(leaf.path) for leaf in plan["part"]] == near.split(", ")
    assert plan.kinds["part"].frozen
    assert optional.plan(Model())["part"] == ()
    assert optional["part"].frozen


@pytest.mark.parametrize(
    "filter",
    [sw.Path("optimizer/**/nothing/like/that"), nnx.filterlib.PathIn(("encoder", "w")), nnx.PathContains("zzz")],
    ids=["path", "path in", "contains"],
)
def test_where_nothing_is_near_the_nearest_are_named_and_the_hint_declares_it_optional(filter: Any) -> None:
    kinds = kinds_of(filter)
    error = refused(lambda: kinds.plan(Model()))
    assert "the nearest are " in error.message
    (optional,) = fixed(error, kinds)
    assert optional.plan(Model())["part"] == ()


def test_all_such_kinds_are_told_at_once_with_the_leaves_that_nobody_claims() -> None:
    kinds = sw.Kinds(body=sw.Kind(sw.Path("bacbone/**"), frozen=True), head=sw.Kind(sw.Path("haed/**")))
    error = refused(lambda: kinds.plan(Model()))
    assert error.message == (
        "Kind 'body' claims no leaf: Path('bacbone/**') matches no path, the nearest are backbone/bias, "
        "backbone/kernel. Kind 'head' claims no leaf: Path('haed/**') matches no path, the nearest are head/bias, "
        "head/kernel. 4 leaves are claimed by no kind."
    )
    assert [sw.format_path(leaf.path) for leaf in error.leaves] == [
        "backbone/bias",
        "backbone/kernel",
        "head/bias",
        "head/kernel",
    ]
    assert error.kind is None


@pytest.mark.parametrize(
    "union",
    [
        sw.Path("backbone/**") | sw.Path("haed/**"),
        nnx.Any(sw.Path("backbone/**"), nnx.All(nnx.Param, sw.Path("haed/**"))),
        (nnx.PathContains("backbone"), nnx.PathContains("haed")),
        nnx.filterlib.PathIn(("backbone", "kernel"), ("haed", "kernel")),
    ],
    ids=["ours", "nested", "contains", "path in"],
)
def test_one_lost_path_of_a_union_is_an_error_too(union: Any) -> None:
    error = refused(lambda: kinds_of(union, frozen=True).plan(Model()))
    assert error.message.startswith("Kind 'part' spells a path that does not exist: ")
    assert "haed" in error.message
    assert "head/kernel" in error.message
    assert len(kinds_of(union, frozen=True, optional=True).plan(Model())["part"]) in (1, 2)


def test_paths_that_are_there_but_of_other_types() -> None:
    kinds = kinds_of(nnx.BatchStat & sw.Path("backbone/**"))
    error = refused(lambda: kinds.plan(Model()))
    assert error.message == (
        "Kind 'part' claims no leaf: BatchStat & Path('backbone/**') matches none, although its paths exist: "
        "backbone/bias (Param), backbone/kernel (Param)."
    )
    (optional,) = fixed(error, kinds)
    assert optional.plan(Model())["part"] == ()


@pytest.mark.parametrize(
    "filter",
    [
        nnx.Cache,
        sw.Exactly(nnx.Variable),
        "tag",
        sw.Meta("role", "ema"),
        sw.Where(lambda path, leaf: False),
        nnx.Cache & sw.Path("**"),  # every path
        nnx.Cache & ~sw.Path("backbone/**"),
        nnx.All(nnx.Cache, nnx.Not((sw.Path("nowhere/**"), nnx.PathContains("nobody")))),
    ],
    ids=str,
)
def test_what_spells_no_path_may_claim_nothing(filter: Any) -> None:
    plan = kinds_of(filter).plan(Model())
    assert plan["part"] == ()
    assert len(plan["rest"]) == 4


WORDS = st.text("abcde_", min_size=1, max_size=6)


@given(st.sets(WORDS, min_size=2, max_size=5), st.sets(WORDS, min_size=1, max_size=3), st.booleans())
def test_a_plan_is_made_if_and_only_if_every_spelled_path_is_there(
    keys: set[str], asked: set[str], union: bool
) -> None:
    model = nnx.Dict({key: nnx.Dict(w=nnx.Param(jnp.ones(()))) for key in keys})
    filters = [sw.Path(f"{key}/**") if union else nnx.PathContains(key) for key in sorted(asked)]
    kinds = kinds_of(tuple(filters), frozen=True)
    if asked <= keys:
        assert len(kinds.plan(model)["part"]) == len(keys & asked)
        return
    error = refused(lambda: kinds.plan(model))
    for key in asked - keys:
        assert key in error.message
    near = error.message.rpartition("the nearest are ")[2].rstrip(".").split(", ")
    assert set(near) <= {f"{key}/w" for key in keys}
    for made in fixed(error, kinds):
        assert made.plan(model).kinds["part"].frozen
    assert len(kinds_of(tuple(filters), optional=True).plan(model)["part"]) == len(keys & asked)


def test_optional_is_part_of_a_kind() -> None:
    kind = sw.Kind(sw.Path("adapter/**"), saved=False, optional=True)
    assert kind.handling() == "not saved, optional"
    assert kind == pickle.loads(pickle.dumps(kind))
    assert kind != sw.Kind(sw.Path("adapter/**"), saved=False)
    assert hash(kind) != hash(sw.Kind(sw.Path("adapter/**"), saved=False))
    counted = sw.census(Model(), sw.Kinds(adapter=kind, rest=sw.Kind(...)))
    assert counted["adapter"].leaves == 0
    assert "not saved, optional" in str(counted)


def test_every_door_that_takes_kinds_says_it() -> None:
    model, kinds = Model(), kinds_of(sw.Path("back_bone/**"), frozen=True)
    doors: list[Callable[[], Any]] = [
        lambda: kinds.plan(model),
        lambda: kinds.plan(model, optimizers={"rest": optax.sgd(0.1)}),
        lambda: kinds.plan(nnx.eval_shape(Model)),
        lambda: sw.census(model, kinds),
        lambda: sw.split(model, kinds),
        lambda: sw.report(model, kinds=kinds),
        lambda: sw.diff(model, Model(), kinds=kinds),
        lambda: sw.watch(model, kinds).__enter__(),
    ]
    for door in doors:
        assert "the nearest are backbone/bias, backbone/kernel" in refused(door).message


def test_a_leaf_lost_while_it_is_watched_is_seen_not_refused() -> None:
    model = nnx.Dict(a=nnx.Param(jnp.ones(2)), b=nnx.Param(jnp.ones(2)))
    kinds = sw.Kinds(a=sw.Kind(sw.Path("a")), rest=sw.Kind(...))
    with sw.watch(model, kinds) as seen:
        del model["a"]
    assert list(seen.changed) == ["a"]


def test_a_kind_of_what_was_sown_has_claimed_it() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "seen", x)
            return x * self.w[...]

    kinds = sw.Kinds(seen=sw.Kind(sw.Path("seen"), saved=False), rest=sw.Kind(...))
    model = Sows()
    assert "the nearest are w" in refused(lambda: kinds.plan(model)).message
    model.seen = nnx.Intermediate((jnp.ones(2),))
    plan = kinds.plan(model)
    assert plan["seen"] == ()
    assert [sw.format_path(leaf.path) for leaf in plan.excluded] == ["seen"]
    assert sw.lint(plan) == []


def test_a_tied_leaf_is_found_by_any_of_its_paths() -> None:
    model = nnx.Dict(embed=nnx.Param(jnp.ones(2)))
    model["head"] = model["embed"]
    plan = kinds_of(sw.Path("head"), frozen=True).plan(model)
    assert [leaf.kind for leaf in plan.leaves] == ["part"]


def test_a_contested_kind_that_gives_way_wholly_is_written_as_optional() -> None:
    kinds = sw.Kinds(wide=sw.Kind(nnx.Param & sw.Path("head/*")), narrow=sw.Kind(sw.Path("head/**")), rest=sw.Kind(...))
    error = refused(lambda: kinds.plan(Model()), sw.OverlapError)
    (made,) = fixed(error, kinds)
    plan = made.plan(Model())
    assert sorted(len(plan[kind]) for kind in ("wide", "narrow")) == [0, 2]


# --- other doors at which a name or a filter that means nothing would be passed over -----------------------------


def test_kinds_without_leaves_are_not_restored_saved_or_transferred(tmp_path: Any) -> None:
    plan = sw.plan(Model())
    state = plan.take(Model())
    sw.save(tmp_path / "all", state)
    for door in (
        lambda: sw.save(tmp_path / "none", state, only="lora"),
        lambda: sw.restore(tmp_path / "all", state, only="lora"),
        lambda: sw.preview(tmp_path / "all", state, only=("lora", "stats")),
    ):
        error = refused(door)
        assert "does not name a kind that has leaves in this model." in error.message
        assert error.hint == "those that have: params"
    assert not (tmp_path / "none").exists()
    error = refused(lambda: sw.transfer(state, state, kinds="lora"))
    assert (error.message, error.hint) == (
        "kinds='lora' does not name a kind that has leaves.",
        "those that have: params",
    )
    restored, report = sw.restore(tmp_path / "all", state, only=("params", "stats"))  # one of them has
    assert [leaf.outcome for leaf in report.leaves] == ["restored"] * 4
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))


def test_gradients_by_a_path_that_is_not_there_name_the_nearest() -> None:
    gradients = sw.grad(lambda model, x, rngs: model(x).sum(), wrt=sw.Path("haed/**"))
    error = refused(lambda: gradients(Model(), jnp.ones((1, 2)), nnx.Rngs(0)), sw.FilterError)
    assert error.message == (
        "wrt=Path('haed/**') matches no leaf of the model, so there is nothing to differentiate.  "
        "The nearest paths are head/bias, head/kernel."
    )


# --- lint --------------------------------------------------------------------------------------------------------


def codes(*args: Any, **kwargs: Any) -> list[str]:
    return [finding.code for finding in sw.lint(*args, **kwargs)]


def test_lint_finds_what_a_plan_would_refuse() -> None:
    (finding,) = sw.lint(Model(), kinds=kinds_of(sw.Path("back_bone/**"), frozen=True))
    assert finding.code == "path-matches-nothing"
    assert finding.message.endswith("the nearest are backbone/bias, backbone/kernel.")
    assert codes(Model(), kinds=kinds_of(sw.Path("back_bone/**"), frozen=True, optional=True)) == []


def test_lint_finds_a_path_that_is_left_out_and_not_there() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param & ~sw.Path("back_bone/**")), rest=sw.Kind(...))
    for subject in (kinds.plan(Model()), kinds.plan(Model()).take(Model())):
        (finding,) = sw.lint(subject)
        assert finding.code == "path-matches-nothing"
        assert finding.message == (
            "The kind 'params' leaves out Path('back_bone/**'), which matches no path; the nearest are backbone/bias, "
            "backbone/kernel."
        )
    error = sw.DeclarationError(finding.message, hint=finding.hint)
    corrected, optional = fixed(error, kinds)
    assert len(corrected.plan(Model())["params"]) == 2
    assert codes(Model(), kinds=corrected) == []
    assert codes(Model(), kinds=optional) == []


def test_lint_finds_an_optimizer_whose_path_is_not_there() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.All(nnx.Param, sw.Path("haed/**")))
    (finding,) = sw.lint(model, optimizer)
    assert finding.code == "path-matches-nothing"
    assert finding.message == (
        "The nnx.Optimizer at 1 has wrt=Param & Path('haed/**'), where Path('haed/**') matches no path; "
        "the nearest are 0/head/bias, 0/head/kernel."
    )
    for wrt in (sw.Path("head/**"), nnx.Param, nnx.PathContains("kernel")):
        assert "path-matches-nothing" not in codes(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=wrt))


def test_lint_finds_a_frozen_kind_that_claims_nothing() -> None:
    kinds = kinds_of(sw.Where(lambda path, leaf: "backbnoe" in path), frozen=True)
    assert codes(Model(), kinds=kinds) == ["frozen-kind-empty"]
    assert codes(kinds.plan(Model())) == ["frozen-kind-empty"]
    assert codes(Model(), kinds=kinds_of(nnx.Cache, saved=False)) == []
    assert codes(Model(), kinds=kinds_of(nnx.LoRAParam, frozen=True, optional=True)) == []
