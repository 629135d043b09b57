"""Objects by name: the name is the first segment of their paths, for filters as in print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise.cli import main
from two_objects import SGD, X, by, linear, matched, paths_of, refused, train


def kinds_with(pattern: str) -> sw.Kinds:
    return sw.Kinds(part=sw.Kind(sw.Path(pattern)), rest=sw.Kind(...))


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


def test_members_with_names_are_taken_inside_of_a_map() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    for names in (("policy",), ("policy", "reference")):
        made = [{name: nnx.Linear(2, 3, rngs=nnx.Rngs(key)) for name in names} for key in keys]
        ensemble = sw.plan(**made[0]).stacked(3)
        inside = jax.vmap(
            lambda key, ensemble=ensemble, names=names: ensemble.take(
                **{name: nnx.Linear(2, 3, rngs=nnx.Rngs(key)) for name in names}
            ),
            out_axes=ensemble.axes(),
        )(keys)
        assert inside.plan is ensemble
        outside = ensemble.stack([sw.plan(**made[0]).take(**each) for each in made])
        assert jax.tree.all(jax.tree.map(np.allclose, jax.tree.leaves(inside), jax.tree.leaves(outside)))


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
    assert paths_of(plan.excluded) == ["first/seen"]
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
        seen.compare(reference=policy, policy=reference)
    assert len(seen.changed["params"]) == 4
    with sw.watch(policy=policy, reference=reference) as seen:
        error = refused(lambda: seen.compare(policy=policy, other=reference), sw.StructureError)
    assert error.message == "The watched objects are policy, reference, but policy, other were passed."
    assert error.hint == "watch.compare(policy=policy, reference=reference)"
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
    assert error.message == f"{name!r} cannot name an object: it is the name of a parameter."
    assert error.hint == f"kinds.plan({name}_object=...)"


@pytest.mark.parametrize(
    ("name", "hint"), [("a b", "a_b"), ("class", "object_class"), ("1st", "object_1st"), ("", "object_")]
)
def test_a_name_is_an_identifier(name: str, hint: str) -> None:
    error = refused(lambda: sw.plan(**{name: linear(0)}))
    assert error.message == f"{name!r} cannot name an object: it is not a Python identifier."
    assert error.hint == f"kinds.plan({hint}=...)"


def test_positions_and_names_do_not_mix() -> None:
    first, second = linear(0), linear(1)
    plan = sw.plan(policy=first, reference=second)
    state = plan.take(first, second)
    for door, hint in (
        (lambda: sw.plan(first, reference=second), "kinds.plan(model=..., reference=reference)"),
        (lambda: sw.lint(first, reference=second), "sw.lint(model=..., reference=reference)"),
        (lambda: sw.watch(first, reference=second), "sw.watch(model=..., reference=reference)"),
        (lambda: plan.take(first, reference=second), "plan.take(policy=policy, reference=reference)"),
        (lambda: plan.put(state, first, reference=second), "plan.put(state, policy=policy, reference=reference)"),
    ):
        error = refused(door, sw.StructureError if hint.startswith("plan.") else sw.DeclarationError)
        assert error.message == "Pass objects by position or by name, not both: 1 and reference."
        assert error.hint == hint


def test_names_that_the_plan_does_not_have() -> None:
    first, second = linear(0), linear(1)
    plan = sw.plan(policy=first, reference=second)
    hint = "plan.take(policy=policy, reference=reference)"
    for named, words in (
        ({"policy": first}, "reference is missing"),
        ({"policy": first, "ref": second}, "reference is missing and ref is unknown"),
        ({"policy": first, "reference": second, "a": second, "b": first}, "a, b are unknown"),
    ):
        error = refused(lambda named=named: plan.take(**named), sw.StructureError)
        assert (error.message, error.hint) == (f"The plan has the objects policy, reference: {words}.", hint)
    error = refused(lambda: plan.take(first), sw.StructureError)
    assert (error.message, error.hint) == ("The plan is of 2 objects, but 1 are given.", "plan.take(policy, reference)")
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
    assert error.hint is not None
    assert len(error.hint.splitlines()) == 1
    begins = "the checkpoint's objects have names: plan them" if named else "the checkpoint's objects have no names"
    assert error.hint.startswith(begins)
    assert (
        "kinds.plan(policy=policy, reference=reference)" if named else "kinds.plan(policy, reference)"
    ) in error.hint
    assert "sw.transfer(restored, plan)" in error.hint
    restored, _ = sw.restore(tmp_path / "run", saved_plan.abstract())  # as the hint says
    moved = sw.transfer(restored, plan)
    assert moved.plan is plan
    assert jax.tree.all(jax.tree.map(np.array_equal, moved, other))


def test_one_of_several_named_objects_is_transferred() -> None:
    _, state = trained(named=True)
    actor = sw.Kinds(policy=sw.Kind(nnx.Param)).plan(linear(5))
    moved = sw.transfer(state, actor)
    assert np.array_equal(moved["policy"]["kernel"], state["policy"]["policy"]["kernel"])
