"""Several objects: what is printed as a path means that leaf, and objects can have names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
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
from statewise.cli import main

REST = sw.Kinds(rest=sw.Kind(...))


def linear(seed: int) -> nnx.Linear:
    return nnx.Linear(2, 2, rngs=nnx.Rngs(seed))


def paths_of(leaves: Any) -> list[str]:
    return [sw.format_path(leaf.path) for leaf in leaves]


def matched(model: Any, filter: Any) -> list[str]:
    found = sw.explain(model, filter)
    chosen = [path for path, yes in zip(paths_of(found.leaves), found.matched, strict=True) if yes]
    assert sw.count(model, filter) == len(chosen)
    assert len(nnx.to_flat_state(sw.select(model, filter))) == len(chosen)
    return chosen


def refused(make: Callable[[], Any], error: type[sw.StatewiseError] = sw.KindError) -> sw.StatewiseError:
    with pytest.raises(error) as caught:
        make()
    return caught.value


@sw.train_step
def train(policy: Any, reference: Any, x: jax.Array) -> jax.Array:
    return jnp.mean((policy(x) - reference(x) - 1) ** 2)


def by(first: str, second: str) -> sw.Kinds:
    return sw.Kinds(policy=sw.Kind(nnx.Param & sw.Path(first)), reference=sw.Kind(sw.Path(second), frozen=True))


SGD = {"policy": optax.adam(0.1)}
X = jnp.ones((3, 2))


# --- printed paths -----------------------------------------------------------------------------------------------


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
        assert error.mend is not None
        assert error.mend.startswith("kinds.plan(first=..., second=...)")
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
    assert error.mend is not None
    assert sw.count(model, eval(error.mend)) == 1
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


KEYS = st.one_of(
    st.integers(0, 2),
    st.sampled_from(["0", "1", "a", "b", "a/b", "w*", "w?", "**", "x[0]", "", ".", "1/a"]),
    st.tuples(st.sampled_from("ab"), st.integers(0, 1)),
)


def _tree(values: Any) -> Any:
    # One type of key in each dict: NNX sorts them.
    return st.sampled_from([int, str, tuple]).flatmap(
        lambda cls: st.dictionaries(KEYS.filter(lambda key: type(key) is cls), values, min_size=1, max_size=3)
    )


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
    try:
        plan = REST.plan(*objects)
    except sw.StatewiseError:
        return  # keys that NNX cannot sort
    for leaf in plan.leaves:
        for path in (leaf.path, *leaf.aliases):
            printed = sw.format_path(path)
            try:
                pattern = sw.Path(printed)
                chosen = matched(objects, pattern)
                part = kinds_with(printed).plan(*objects)["part"]
            except sw.FilterError as error:
                assert error.mend
                continue
            assert chosen == [sw.format_path(leaf.path)]
            assert [one.path for one in part] == [leaf.path]


# --- names -------------------------------------------------------------------------------------------------------


def test_names_are_the_first_segment_and_steps_get_the_objects_in_order() -> None:
    policy, reference = linear(0), linear(1)
    plan = by("policy/**", "reference/**").plan(policy=policy, reference=reference, optimizers=SGD)
    assert paths_of(plan.leaves[:4]) == ["policy/bias", "policy/kernel", "reference/bias", "reference/kernel"]
    assert "reference/kernel" in str(plan)
    state = plan.take(reference=reference, policy=policy)
    positional = by("0/**", "1/**").plan(policy, reference, optimizers=SGD)
    other = positional.take(policy, reference)
    for _ in range(4):
        state, loss = train(state, X)
        other, same = train(other, X)
        assert loss == same
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(other)))
    assert sorted(state["policy"]["policy"]) == ["bias", "kernel"]
    built = plan.build(state)
    assert np.array_equal(built[1].kernel[...], reference.kernel[...])
    plan.put(state, reference=reference, policy=policy)
    assert np.array_equal(policy.kernel[...], built[0].kernel[...])
    audit = sw.audit(train, state, X)
    assert {path.partition("/")[0] for path in paths_of(row.leaf for row in audit.leaves)} >= {"policy", "reference"}


def test_the_order_of_the_names_is_part_of_a_plan_and_of_nothing_else() -> None:
    policy, reference = linear(0), linear(1)
    one = sw.plan(policy=policy, reference=reference)
    assert one is sw.plan(policy=policy, reference=reference)
    assert one is not sw.plan(reference=reference, policy=policy)
    assert one is not sw.plan(policy, reference)
    assert paths_of(sw.plan(reference=reference, policy=policy).leaves)[0] == "reference/bias"
    first = sw.step(lambda a, b, x: a(x))
    assert np.array_equal(first(one.take(policy, reference), X), policy(X))
    swapped = sw.plan(reference=reference, policy=policy)
    assert np.array_equal(first(swapped.take(policy=policy, reference=reference), X), reference(X))


def test_one_object_may_have_a_name() -> None:
    model = linear(0)
    plan = sw.plan(model=model)
    assert paths_of(plan.leaves) == ["model/bias", "model/kernel"]
    state = plan.take(model)
    assert isinstance(plan.build(state), nnx.Linear)
    assert np.array_equal(sw.step(lambda model, x: model(x))(state, X), model(X))
    plan.put(state, model=model)
    made = plan.init(lambda: linear(0), jax.make_mesh((1,), ("data",)))
    assert np.array_equal(made["params"]["model"]["kernel"], model.kernel[...])


def test_filters_of_all_sorts_see_the_name() -> None:
    objects = {"policy": linear(0), "reference": linear(1)}
    for filter in (
        sw.Path("reference/**"),
        sw.Path("ref*/*"),
        nnx.PathContains("reference"),
        nnx.filterlib.PathIn(("reference", "bias"), ("reference", "kernel")),
        sw.Where(lambda path, leaf: path[0] == "reference"),
    ):
        plan = sw.Kinds(part=sw.Kind(filter), rest=sw.Kind(...)).plan(**objects)
        assert paths_of(plan["part"]) == ["reference/bias", "reference/kernel"]
        assert matched(objects, filter) == ["reference/bias", "reference/kernel"]
    error = refused(lambda: kinds_with("kernel").plan(**objects))
    assert "the nearest are policy/kernel, reference/kernel" in error.message


def test_functions_of_a_path_see_the_name() -> None:
    seen: set[Any] = set()

    def placement(path: Any, shape: Any) -> sw.Replicated:
        seen.add(path)
        return sw.Replicated()

    plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=placement)).plan(policy=linear(0), reference=linear(1))
    plan.shardings(jax.make_mesh((1,), ("data",)))
    expected = {(name, key) for name in ("policy", "reference") for key in ("bias", "kernel")}
    assert seen == expected
    seen.clear()
    plan.axes(params=lambda path, shape: seen.add(path))
    assert seen == expected


def test_an_optimizer_among_named_objects_follows_its_model() -> None:
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    kinds = sw.Kinds.standard().replace(
        params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), placement=sw.Sharded("data"))
    )
    plan = kinds.plan(model=model, optimizer=optimizer)
    assert paths_of(plan["params"]) == ["model/bias", "model/kernel"]
    shardings = plan.shardings(jax.sharding.AbstractMesh((4,), ("data",)))
    assert tuple(shardings["optimizer"]["optimizer"]["opt_state"][0]["mu"]["kernel"].spec) == ("data",)
    assert sw.lint(model=model, optimizer=optimizer) == []


def test_what_a_call_sows_stands_under_the_name() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "seen", x)
            return x * self.w[...]

    model = Sows()
    with_sown = Sows()
    with_sown.seen = nnx.Intermediate((jnp.ones(2),))
    plan = sw.plan(first=with_sown, second=model)
    assert paths_of(plan.dropped) == ["first/seen"]
    step = sw.step(capture="intermediates")(lambda first, second, x: second(x))
    _, captured = step(plan.take(first=with_sown, second=model), jnp.ones(2))
    assert list(captured) == ["second"]


def test_errors_of_steps_name_objects() -> None:
    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    state = sw.plan(policy=linear(0), norm=norm).take(linear(0), norm)
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(lambda policy, norm, x: norm(policy(x)))(state, X)
    assert paths_of(caught.value.leaves) == ["norm/mean", "norm/var"]
    assert "(written in BatchNorm norm)" in str(caught.value)


def test_raw_arrays_and_static_attributes_of_named_objects() -> None:
    class Raw(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.data(jnp.ones(2))
            self.on = True

    first, second = Raw(), Raw()
    plan = sw.plan(first=first, second=second)
    state = jax.tree.map(lambda array: array * 3, plan.take(first, second))
    plan.put(state, first=first, second=second)
    assert first.table[0] == second.table[0] == 3
    second.on = False
    error = refused(lambda: plan.take(first=first, second=second), sw.StructureError)
    assert "second/on: True in the plan, False in the model" in error.message


def test_named_objects_are_watched_and_linted() -> None:
    policy, reference = linear(0), linear(1)
    with sw.watch(policy=policy, reference=reference, expect="params") as seen:
        policy.bias[...] += 1
    assert paths_of(seen.changed["params"]) == ["policy/bias"]
    with sw.watch(policy=policy, reference=reference) as seen:
        seen.now(reference=policy, policy=reference)
    assert len(seen.changed["params"]) == 4
    with sw.watch(policy=policy, reference=reference) as seen:
        error = refused(lambda: seen.now(policy=policy, other=reference), sw.StructureError)
    assert error.message == "Watched are policy, reference, but handed over are policy, other."
    assert error.mend == "seen.now(policy=policy, reference=reference)"
    zeros = nnx.Dict(running_var=nnx.BatchStat(jnp.zeros(2)))
    (finding,) = sw.lint(policy=policy, statistics=zeros)
    assert paths_of(finding.leaves) == ["statistics/running_var"]
    (finding,) = sw.lint(sw.plan(policy=policy, statistics=zeros).take(policy, zeros))
    assert paths_of(finding.leaves) == ["statistics/running_var"]


@pytest.mark.parametrize("name", ["optimizers", "averages", "mesh", "copy", "pack", "kinds", "expect", "ignore"])
def test_an_argument_cannot_name_an_object(name: str) -> None:
    if name == "averages":
        error = refused(lambda: sw.plan(model=linear(0), averages=linear(1)))
    else:
        error = refused(lambda: sw.Kinds.standard().plan(**{"model": linear(0), name: linear(1)}))
    assert error.message == f"{name!r} cannot name an object: it is an argument's name."
    assert error.mend == f"kinds.plan({name}_object=...)"


@pytest.mark.parametrize(
    ("name", "mend"), [("a b", "a_b"), ("class", "object_class"), ("1st", "object_1st"), ("", "object_")]
)
def test_a_name_is_an_identifier(name: str, mend: str) -> None:
    error = refused(lambda: sw.plan(**{name: linear(0)}))
    assert error.message == f"{name!r} cannot name an object: it is not a Python identifier."
    assert error.mend == f"kinds.plan({mend}=...)"


def test_positions_and_names_do_not_mix() -> None:
    first, second = linear(0), linear(1)
    plan = sw.plan(policy=first, reference=second)
    state = plan.take(first, second)
    for door, mend in (
        (lambda: sw.plan(first, reference=second), "kinds.plan(model=..., reference=reference)"),
        (lambda: sw.lint(first, reference=second), "sw.lint(model=..., reference=reference)"),
        (lambda: sw.watch(first, reference=second), "sw.watch(model=..., reference=reference)"),
        (lambda: plan.take(first, reference=second), "plan.take(policy=policy, reference=reference)"),
        (lambda: plan.put(state, first, reference=second), "plan.put(state, policy=policy, reference=reference)"),
    ):
        error = refused(door)
        assert error.message == "Objects are given by position or by name, not both: 1 and reference."
        assert error.mend == mend


def test_names_that_the_plan_does_not_have() -> None:
    first, second = linear(0), linear(1)
    plan = sw.plan(policy=first, reference=second)
    mend = "plan.take(policy=policy, reference=reference)"
    for named, words in (
        ({"policy": first}, "reference is missing"),
        ({"policy": first, "ref": second}, "reference is missing and ref is not among them"),
        ({"policy": first, "reference": second, "a": second, "b": first}, "a, b are not among them"),
    ):
        error = refused(lambda named=named: plan.take(**named), sw.StructureError)
        assert (error.message, error.mend) == (f"The plan is of the objects policy, reference: {words}.", mend)
    error = refused(lambda: plan.take(first), sw.StructureError)
    assert (error.message, error.mend) == ("The plan is of 2 objects, but 1 are given.", "plan.take(policy, reference)")
    error = refused(lambda: sw.plan(first, second).take(policy=first, reference=second), sw.StructureError)
    assert error.message == "The plan's objects have no names, but policy, reference are given."
    with pytest.raises(sw.StructureError, match="is not what was planned"):
        plan.take(policy=first, reference=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


# --- kept, moved and shown ---------------------------------------------------------------------------------------


def trained(named: bool) -> tuple[Any, sw.State]:
    objects = {"policy": linear(0), "reference": linear(1)}
    if named:
        plan = by("policy/**", "reference/**").plan(**objects, optimizers=SGD)
    else:
        plan = by("0/**", "1/**").plan(*objects.values(), optimizers=SGD)
    return plan, train(plan.take(*objects.values()), X)[0]


def test_a_checkpoint_keeps_the_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, state = trained(named=True)
    sw.save(tmp_path / "run", state)
    restored, report = sw.restore(tmp_path / "run", plan.abstract())
    assert report.ok if hasattr(report, "ok") else report
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))
    assert not sw.diff(tmp_path / "run", state)
    page = sw.report(plan)
    assert "reference/kernel" in [sw.format_path(leaf.leaf.path) for leaf in page.leaves]
    assert main(["report", str(tmp_path / "run"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "reference/kernel" in [leaf["path"] for leaf in shown["leaves"]]
    ours, _ = sw.restore(tmp_path / "run", state, only="reference")
    assert np.array_equal(ours["reference"]["reference"]["kernel"], state["reference"]["reference"]["kernel"])


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_of_objects_with_names_and_a_plan_without_and_the_reverse(tmp_path: Path, named: bool) -> None:
    saved_plan, state = trained(named)
    plan, other = trained(not named)
    sw.save(tmp_path / "run", state)
    error = refused(lambda: sw.restore(tmp_path / "run", plan.abstract()), sw.RestoreError)
    assert error.mend is not None
    assert len(error.mend.splitlines()) == 1
    begins = "the checkpoint's objects have names: plan them so" if named else "the checkpoint's objects have no names"
    assert error.mend.startswith(begins)
    assert (
        "kinds.plan(policy=policy, reference=reference)" if named else "kinds.plan(policy, reference)"
    ) in error.mend
    assert "sw.transfer(restored, plan)" in error.mend
    restored, _ = sw.restore(tmp_path / "run", saved_plan.abstract())  # as the hint says
    moved = sw.transfer(restored, plan)
    assert moved.plan is plan
    assert jax.tree.all(jax.tree.map(np.array_equal, moved, other))


def test_one_of_several_named_objects_is_transferred() -> None:
    _, state = trained(named=True)
    actor = sw.Kinds(policy=sw.Kind(nnx.Param)).plan(linear(5))
    moved = sw.transfer(state, actor)
    assert np.array_equal(moved["policy"]["kernel"], state["policy"]["policy"]["kernel"])
