"""`watch`: what can be watched, the block itself, and how what was seen is told."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from watched import FROZEN, Net, Tied, X, Y, hows, make, paths

# --- what can be watched, and by which kinds ---------------------------------------------------------------------


def test_leaves_that_no_kind_claims_or_two_do_are_watched_all_the_same() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), lora=sw.Kind(nnx.LoRAParam))
    model = nnx.Dict(a=nnx.BatchStat(jnp.ones(2)), b=nnx.LoRAParam(jnp.ones(2)), c=nnx.Param(jnp.ones(2)))
    with sw.watch(model, kinds) as watch:
        for leaf in (model.a, model.b, model.c):
            leaf[...] += 1
    assert paths(watch.changed) == {"(no kind)": ["a"], "params and lora": ["b"], "params": ["c"]}


def test_a_path_filter_claims_a_tied_leaf_by_any_of_its_paths() -> None:
    kinds = sw.Kinds(head=sw.Kind(sw.Path("head/**"), frozen=True), rest=sw.Kind(...))
    model = Tied()
    with sw.watch(model, kinds) as watch:
        model.embed.embedding[...] += 1
    assert [change.kind for change in watch.violations] == ["head"]


def test_a_state_is_watched_by_what_comes_back() -> None:
    model = Net(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model)
    step = sw.train_step(lambda model, x, y: ((model(x) - y) ** 2).mean())
    with sw.watch(state, expect=("params", "optimizer")) as watch:
        state, _ = step(state, X, Y)
        watch.compare(state)
    assert list(watch.changed) == ["params", "stats", "rng", "optimizer", "variables"]
    assert hows(watch)["optimizer/params/0/count"] == "value"


def test_a_packed_state_is_watched_leaf_by_leaf() -> None:
    model = Net(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    with sw.watch(state) as watch:
        state = state.replace(stats=jax.tree.map(lambda array: array + 1, state["stats"]))
        watch.compare(state)
    assert paths(watch.changed) == {"stats": ["norm/mean", "norm/var"]}


def test_a_state_that_is_not_handed_over_is_refused() -> None:
    model = Net(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model)
    step = sw.train_step(lambda model, x, y: ((model(x) - y) ** 2).mean())
    hint = "watch.compare(state)  # at the end of the block: what the step returned"
    donated = (
        "This state was donated: <lambda> has donated its params, stats, rng, optimizer, variables. "
        "The returned state was not passed to `watch`."
    )
    with refused(sw.StructureError, donated, hint=hint), sw.watch(state):
        new, _ = step(state, X, Y)
    gone = "The watched object no longer exists: the code made a new one instead."
    with refused(sw.StructureError, gone, hint=hint), sw.watch(new):
        new, _ = step(new, X, Y)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Immutable:
    """A pytree that a step replaces, as Equinox has it."""

    kernel: jax.Array
    bias: jax.Array


def test_an_immutable_model_is_watched_by_what_comes_back() -> None:
    model = Immutable(jnp.ones((3, 2)), jnp.zeros(2))
    step = jax.jit(lambda model: dataclasses.replace(model, kernel=model.kernel - 0.1))
    with sw.watch({"model": model}, expect="variables") as watch:
        watch.compare({"model": step(model)})
    assert paths(watch.changed) == {"variables": ["model/kernel"]}
    with pytest.raises(sw.WatchError, match="Nothing of variables"), sw.watch({"model": model}, expect="variables"):
        step(model)


def test_now_wants_as_many_objects_as_are_watched_and_a_block_that_runs() -> None:
    model, optimizer = make()
    hint = "watch.compare(...)  # inside the block, with as many objects as sw.watch received"
    with sw.watch((model, optimizer)) as watch:
        with refused(sw.StructureError, "2 objects are watched, but 1 were passed.", hint=hint):
            watch.compare(model)
        watch.compare(model, optimizer)
    with refused(sw.StructureError, "0 objects are watched, but 1 were passed.", hint=hint):
        watch.compare(model)


def test_sharded_arrays_stay_where_they_are(devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("data",))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
    model = nnx.Dict(kernel=nnx.Param(jnp.arange(4096.0).reshape(16, 256)))
    state = kinds.plan(model).take(model, mesh=mesh)
    with sw.watch(state) as watch, jax.transfer_guard_device_to_device("disallow"):
        moved = state.replace(params=jax.tree.map(lambda array: array * 2, state["params"]))
        watch.compare(moved)
    assert list(watch.changed) == ["params"]
    with sw.watch(state) as watch:
        watch.compare(kinds.plan(model).take(model))  # the same values on one device
    assert watch.changed == {}


# --- the block itself --------------------------------------------------------------------------------------------


def test_nothing_of_the_arrays_is_kept() -> None:
    model = Net(nnx.Rngs(0))
    state = sw.plan(model).take(model)
    with sw.watch(state) as watch:
        old = weakref.ref(state["params"]["dense"]["kernel"])
        state = jax.tree.map(lambda array: array, sw.plan(model).take(model))
        gc.collect()
        assert old() is None
        watch.compare(state)
    assert watch.changed == {}


def test_an_exception_goes_through_and_nothing_is_known() -> None:
    model, _ = make()
    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught, sw.watch(model, expect="params") as watch:
        raise error
    assert caught.value is error
    assert repr(watch) == "<sw.results.Watch, the block has not ended>"
    with refused(
        sw.StructureError,
        "The changes are known once the block has ended without an error.",
        hint="with sw.watch(model) as watch:\n    train(model, x)\nprint(watch)",
    ):
        watch.changed


def test_a_watch_is_for_one_block() -> None:
    watch = sw.watch(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    model = watch._objects[0]
    with watch:
        pass
    hint = "with sw.watch(model) as watch:  # one for each block"
    with refused(sw.StructureError, "This watch was already used.", hint=hint), watch:
        pass
    assert model is not None


def test_blocks_nest() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with sw.watch(model) as outer:
        model.bias[...] += 1
        with sw.watch(model) as inner:
            model.kernel[...] += 1
    assert paths(inner.changed) == {"params": ["kernel"]}
    assert paths(outer.changed) == {"params": ["bias", "kernel"]}


def test_inside_a_trace_it_is_refused() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    message = "The model is being traced: inside jax.jit there are no values to watch."
    hint = "with sw.watch(model) as watch:\n    train(model, x)  # the block around the compiled call"

    def watched(model: nnx.Linear) -> None:
        with sw.watch(model):
            pass

    for wrapped in (nnx.jit(watched), jax.jit(watched), nnx.grad(lambda model: (watched(model), model.bias.sum())[1])):
        with refused(sw.StructureError, message, hint=hint):
            wrapped(model)

    @jax.jit
    def over(x: jax.Array) -> jax.Array:
        watched(model)  # closed over: its values are there, but what is done to them would be traced
        return x

    with refused(sw.StructureError, message, hint=hint):
        over(X)


def test_an_abstract_model_is_refused() -> None:
    model = nnx.eval_shape(lambda: nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    with (
        refused(
            sw.StructureError,
            "The model is abstract: it has shapes but no values to watch.",
            leaves=["kernel: Param(3, 2) float32  kind=params"],
            hint="sw.watch(model)  # a real model, not one made by nnx.eval_shape",
        ),
        sw.watch(model),
    ):
        pass


def test_kinds_that_are_not_there_or_hold_nothing_cannot_be_expected() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    names = "params, lora, stats, cache, rng, intermediates, metrics, optimizer, variables"
    with (
        refused(sw.DeclarationError, "There is no kind 'weights'.", kind="weights", hint=f"one of: {names}"),
        sw.watch(model, expect="weights"),
    ):
        pass
    with refused(sw.DeclarationError, "expect=3 does not name kinds.", hint="expect=('params',)"):
        sw.watch(model, expect=3)
    with (
        refused(
            sw.DeclarationError,
            "Kind 'stats' is expected to change, but has no leaves.",
            kind="stats",
            hint="expect one of: params",
        ),
        sw.watch(model, expect="stats"),
    ):
        pass


def test_nothing_cannot_be_watched() -> None:
    with refused(sw.StructureError, "There is nothing to watch.", hint="with sw.watch(model) as watch:"):
        sw.watch(())


def test_a_program_that_forbids_transfers_can_be_watched() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    move = jax.jit(lambda bias: bias + 1)
    with jax.transfer_guard("disallow_explicit"), sw.watch(model) as watch:
        model.bias.set_value(move(model.bias.get_value()))
    assert paths(watch.changed) == {"params": ["bias"]}


def test_a_state_has_its_own_kinds() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    with refused(sw.DeclarationError, "A plan, or the plan of a state, has its own kinds.", hint="sw.watch(state)"):
        sw.watch(state, FROZEN)
    sw.watch(state, sw.Kinds.standard())


def test_threads_watch_their_own_models() -> None:
    found: dict[int, dict[str, list[str]]] = {}

    def run(number: int) -> None:
        model = nnx.List([nnx.Param(jnp.full(5, at, jnp.float32)) for at in range(20)])
        for _ in range(5):
            with sw.watch(model) as watch:
                model[number][...] += 1
            found[number] = paths(watch.changed)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {"params": [str(number)]} for number in range(8)}


# --- showing -----------------------------------------------------------------------------------------------------


def test_it_shows_itself() -> None:
    model: Any = nnx.Dict(
        base=nnx.Param(jnp.ones(2)),
        lora=nnx.LoRAParam(jnp.ones(2)),
        hits=nnx.Variable(jnp.array(0), ref=False),  # a reference keeps its dtype
        tied=nnx.Dropout(0.5),
    )
    with sw.watch(model, FROZEN) as watch:
        model.base[...] += 1
        model.hits.set_value(jnp.array(0.0))
        model.tied.deterministic = True
    watch.expect = ("lora",)
    assert str(watch) == (
        "watch\n"
        "kind  leaves  changed  unchanged  remark\n"
        "-----------------------------------------------------------------\n"
        "base       1        1          -  frozen, but changed\n"
        "lora       1        -          1  expected to change, nothing did\n"
        "rest       1        1          -  -\n"
        "\n"
        "to look at\n"
        "path                kind  what    why\n"
        "--------------------------------------------------\n"
        "base                base  value   -\n"
        "hits                rest  dtype   int32 to float32\n"
        "tied/deterministic  -     static  False to True"
    )
    assert "<table>" in watch._repr_html_()
    assert repr(watch) == "<sw.results.Watch, changed: base, rest>"
    data = json.loads(watch.to_json())
    assert data == watch.to_dict()
    assert (data["expect"], data["missed"]) == (["lora"], ["lora"])
    assert data["static"] == {"tied/deterministic": [False, True]}
    assert [(leaf["path"], leaf["kind"], leaf["what"], leaf["why"]) for leaf in data["leaves"]] == [
        ("base", "base", ["value"], ""),
        ("hits", "rest", ["dtype"], "int32 to float32"),
        ("lora", "lora", [], ""),
    ]
