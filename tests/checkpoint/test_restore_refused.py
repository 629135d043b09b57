"""What a restore refuses besides disagreements, what becomes of leaves that it does not read, and of the target."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import batches, contents, train, trained
from disagreeing import ONES, check_refused, keep, nothing_read, state_of
from refusals import refused
from strategies import Node

WITH_VALUES = "restore into a state with values: sw.restore(path, plan.take(model))"
SHARED = jnp.zeros(2)
CACHE = sw.Kind(nnx.Cache, saved=False)


def starts(kind: str) -> str:
    declared = f"dataclasses.replace(plan.kinds[{kind!r}], restart=jnp.zeros_like)"
    return f"or declare how it starts: kinds = plan.kinds.replace({kind}={declared})"


# --- paths and targets -------------------------------------------------------------------------------------------


def check_all(path: Any, cls: type[sw.StatewiseError], message: str, hint: str, *more: Callable[[Any], Any]) -> None:
    """The same from whatever looks at a checkpoint."""
    for look in (lambda path: sw.restore(path, trained()), lambda path: sw.preview(path, trained()), *more):
        with refused(cls, message, hint=hint):
            look(path)


def test_a_path_where_nothing_is(tmp_path: pathlib.Path) -> None:
    check_all(
        tmp_path / "run",
        sw.RestoreError,
        f"There is nothing at {tmp_path}/run.",
        "sw.save(path, state) writes a checkpoint; look for it beside this path",
        sw.inspect,
    )


@pytest.mark.parametrize("path", [None, 3, {"run": 1}, ()], ids=str)
def test_what_is_no_path(path: Any) -> None:
    check_all(
        path, sw.RestoreError, f"{type(path).__name__} is not a path.", "sw.restore('run/step_100', target)", sw.inspect
    )


def test_a_folder_without_a_manifest(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    check_all(
        tmp_path / "empty",
        sw.CorruptedError,
        f"{tmp_path}/empty is not a checkpoint of Statewise: it has no statewise.json.",
        f"sw.convert('{tmp_path}/empty', ...) reads a plain Orbax checkpoint",
    )


def test_a_step_stands_for_its_one_state_and_of_a_run_the_newest_is_named(tmp_path: pathlib.Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            items = {"state": sw.checkpointable(trained()), "metrics": ocp.args.JsonSave({"loss": 0.5})}
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    hint = f"one of its items is: '{tmp_path}/run/10/state'"
    message = f"{tmp_path}/run is not a checkpoint of Statewise: it has no statewise.json."
    check_all(tmp_path / "run", sw.CorruptedError, message, hint, sw.inspect)
    assert sw.preview(tmp_path / "run" / "10" / "state", trained()).ok
    assert sw.preview(tmp_path / "run" / "10", trained()).ok
    assert sw.inspect(tmp_path / "run" / "10") == sw.inspect(tmp_path / "run" / "10" / "state")


def test_of_a_step_with_two_states_one_is_named(tmp_path: pathlib.Path) -> None:
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        both = {"actor": sw.checkpointable(trained()), "learner": sw.checkpointable(trained())}
        manager.save(1, args=ocp.args.Composite(**both))
        manager.wait_until_finished()
    check_all(
        tmp_path / "run" / "1",
        sw.CorruptedError,
        f"{tmp_path}/run/1 is not a checkpoint of Statewise: it has no statewise.json.",
        f"one of its items is: '{tmp_path}/run/1/actor'",
        sw.inspect,
    )


@pytest.mark.parametrize(
    "target", [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"w": ONES}, None], ids=lambda x: type(x).__name__
)
def test_a_target_that_is_no_state(tmp_path: pathlib.Path, target: Any) -> None:
    sw.save(tmp_path / "run", trained())
    for look in (sw.restore, sw.preview):
        with refused(
            sw.StructureError,
            f"The target of a restore is a state, not {type(target).__name__}.",
            hint="sw.restore(path, plan.take(model)), or plan.abstract(); then plan.put(state, model)",
        ):
            look(tmp_path / "run", target)


def test_a_target_that_is_being_traced(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    with refused(
        sw.StructureError,
        "The target is being traced: inside jax.jit there are no values to restore.",
        hint="restore before the function is called, and pass it the state",
    ):
        jax.jit(lambda state: sw.restore(tmp_path / "run", state)[0])(state_of(w=nnx.Param(ONES)))


def test_a_target_that_is_a_batch_of_states(tmp_path: pathlib.Path) -> None:
    state = state_of(w=nnx.Param(ONES))
    sw.save(tmp_path / "run", state)
    with refused(
        sw.StructureError,
        "The state's arrays do not have the shapes and dtypes of its plan.",
        leaves=["w: Param(2, 3) float32  kind=params  (is (4, 2, 3) in the state)"],
        hint="all of them as one ensemble: state = plan.stacked(4).stack(states)\n"
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)\n"
        "for other dtypes: state.cast(params='bfloat16')",
    ):
        sw.restore(tmp_path / "run", jax.tree.map(lambda array: jnp.stack([array] * 4), state))


# --- kinds that are asked for ------------------------------------------------------------------------------------


def test_only_a_kind_that_is_not_there(tmp_path: pathlib.Path) -> None:
    state = state_of(sw.Kinds(params=sw.Kind(nnx.Param), cache=CACHE), w=nnx.Param(ONES))
    sw.save(tmp_path / "run", state)
    for look in (sw.restore, sw.preview):
        with refused(sw.DeclarationError, "There is no kind 'stats'.", kind="stats", hint="one of: params, cache"):
            look(tmp_path / "run", state, only=("params", "stats"))
        with refused(
            sw.DeclarationError,
            "The kind 'cache' is declared ephemeral: no checkpoint holds it.",
            kind="cache",
            hint="leave it out of only; state.restart('cache') makes fresh values",
        ):
            look(tmp_path / "run", state, only="cache")


@pytest.mark.parametrize("only", ["params", ("params",), ["params"]], ids=str)
def test_only_some_kinds_and_the_rest_keeps_its_values(tmp_path: pathlib.Path, only: Any) -> None:
    saved = state_of(w=nnx.Param(3 * ONES), s=nnx.BatchStat(3 * ONES), gone=nnx.BatchStat(ONES))
    sw.save(tmp_path / "run", saved)
    state, report = sw.restore(tmp_path / "run", state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES)), only=only)
    assert np.array_equal(state["params"]["w"], 3 * ONES)
    assert np.array_equal(state["stats"]["s"], ONES)
    assert [(one.outcome, one.why) for one in report["stats"]] == [("kept", "not asked for")]


def test_an_abstract_target_has_nothing_to_keep(tmp_path: pathlib.Path) -> None:
    saved = state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES))
    check_refused(
        tmp_path / "run",
        saved,
        saved.plan.abstract(),
        "s: BatchStat(2, 3) float32  kind=stats  (not asked for, and the target is abstract: it has no value to keep)",
        hint="restore into a state with values: sw.restore(path, plan.take(model), only='params')",
        only="params",
    )


def test_the_hint_for_several_kinds_declares_all_of_them_at_once(tmp_path: pathlib.Path) -> None:
    """A line for each would undo the one before."""
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    target = state_of(w=nnx.Param(ONES), v=nnx.Param(ONES), s=nnx.BatchStat(ONES), n=nnx.Variable(ONES))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target)
    words, code = caught.value.hint.split(": ", 1)
    assert words == "to keep the target's values, declare it"
    names = {"plan": target.plan, "dataclasses": dataclasses}
    exec(code, names)
    assert {name for name, kind in names["kinds"].items() if kind.missing == "keep"} == {"params", "stats", "variables"}
    fixed = state_of(names["kinds"], w=nnx.Param(ONES), v=nnx.Param(ONES), s=nnx.BatchStat(ONES), n=nnx.Variable(ONES))
    assert sw.preview(tmp_path / "run", fixed).ok


def test_an_ephemeral_kind_without_restart_cannot_start(tmp_path: pathlib.Path) -> None:
    kinds = sw.Kinds.standard().replace(cache=CACHE)
    saved = state_of(kinds, w=nnx.Param(ONES), c=nnx.Cache(ONES))
    check_refused(
        tmp_path / "run",
        saved,
        saved.plan.abstract(),
        "c: Cache(2, 3) float32  kind=cache  "
        "(ephemeral, never saved, and the target is abstract: it has no value to keep)",
        hint=f"{WITH_VALUES}\n{starts('cache')}",
    )


def test_an_ephemeral_kind_with_restart_starts_or_keeps_its_values(tmp_path: pathlib.Path) -> None:
    saved = state_of(w=nnx.Param(ONES), c=nnx.Cache(ONES))
    sw.save(tmp_path / "run", saved)
    fresh, report = sw.restore(tmp_path / "run", saved.plan.abstract())
    assert not fresh["cache"]["c"].any()
    assert [(one.outcome, one.why) for one in report["cache"]] == [("restarted", "ephemeral, never saved")]
    kept, report = sw.restore(tmp_path / "run", saved)
    assert np.array_equal(kept["cache"]["c"], ONES)
    assert [(one.outcome, one.why) for one in report["cache"]] == [("kept", "ephemeral, never saved")]
    # What was saved when it was of another kind is there, and is not used.
    sw.save(tmp_path / "before", state_of(w=nnx.Param(ONES), c=nnx.Param(ONES)))
    report = sw.preview(tmp_path / "before", saved.plan.abstract())
    assert report.ok
    why = "ephemeral: what the checkpoint has is not used"
    assert [(one.outcome, one.why) for one in report["cache"]] == [("restarted", why)]


# --- leaves that are missing -------------------------------------------------------------------------------------


def missing_as(handling: str, restart: Any = None) -> sw.Kinds:
    return sw.Kinds.standard().replace(variables=sw.Kind(..., missing=handling, restart=restart))


def test_a_missing_leaf_may_keep_its_value(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    target = state_of(missing_as("keep"), w=nnx.Param(0 * ONES), n=nnx.Variable(jnp.array(7)))
    state, report = sw.restore(tmp_path / "run", target)
    assert (int(state["variables"]["n"]), float(state["params"]["w"].sum())) == (7, 6.0)
    assert [(one.outcome, one.why) for one in report["variables"]] == [("kept", "missing from the checkpoint")]


def test_an_abstract_target_cannot_keep_what_is_missing(tmp_path: pathlib.Path) -> None:
    check_refused(
        tmp_path / "run",
        state_of(w=nnx.Param(ONES)),
        state_of(missing_as("keep"), w=nnx.Param(ONES), n=nnx.Variable(jnp.array(7))).plan.abstract(),
        "n: Variable() int32  kind=variables  "
        "(missing from the checkpoint, and the target is abstract: it has no value to keep)",
        hint=WITH_VALUES,
    )


@pytest.mark.parametrize("abstract", [False, True])
def test_a_missing_leaf_may_restart(tmp_path: pathlib.Path, abstract: bool) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    target = state_of(missing_as("restart", jnp.ones_like), w=nnx.Param(ONES), n=nnx.Variable(jnp.array(7)))
    state, report = sw.restore(tmp_path / "run", target.plan.abstract() if abstract else target)
    assert int(state["variables"]["n"]) == 1
    assert [(one.outcome, one.why) for one in report["variables"]] == [("restarted", "missing from the checkpoint")]


def test_a_restart_that_changes_a_shape_is_refused_before_anything_is_read(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    kinds = missing_as("restart", lambda array: jnp.zeros(5))
    target = state_of(kinds, w=nnx.Param(ONES), n=nnx.Variable(jnp.array(7)), m=nnx.Variable(jnp.zeros(5)))
    with (
        nothing_read(),
        refused(
            sw.RestoreError,
            "The restart of kind 'variables' changes shapes or dtypes.",
            leaves=["n: Variable() int32  kind=variables  (would become (5,) float32)"],
            kind="variables",
            hint="restart=jnp.zeros_like, or any function that keeps shape and dtype",
        ),
    ):
        sw.restore(tmp_path / "run", target)


@pytest.mark.parametrize("restart", [lambda array: array, lambda array: SHARED], ids=["same", "shared"])
def test_what_a_restart_gives_is_the_new_state_s_own(tmp_path: pathlib.Path, restart: Any) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    kinds = missing_as("restart", restart)
    target = state_of(kinds, w=nnx.Param(ONES), a=nnx.Variable(jnp.ones(2)), b=nnx.Variable(jnp.ones(2)))
    state, _ = sw.restore(tmp_path / "run", target)
    arrays = [*jax.tree.leaves(state), *jax.tree.leaves(target)]
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_a_restarted_leaf_lies_where_the_target_s_does(tmp_path: pathlib.Path, devices: list[jax.Device]) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES)))
    kinds = missing_as("restart", lambda array: jnp.zeros(array.shape))
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",), devices=devices), jax.P())
    target = jax.device_put(state_of(kinds, w=nnx.Param(ONES), n=nnx.Variable(jnp.ones(8))), sharding)
    state, _ = sw.restore(tmp_path / "run", target)
    assert [array.sharding for array in jax.tree.leaves(state)] == [sharding, sharding]


# --- the target --------------------------------------------------------------------------------------------------


def test_the_target_lasts_whatever_happens(tmp_path: pathlib.Path) -> None:
    target = trained(1)
    before = contents(target)
    sw.save(tmp_path / "run", trained(0))
    sw.save(tmp_path / "other", state_of(w=nnx.Param(ONES)))
    sw.save(tmp_path / "bad", trained(0), layout="packed")
    largest = max((tmp_path / "bad").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    state, _ = sw.restore(tmp_path / "run", target)
    for path, error in (("other", sw.RestoreError), ("bad", sw.CorruptedError), ("gone", sw.RestoreError)):
        with pytest.raises(error):
            sw.restore(tmp_path / path, target)
    assert contents(target) == before
    x = batches()[0]
    after, _ = train(target, x)
    assert contents(after) == contents(train(trained(1), x)[0])
    assert contents(state) == contents(trained(0))  # which the step on the target has left alone


def donated(**leaves: Any) -> sw.State:
    state = state_of(sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, restart=jnp.zeros_like)), **leaves)
    state.restart()
    return state


def test_a_spent_target_is_restored_into_where_nothing_is_kept(tmp_path: pathlib.Path) -> None:
    target = donated(w=nnx.Param(ONES), c=nnx.Cache(ONES))
    with refused(
        sw.StructureError,
        "This state was donated: restart('params') has donated its params.",
        kind="params",
        hint="use the state that came back: state, out = step(state, ...)\n"
        "or keep a copy beforehand: kept = jax.tree.map(jnp.copy, state)",
    ):
        sw.save(tmp_path / "never", target)
    sw.save(tmp_path / "run", state_of(w=nnx.Param(3 * ONES)))
    state, report = sw.restore(tmp_path / "run", target)
    assert report.counts == {"cache": {"restarted": 1}, "params": {"restored": 1}}
    assert np.array_equal(state["params"]["w"], 3 * ONES)
    assert not state["cache"]["c"].any()


def test_a_spent_target_has_nothing_to_keep(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES)))
    note = "(not asked for, and the target was donated: its value was donated)"
    with (
        nothing_read(),
        refused(
            sw.RestoreError,
            f"{tmp_path}/run does not fit the target: 1 leaf differs. Nothing was read or changed.",
            leaves=[f"w: Param(2, 3) float32  kind=params  {note}"],
            hint="restore into a state with values: sw.restore(path, plan.take(model), only='stats', cast=True)",
        ),
    ):
        sw.restore(tmp_path / "run", donated(w=nnx.Param(ONES), s=nnx.BatchStat(ONES)), only="stats", cast=True)


def test_a_spent_packed_target_is_restored_into(tmp_path: pathlib.Path) -> None:
    def model(fill: float) -> Node:
        return Node(**{f"w{at}": nnx.Param(jnp.full(2, fill, float)) for at in range(5)})

    plan = sw.plan(model(0), optimizers={"params": optax.sgd(0.1)})
    sw.save(tmp_path / "run", plan.take(model(3)))
    target = plan.take(model(0), pack=True)
    sw.train_step(lambda model: model.w0.sum())(target)
    state, _ = sw.restore(tmp_path / "run", target)
    assert contents(state) == contents(plan.take(model(3)))


def test_a_step_that_grew_a_leaf_is_told_so(tmp_path: pathlib.Path) -> None:
    """A model with more layers than it was saved with: each new leaf is listed, the old ones would be restored."""
    report = check_refused(
        tmp_path / "run",
        state_of(layers=nnx.List([nnx.Param(ONES)])),
        state_of(layers=nnx.List([nnx.Param(ONES), nnx.Param(ONES), nnx.Param(ONES)])),
        "layers/1: Param(2, 3) float32  kind=params  (missing from the checkpoint)",
        "layers/2: Param(2, 3) float32  kind=params  (missing from the checkpoint)",
        hint=keep("params"),
    )
    assert report.counts == {"params": {"restored": 1, "problem": 2}}


@pytest.mark.parametrize("only", [3, [["params"]], [None]])
def test_only_names_kinds(tmp_path: pathlib.Path, only: Any) -> None:
    state = state_of(a=nnx.Param(jnp.ones(2)))
    sw.save(tmp_path / "run", state)
    for call in (sw.save, sw.restore, sw.preview):
        with refused(sw.DeclarationError, f"only={only!r} does not name kinds.", hint="only=('params',)"):
            call(tmp_path / "run", state, only=only)
