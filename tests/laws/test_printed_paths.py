"""Of several objects, what is printed as a path means that leaf, or is refused because it could mean another too."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from two_objects import SGD, X, by, linear, matched, paths_of, refused, train

REST = sw.Kinds(rest=sw.Kind(...))


@pytest.mark.parametrize(
    ("pattern", "means"),
    [
        ("1/kernel", ["1/kernel"]),
        ("1/**", ["1/bias", "1/kernel"]),
        ("0/*", ["0/bias", "0/kernel"]),
        ("1/k*", ["1/kernel"]),
        ("kernel", ["0/kernel", "1/kernel"]),
        ("**/kernel", ["0/kernel", "1/kernel"]),
        ("*", ["0/bias", "0/kernel", "1/bias", "1/kernel"]),
        ("2/kernel", []),
        ("01/kernel", []),
    ],
)
def test_a_pattern_is_read_relative_to_each_object_and_as_it_is_printed(pattern: str, means: list[str]) -> None:
    objects = [linear(0), linear(1)]
    assert matched(objects, sw.Path(pattern)) == means
    assert matched(objects, nnx.Param & sw.Path(pattern)) == means
    assert len(matched(objects, ~sw.Path(pattern))) == 4 - len(means)
    if means:
        kinds = sw.Kinds(part=sw.Kind(sw.Path(pattern))) | (REST if len(means) < 4 else sw.Kinds())
        assert paths_of(kinds.plan(*objects)["part"]) == means
        assert sw.census(objects, kinds)["part"].leaves == len(means)
        assert len(nnx.to_flat_state(sw.split(objects, kinds)[1]["part"])) == len(means)
        with sw.watch(objects, kinds) as seen:
            pass
        assert paths_of(seen.unchanged["part"]) == means
        assert sw.lint(*objects, kinds=kinds) == []


def test_the_frozen_reference_of_the_issue_stays_as_it_is() -> None:
    policy, reference = linear(0), linear(1)
    plan = by("0/**", "1/**").plan(policy, reference, optimizers=SGD)
    state = plan.take(policy, reference)
    for _ in range(3):
        state, _ = train(state, X)
    trained, kept = plan.build(state)
    assert np.array_equal(kept.kernel[...], reference.kernel[...])
    assert not np.array_equal(trained.kernel[...], policy.kernel[...])


def test_what_could_mean_two_leaves_is_refused_and_names_both() -> None:
    objects = linear(0), nnx.List([linear(1)])
    for door in (
        lambda: sw.Kinds(part=sw.Kind(sw.Path("0/kernel")), rest=sw.Kind(...)).plan(*objects),
        lambda: sw.Kinds(part=sw.Kind(nnx.Param & ~sw.Path("0/kernel")), rest=sw.Kind(...)).plan(*objects),
        lambda: sw.select(objects, sw.Path("0/kernel")),
        lambda: sw.count(objects, nnx.Param, sw.Path("0/kernel")),
        lambda: sw.explain(objects, sw.Path("0/kernel")),
        lambda: sw.lint(*objects, kinds=sw.Kinds(part=sw.Kind(sw.Path("0/kernel")), rest=sw.Kind(...))),
        lambda: sw.watch(objects, sw.Kinds(part=sw.Kind(sw.Path("0/kernel")), rest=sw.Kind(...))).__enter__(),
    ):
        error = refused(door, sw.FilterError)
        assert error.message == "Path('0/kernel') could mean 0/kernel or 1/0/kernel."
        assert [str(leaf) for leaf in error.leaves] == [
            "0/kernel: Param(2, 2) float32  (by the path as it is printed)",
            "1/0/kernel: Param(2, 2) float32  (by the path within object 1)",
        ]
        assert error.hint is not None
        assert error.hint.startswith("kinds.plan(first=..., second=...)")
    assert matched(objects, sw.Path("1/0/kernel")) == ["1/0/kernel"]
    named = sw.Kinds(part=sw.Kind(sw.Path("first/kernel")), rest=sw.Kind(...))
    assert paths_of(named.plan(first=objects[0], second=objects[1])["part"]) == ["first/kernel"]


def test_the_aliases_of_a_tied_leaf_mean_it_too() -> None:
    shared = nnx.Param(jnp.ones(2))
    objects = nnx.Dict(embed=shared), nnx.Dict(head=shared, other=nnx.Param(jnp.ones(2)))
    for pattern in ("0/embed", "1/head", "embed", "head"):
        assert matched(objects, sw.Path(pattern)) == ["0/embed"]
        assert matched(objects, ~sw.Path(pattern)) == ["1/other"]
        plan = sw.Kinds(part=sw.Kind(sw.Path(pattern)), rest=sw.Kind(...)).plan(*objects)
        assert paths_of(plan["part"]) == ["0/embed"]
    assert matched(nnx.Dict(embed=shared, head=shared), sw.Path("head")) == ["embed"]


def test_keys_that_are_written_alike_are_refused_with_a_filter_that_helps() -> None:
    model = {"a/b": nnx.Param(jnp.ones(2)), "a": {"b": nnx.Param(jnp.ones(3))}}
    error = refused(lambda: sw.select(model, sw.Path("a/b")), sw.FilterError)
    assert (
        error.message == "Path('a/b') could mean the leaf at ('a', 'b') or that at ('a/b',), which are written alike."
    )
    assert error.hint is not None
    assert sw.count(model, eval(error.hint)) == 1
    stars = {"w*": nnx.Param(jnp.ones(2)), "w1": nnx.Param(jnp.ones(3))}
    error = refused(lambda: REST.plan(stars) and kinds_with("w*").plan(stars), sw.FilterError)
    assert error.message == "Path('w*') could mean the leaf at ('w*',) or that at ('w1',)."
    assert sw.count(stars, sw.Path("w?")) == 2
    assert matched({"w*": nnx.Param(jnp.ones(2)), "v": nnx.Param(jnp.ones(3))}, sw.Path("w*")) == ["w*"]


def kinds_with(pattern: str) -> sw.Kinds:
    return sw.Kinds(part=sw.Kind(sw.Path(pattern)), rest=sw.Kind(...))


def test_functions_in_filters_get_the_plain_path_within_the_object() -> None:
    seen: list[Any] = []
    sw.count([linear(0), linear(1)], sw.Where(lambda path, leaf: seen.append(path) or True) & sw.Path("1/**"))
    assert {type(path) for path in seen} == {tuple}
    assert set(seen) == {("kernel",), ("bias",)}


KEYS = {
    int: st.integers(0, 2),
    str: st.sampled_from(["0", "1", "a", "b", "cd", "a/b", "w*", "w?", "**", "x[0]", "", ".", "1/a"]),
    tuple: st.tuples(st.sampled_from("ab"), st.integers(0, 1)),
}


def _tree(values: Any) -> Any:
    # One type of key in each dict: NNX sorts them.
    return st.sampled_from(list(KEYS)).flatmap(lambda cls: st.dictionaries(KEYS[cls], values, min_size=1, max_size=3))


TREES = _tree(st.one_of(st.none(), _tree(st.none())))


def _objects(tree: Any, shared: nnx.Variable) -> Any:
    made: dict[Any, Any] = {}
    for number, (key, value) in enumerate(tree.items()):
        tied = value is None and number == 1
        made[key] = shared if tied else nnx.Param(jnp.ones(())) if value is None else _objects(value, shared)
    return made


@given(st.lists(TREES, min_size=2, max_size=3))
def test_every_printed_path_means_its_leaf_or_is_refused(trees: list[Any]) -> None:
    shared = nnx.Param(jnp.ones(()))
    objects = [_objects(tree, shared) for tree in trees]
    plan = REST.plan(*objects)
    keys = [str(key) for leaf in plan.leaves for path in (leaf.path, *leaf.aliases) for key in path[1:]]
    odd = [key for key in keys if not key or set("0123456789*?[]/") & set(key)]
    for leaf in plan.leaves:
        for path in (leaf.path, *leaf.aliases):
            printed = sw.format_path(path)
            try:
                pattern = sw.Path(printed)
                chosen = matched(objects, pattern)
                part = kinds_with(printed).plan(*objects)["part"]
            except sw.FilterError as error:
                assert error.hint  # noqa: PT017
                # Only where keys are written like positions, patterns or several keys.
                assert odd
                continue
            assert chosen == [sw.format_path(leaf.path)]
            assert [one.path for one in part] == [leaf.path]
