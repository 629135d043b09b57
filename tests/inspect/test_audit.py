"""`audit`: what a step reads, writes, differentiates and would lose, told without running it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from audited import Net, X, loss_of, where
from refusals import refused


def planned(model: Any, **optimizers: Any) -> sw.Plan:
    return sw.plan(model, optimizers=optimizers or None)


def audit_of(step: Any, *args: Any, **optimizers: Any) -> sw.results.Audit:
    return sw.audit(step, planned(Net(nnx.Rngs(0)), **optimizers).abstract(), *args)


# --- what is told ------------------------------------------------------------------------------------------------


def test_a_train_step_is_told_leaf_by_leaf() -> None:
    audit = audit_of(sw.train_step(loss_of, writes="cache"), X, params=optax.adam(1e-3))
    trained = ["dense/bias", "dense/kernel", "norm/bias", "norm/scale", "unused"]
    assert where(audit["params"], "differentiated") == trained
    assert where(audit["params"], "updated") == trained
    assert where(audit["params"], "zero_gradient") == ["unused"]
    assert where(audit["stats"], "written") == ["norm/mean", "norm/var"]
    assert where(audit["stats"], "updated") == []
    assert where(audit["rng"], "read") == ["drop/rngs/count", "drop/rngs/key"]
    assert where(audit["rng"], "written") == ["drop/rngs/count"]
    assert where(audit["variables"], "written") == ["hits"]
    # The cache is overwritten whole: what was in it is not needed, yet its buffer is.
    (cache,) = audit["cache"]
    assert (cache.read, cache.written, cache.passed_to_jit, cache.donated, cache.returned) == (
        False,
        True,
        True,
        True,
        True,
    )
    assert (cache.saved, cache.written_but_not_saved, cache.restarts) == (False, True, True)
    assert all(row.updated and row.read and row.written for row in audit["optimizer"])
    assert (audit.trains, audit.error, audit.step) == (True, None, "loss_of")


def test_options_of_training_do_not_change_what_is_told() -> None:
    options: dict[str, Any] = {"writes": "cache", "microbatches": 2, "nonfinite": "skip"}
    state = planned(Net(nnx.Rngs(0)), params=optax.adam(1e-3)).abstract()
    plain, split = (sw.audit(sw.train_step(loss_of, **own), state, X) for own in ({"writes": "cache"}, options))
    # Where a step may change nothing, it keeps the old cache, which is then read.
    differ = [(one, other) for one, other in zip(plain.leaves, split.leaves, strict=True) if one != other]
    assert [(one.path, one.read, other.read) for one, other in differ] == [(("last",), False, True)]
    assert differ[0][1] == dataclasses.replace(differ[0][0], read=True)


def test_what_deserves_a_look_has_a_name() -> None:
    audit = audit_of(sw.train_step(loss_of, writes="cache"), X, params=optax.adam(1e-3))
    assert where(audit.untrained) == ["unused"]
    assert where(audit.ephemeral_writes) == ["last"]
    assert where(audit.unread) == []
    assert audit.undeclared == ()


def test_an_evaluation_reads_and_writes_nothing() -> None:
    def evaluate(model: Net, x: jax.Array) -> jax.Array:
        model.eval()
        return model.norm(model.dense(x))

    audit = audit_of(sw.step(evaluate), X, params=optax.sgd(0.1))
    assert [row for row in audit.leaves if row.written or row.donated or row.differentiated] == []
    assert where(audit.leaves, "passed_to_jit") == where(audit.leaves, "read")
    assert where(audit["params"], "read") == ["dense/bias", "dense/kernel", "norm/bias", "norm/scale"]
    assert where(audit.unread) == ["unused", "last", "drop/rngs/count", "drop/rngs/key", "hits"]


def test_it_is_what_the_compiled_step_does() -> None:
    """The leaves that a call replaces are those that the audit says come back; those it says are lost are not saved."""
    model = Net(nnx.Rngs(0))
    state = planned(model, params=optax.adam(1e-2)).take(model)
    step = sw.train_step(loss_of, writes="cache")
    x = jax.random.normal(jax.random.key(0), X.shape)
    audit = sw.audit(step, state, x)
    new, _ = step(state, x)
    before, after = (
        {sw.format_path((key.key,)): array for (key,), array in jax.tree_util.tree_flatten_with_path(s)[0]}
        for s in (state, new)
    )
    replaced = {name for name in before if after[name] is not before[name]}
    rows = dict(zip(before, audit.leaves, strict=True))
    assert {name for name, row in rows.items() if row.returned} == replaced
    # XLA has no use for the buffer of the cache, which is not read.
    assert {name for name, row in rows.items() if row.donated and row.read} == {
        name for name, array in before.items() if array.is_deleted()
    }


def test_an_undeclared_write_is_reported_and_not_raised() -> None:
    def evaluate(model: Net, x: jax.Array) -> jax.Array:
        return model.norm(model.dense(x))

    model = Net(nnx.Rngs(0))
    plan = planned(model)
    audit = sw.audit(sw.step(evaluate), plan.abstract(), X)
    assert where(audit.undeclared) == ["norm/mean", "norm/var"]
    assert audit.counts["stats"].undeclared == 2
    with pytest.raises(sw.UndeclaredWriteError) as caught:
        sw.step(evaluate)(plan.take(model), jnp.ones(X.shape))
    assert audit.error is not None
    assert str(audit.error) == str(caught.value)
    assert audit.error.leaves == caught.value.leaves
    assert sw.audit(sw.step(evaluate, writes="stats"), plan.abstract(), X).error is None


def test_a_frozen_kind_that_is_written_is_undeclared() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, frozen=True), rest=sw.Kind(...))

    def move(model: Net) -> None:
        model.unused[...] += 1

    audit = sw.audit(sw.step(move), kinds.plan(Net(nnx.Rngs(0))).abstract())
    assert where(audit.undeclared) == ["unused"]
    assert "the kind is frozen" in str(audit.error)


def test_a_tied_leaf_is_one_row_and_a_leaf_of_several_arrays_too() -> None:
    embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    model = nnx.Dict(embed=embed, head=nnx.Dict(kernel=embed.embedding), pair=nnx.Variable((jnp.ones(2), jnp.ones(3))))
    model.empty = nnx.Variable(None)
    audit = sw.audit(sw.step(lambda model: model.pair.get_value()[1]), planned(model).abstract())
    assert [(sw.format_path(row.path), row.read) for row in audit.leaves] == [
        ("embed/embedding", False),
        ("empty", False),
        ("pair", True),
    ]
    assert audit["params"][0].leaf.aliases == (("head", "kernel"),)


def test_of_two_optimizers_the_one_that_does_not_run_is_not_read() -> None:
    model = nnx.Dict(a=nnx.Param(jnp.ones(2)), b=nnx.LoRAParam(jnp.ones(2)))
    plan = planned(model, params=optax.adam(1e-3), lora=optax.adam(1e-3))
    audit = sw.audit(sw.train_step(lambda m: (m.a[...] * m.b[...]).sum(), wrt="lora"), plan.abstract())
    assert [(row.differentiated, row.updated, row.read, row.written) for row in audit["params"]] == [
        (False, False, True, False)
    ]
    mine = [row for row in audit["optimizer"] if row.path[1] == "lora"]
    others = [row for row in audit["optimizer"] if row.path[1] == "params"]
    assert all(row.updated and row.read for row in mine)
    assert not any(row.read or row.written or row.passed_to_jit for row in others)
    assert where(audit.untrained) == []


def test_packed_leaves_travel_with_their_neighbours() -> None:
    model = nnx.Dict({name: nnx.Variable(jnp.ones(3)) for name in "abcde"} | {"big": nnx.Variable(jnp.ones(20_000))})
    state = planned(model).take(model, pack=True)

    def move(model: Any) -> None:
        model["a"][...] += 1

    audit = sw.audit(sw.step(move, writes="variables"), state)
    assert where(audit.leaves, "packed") == ["a", "b", "c", "d", "e"]
    assert where(audit.leaves, "donated") == ["a", "b", "c", "d", "e"]
    assert where(audit.leaves, "written") == where(audit.leaves, "read") == ["a"]
    assert "packed" in str(audit)


def test_training_a_packed_state_writes_the_same_leaves() -> None:
    model = Net(nnx.Rngs(0))
    plan, step = planned(model, params=optax.adam(1e-3)), sw.train_step(loss_of, writes="cache")
    facts = ("read", "written", "updated", "differentiated", "zero_gradient", "undeclared", "written_but_not_saved")

    def told(audit: sw.results.Audit) -> list[Any]:
        return [(row.path, *(getattr(row, fact) for fact in facts)) for row in audit.leaves]

    packed = sw.audit(step, plan.take(model, pack=True), X)
    assert any(row.packed for row in packed.leaves)
    assert told(packed) == told(sw.audit(step, plan.abstract(), X))


# --- nothing runs ------------------------------------------------------------------------------------------------


def test_nothing_runs_or_is_compiled_and_the_state_is_left_alone() -> None:
    def body(model: Net, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return loss_of(model, x)

    model = Net(nnx.Rngs(0))
    state = planned(model, params=optax.adam(1e-3)).take(model)
    step = sw.train_step(body, writes="cache")
    sw.audit(step, state, X)
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))
    assert step._entries == {}
    huge = nnx.eval_shape(lambda: nnx.Linear(1 << 17, 1 << 17, rngs=nnx.Rngs(0)))
    audit = sw.audit(
        sw.train_step(lambda model, x: model(x).mean()),
        planned(huge, params=optax.adam(1e-3)).abstract(),
        jax.ShapeDtypeStruct((8, 1 << 17), jnp.float32),
    )
    assert audit.counts["params"].written == 2


def test_the_function_is_called_once() -> None:
    calls: list[None] = []

    def body(model: Net, x: jax.Array) -> jax.Array:
        calls.append(None)
        return loss_of(model, x)

    audit_of(sw.train_step(body, writes="cache"), X, params=optax.adam(1e-3))
    assert len(calls) == 1


def test_a_loop_is_told_the_same_where_jit_is_disabled() -> None:
    def body(model: Net, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c + model.unused[...].sum(), None), x.sum(), None, length=3)[0]

    with jax.disable_jit():
        audit = audit_of(sw.step(body), X)
    assert audit.error is None
    assert where(audit.leaves, "written") == []


def test_static_arguments_and_keywords_go_through() -> None:
    def body(model: Net, x: jax.Array, *, train: bool) -> jax.Array:
        return model(x) if train else model.dense(x)

    step = sw.step(body, static_argnames="train", writes=("stats", "rng", "cache", "variables"))
    state = planned(Net(nnx.Rngs(0))).abstract()
    assert where(sw.audit(step, state, X, train=False).leaves, "written") == []
    assert len(where(sw.audit(step, state, x=X, train=True).leaves, "written")) == 5


def test_a_step_that_captures_is_audited() -> None:
    class Sower(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.ones(3))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "h", x)
            return (x * self.kernel[...][None]).sum()

    plan = planned(Sower(), params=optax.sgd(0.1))
    audit = sw.audit(sw.train_step(lambda m, x: m(x), capture="intermediates"), plan.abstract(), X)
    assert where(audit.leaves, "written") == ["kernel"]
    assert where(audit.untrained) == []


# --- what is refused all the same --------------------------------------------------------------------------------


def test_a_step_wants_a_state() -> None:
    with refused(
        sw.StructureError,
        "loss_of is a step: its first argument is a state, not Net.",
        hint="state = plan.take(model)\nloss_of(state, ...)",
    ):
        sw.audit(sw.step(loss_of), Net(nnx.Rngs(0)), X)


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    with refused(
        sw.StructureError,
        "The loss of <lambda> is not a scalar: its shape is (4, 2).",
        hint="return loss.mean()",
    ):
        audit_of(sw.train_step(lambda model, x: model.dense(x)), X, params=optax.sgd(0.1))


def test_a_kind_that_is_not_there_is_refused() -> None:
    audit = audit_of(sw.step(lambda model, x: x), X)
    names = "params, lora, stats, cache, rng, intermediates, metrics, optimizer, variables"
    with refused(sw.DeclarationError, "There is no kind 'weights'.", kind="weights", hint=f"one of: {names}"):
        audit["weights"]
    assert "params" in audit
    assert "weights" not in audit
    assert ", ".join(audit) == names
    assert len(audit) == 9


# --- showing -----------------------------------------------------------------------------------------------------


def test_it_shows_itself() -> None:
    audit = audit_of(sw.train_step(loss_of), X, params=optax.sgd(0.1))
    shown, _, looked_at = str(audit).partition("\nto look at\n")
    assert shown == (
        "audit of loss_of\n"
        "kind       leaves  read  written  undeclared  differentiated  zero gradient  passed to jit  donated  not saved"
        "  saved  restarts\n"
        "--------------------------------------------------------------------------------------------------------------"
        "-----------------\n"
        "params          5     5        5           -               5              1              5        5          -"
        "  yes    -\n"
        "stats           2     2        2           -               -              -              2        2          -"
        "  yes    -\n"
        "cache           1     -        1           1               -              -              1        1          1"
        "  no     yes\n"
        "rng             2     2        1           -               -              -              2        1          -"
        "  yes    -\n"
        "variables       1     1        1           -               -              -              1        1          -"
        "  yes    -\n"
    )
    heads, dashes, *lines = looked_at.splitlines()
    assert heads == "path    kind       fact"
    assert set(dashes) == {"-"}
    assert lines[:3] == [
        "last    cache      written, not declared",
        "unused  params     gradient always zero",
        "last    cache      written, not saved",
    ]
    assert lines[3].startswith("hits    variables  left behind by restart()")  # it counts beside a cache
    assert all(line.strip().startswith("hint: ") for line in lines[4:])
    assert "<table>" in audit._repr_html_()
    assert repr(audit) == "Audit(step='loss_of', leaves=11)"


def test_it_shows_leaves() -> None:
    audit = audit_of(sw.step(lambda model, x: model.norm(model.dense(x)), writes="stats"), X)
    assert str(audit.by_leaf("stats", "cache")) == (
        "audit of <lambda>\n"
        "path       kind   type       shape  read  written  passed to jit  donated  saved\n"
        "--------------------------------------------------------------------------------\n"
        "norm/mean  stats  BatchStat  (2,)   yes   yes      yes            yes      yes\n"
        "norm/var   stats  BatchStat  (2,)   yes   yes      yes            yes      yes\n"
        "last       cache  Cache      (2,)   -     -        -              -        no"
    )
    assert len(audit.by_leaf().rows) == len(audit.leaves)


def test_it_is_plain_data() -> None:
    audit = audit_of(sw.train_step(loss_of), X, params=optax.sgd(0.1))
    data = json.loads(audit.to_json())
    assert data == audit.to_dict()
    assert data["error"] == str(audit.error)
    assert {kind["name"]: kind["written"] for kind in data["kinds"] if kind["leaves"]} == {
        "params": 5,
        "stats": 2,
        "cache": 1,
        "rng": 1,
        "variables": 1,
    }
    unused = next(leaf for leaf in data["leaves"] if leaf["path"] == "unused")
    assert (unused["kind"], unused["type"], unused["shape"], unused["zero_gradient"]) == ("params", "Param", [2], True)


def test_a_model_of_two_thousand_leaves_is_audited() -> None:
    model = nnx.List([nnx.Param(np.ones(3, np.float32)) for _ in range(2000)])

    def total(model: Any) -> jax.Array:
        return sum((leaf[...] ** 2).sum() for leaf in model[:1999])

    audit = sw.audit(sw.train_step(total), planned(model, params=optax.sgd(0.1)).abstract())
    assert where(audit.untrained) == ["1999"]
