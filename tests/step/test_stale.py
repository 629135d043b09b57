"""Kinds that depend on others: what makes one stale, what a step does that reads it then, and what is not known.

`tests/laws/test_stale.py` draws sequences of all of this; here each case has its text, and its numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.core import known_arrays
from statewise._src.core.plan import tables_of
from statewise._src.step.step import Step

X = jnp.array([1.0, 2.0])


class Decoder(nnx.Module):
    """A sum for each of two slots: what it has read, times the scale at that time."""

    def __init__(self, value: Any = 1.0) -> None:
        self.scale = nnx.Param(jnp.full((), value))
        self.shift = nnx.LoRAParam(jnp.zeros(()))
        self.sum = nnx.Cache(jnp.zeros(2))

    def __call__(self, x: Any) -> jax.Array:
        self.sum[...] += (self.scale[...] + self.shift[...]) * x
        return self.sum[...]


CACHE = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0, depends_on=("params", "lora"))
KINDS = sw.Kinds.standard().replace(cache=CACHE)
OPTIMIZERS: Any = {"params": optax.sgd(0.125), "lora": optax.sgd(0.125)}
AVERAGES: Any = {"params": sw.EMA(0.5)}
PLAN = KINDS.plan(Decoder(), optimizers=OPTIMIZERS, averages=AVERAGES)


@sw.step(writes="cache")
def decode(decoder: Decoder, x: Any) -> jax.Array:
    return decoder(x)


@sw.step
def evaluate(decoder: Decoder, x: Any) -> jax.Array:
    return decoder.sum[...] * x


@sw.step
def forward(decoder: Decoder, x: Any) -> jax.Array:
    return decoder.scale[...] * x


@sw.step(writes="cache")
def fill(decoder: Decoder, x: Any) -> None:
    decoder.sum[...] = decoder.scale[...] * x


@sw.train_step(wrt="params")
def train(decoder: Decoder, x: Any) -> jax.Array:
    return (decoder.scale[...] * x).sum() ** 2


def declared(**changes: Any) -> sw.Plan:
    return KINDS.replace(cache=dataclasses.replace(CACHE, **changes)).plan(Decoder(), optimizers=OPTIMIZERS)


def decoded(plan: sw.Plan = PLAN, **options: Any) -> sw.State:
    state, _ = decode(plan.take(Decoder(), **options), X)
    return state


def moved(state: sw.State, kind: str = "params") -> sw.State:
    return state.replace(**{kind: jax.tree.map(lambda array: array + 1, state[kind])})


def is_stale(state: sw.State) -> bool:
    try:
        evaluate(state, X)
    except sw.StaleError:
        return True
    return False


# --- declaring ---------------------------------------------------------------------------------------------------


def test_a_dependence_is_a_tuple_of_names_in_a_kind_that_is_data() -> None:
    one, several = sw.Kind(nnx.Cache, depends_on="params"), sw.Kind(nnx.Cache, depends_on=["params", "lora", "params"])
    assert one.depends_on == ("params",)
    assert several.depends_on == ("params", "lora")
    assert one == sw.Kind(nnx.Cache, depends_on=("params",)) != sw.Kind(nnx.Cache)
    assert pickle.loads(pickle.dumps(sw.Kinds(cache=several)))["cache"] == several
    assert several.handling() == "depends_on=params+lora"
    assert CACHE.handling() == "not saved, restart=zeros_like, batch_axis=0, depends_on=params+lora"
    assert "depends_on=params+lora, stale=restart" in dataclasses.replace(CACHE, stale="restart").handling()
    assert "depends_on=params+lora" in str(PLAN.take(Decoder()).plan) + str(sw.census(PLAN))


def test_the_standard_kinds_declare_no_dependence() -> None:
    assert not any(kind.depends_on for kind in sw.Kinds.standard().values())
    assert tables_of(sw.plan(Decoder())).sources == {}


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"depends_on": 5}, "depends_on=int is not the name of a kind, nor several names.", "depends_on=('params',)"),
        (
            {"depends_on": ("params", 5)},
            "depends_on=('params', 5) is not the name of a kind, nor several names.",
            "depends_on=('params',)",
        ),
        (
            {"depends_on": {"params"}},
            "depends_on=set is not the name of a kind, nor several names.",
            "depends_on=('params',)",
        ),
        ({"stale": "ignore"}, "stale='ignore' is not one of 'error', 'restart', 'keep'.", "stale='error'"),
        (
            {"stale": "keep"},
            "stale='keep' says what happens to a kind that depends on others, and this one depends on none.",
            "sw.Kind(nnx.Cache, depends_on='params', stale='keep')",
        ),
        (
            {"depends_on": "params", "stale": "restart"},
            "stale='restart' needs a function that makes a fresh value.",
            "sw.Kind(nnx.Cache, depends_on=('params',), stale='restart', restart=jnp.zeros_like)",
        ),
        (
            {"depends_on": "params", "stale": "restart", "restart": jnp.zeros_like, "frozen": True},
            "stale='restart' would restart a kind that is frozen.",
            "sw.Kind(nnx.Cache, depends_on=('params',), frozen=True)",
        ),
        (
            {"depends_on": "params", "stale": "restart", "restart": lambda array, key: array},
            "stale='restart' calls restart without a key, but this one takes a key.",
            "sw.Kind(nnx.Cache, depends_on=('params',), restart=...)\n"
            "and where a step raises StaleError: state.restart(..., key=jax.random.key(0))",
        ),
    ],
)
def test_a_kind_that_contradicts_itself_is_an_error(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(sw.DeclarationError) as raised:
        sw.Kind(nnx.Cache, **options)
    assert raised.value.message == message
    assert raised.value.hint == hint
    if "..." not in hint:
        code = hint if hint.startswith("sw.Kind") else f"sw.Kind(nnx.Cache, {hint})"
        assert isinstance(eval(code), sw.Kind)  # the hint, followed


def test_a_plan_finds_every_wrong_dependence_at_once() -> None:
    kinds = sw.Kinds(
        params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), depends_on=("lora", "weights")),
        lora=sw.Kind(nnx.LoRAParam, depends_on=("cache", "lora"), stale="keep"),
        cache=sw.Kind(nnx.Cache, depends_on="params"),
        rest=sw.Kind(..., depends_on="rest", stale="keep"),
    )
    with pytest.raises(sw.DeclarationError) as raised:
        kinds.plan(Decoder())
    assert raised.value.message == (
        "depends_on does not fit the kinds: 'params' depends on 'weights', and there is no such kind; 'lora' depends "
        "on itself; 'rest' depends on itself; 'params' -> 'lora' -> 'cache' -> 'params' is a circle."
    )
    assert raised.value.kind is None
    hint, names = (raised.value.hint or "").splitlines()
    assert names == "the kinds are: params, lora, cache, rest"
    scope: dict[str, Any] = {"kinds": kinds, "dataclasses": dataclasses}
    exec(hint, scope)
    plan = scope["kinds"].plan(Decoder())
    assert tables_of(plan).sources == {"params": ("lora", "cache"), "lora": ("cache",)}


def test_a_kind_may_depend_on_what_only_a_plan_has() -> None:
    kinds = KINDS.replace(cache=dataclasses.replace(CACHE, depends_on=("ema", "optimizer")))
    plan = kinds.plan(Decoder(), optimizers={"params": optax.adam(0.1)}, averages=AVERAGES)
    assert tables_of(plan).sources == {"cache": ("optimizer", "ema")}
    with pytest.raises(sw.DeclarationError, match="'cache' depends on 'ema', and there is no such kind") as raised:
        kinds.plan(Decoder(), optimizers=OPTIMIZERS)
    assert raised.value.kind == "cache"


# --- what makes it stale -----------------------------------------------------------------------------------------


def restored(state: sw.State, folder: Path, **options: Any) -> sw.State:
    sw.save(folder / "state", state)
    return sw.restore(folder / "state", state, **options)[0]


def put_and_taken(state: sw.State) -> sw.State:
    model = Decoder()
    PLAN.put(state, model)
    assert not is_stale(PLAN.take(model))
    model.scale[...] = model.scale[...] + 1
    return PLAN.take(model)


EVENTS: dict[str, Callable[[sw.State, Path], sw.State]] = {
    "a train step": lambda state, _: train(state, X)[0],
    "transfer": lambda state, _: sw.transfer(PLAN.take(Decoder(3.0)), state, kinds="params"),
    "restore, of some": lambda state, folder: restored(state, folder, only="params"),
    "replace": lambda state, _: moved(state),
    "cast": lambda state, _: state.cast(params="bfloat16"),
    "with_averages": lambda state, _: state.with_averages("ema"),
    "put and take": lambda state, _: put_and_taken(state),
}


@pytest.mark.parametrize("event", EVENTS)
def test_other_parameters_make_the_cache_stale(event: str, tmp_path: Path) -> None:
    state = EVENTS[event](decoded(), tmp_path)
    for step in (decode, evaluate):  # whether it writes the cache or only reads it
        with pytest.raises(sw.StaleError) as raised:
            step(state, X)
        error = raised.value
        assert str(error) == (
            f"{step.fn.__name__} reads cache, which is stale: params has changed since.\n"
            "  sum: Cache(2,) float32  kind=cache\n"
            "  hint: state = state.restart('cache')"
        )
        assert error.kind == "cache"
        assert [leaf.path for leaf in error.leaves] == [("sum",)]
        assert isinstance(error, sw.StatewiseError)
    scale = np.asarray(state["params"]["scale"], np.float32)
    np.testing.assert_array_equal(forward(state, X), scale * X)  # does not read it
    scope: dict[str, Any] = {"state": state}
    exec(error.hint or "", scope)
    state, out = decode(scope["state"], X)
    np.testing.assert_array_equal(out, scale * X)
    decode(state, X)


def test_whatever_changed_is_named() -> None:
    state = moved(moved(decoded()), "lora")
    with pytest.raises(sw.StaleError, match="stale: params and lora have changed since"):
        decode(state, X)


def test_a_fresh_state_claims_nothing_and_is_stale_once_it_is_trained() -> None:
    state = PLAN.take(Decoder())
    assert not is_stale(state)
    state, _ = train(state, X)
    assert is_stale(state)


def test_the_same_arrays_are_no_change() -> None:
    state = decoded()
    assert not is_stale(state.replace(params=state["params"]))
    assert not is_stale(state.cast(params="float32"))
    assert is_stale(state.replace(params=jax.tree.map(jnp.copy, state["params"])))


# --- what makes it fresh -----------------------------------------------------------------------------------------


def test_a_step_that_writes_it_without_reading_it_makes_it_fresh() -> None:
    state, _ = fill(moved(decoded()), X)
    np.testing.assert_array_equal(evaluate(state, X), 2.0 * X * X)


def test_a_complete_restore_makes_it_fresh(tmp_path: Path) -> None:
    state = moved(decoded())
    sw.save(tmp_path / "state", state)
    assert is_stale(state)
    back, report = sw.restore(tmp_path / "state", state)
    assert not is_stale(back)
    # What no checkpoint has is not kept: it would be the cache of other parameters.
    (row,) = report["cache"]
    assert (row.outcome, row.why) == ("restarted", "ephemeral, never saved, and made from params and lora")
    np.testing.assert_array_equal(back["cache"]["sum"], np.zeros(2))
    # Where it is saved, it comes back as it was.
    saved = declared(saved=True)
    state = decoded(saved)
    sw.save(tmp_path / "saved", state)
    back, _ = sw.restore(tmp_path / "saved", moved(state))
    np.testing.assert_array_equal(evaluate(back, X), X * X)


def test_a_complete_restore_keeps_what_it_cannot_restart_and_says_so_at_the_next_step(tmp_path: Path) -> None:
    for changes, stale in (({"restart": None}, True), ({"stale": "keep"}, False)):
        state = decoded(declared(**changes))
        back = restored(state, tmp_path / str(stale))
        np.testing.assert_array_equal(back["cache"]["sum"], X)
        assert is_stale(back) == stale


def test_checkpoints_restore_as_restore_does(tmp_path: Path) -> None:
    state = decoded()
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state)
        assert not is_stale(checkpoints.restore(moved(state))[0])
        assert is_stale(checkpoints.restore(state, only="params")[0])


@pytest.mark.parametrize("where", [[0], jnp.array([True, False])], ids=["numbers", "booleans"])
def test_slots_restarted_one_by_one_are_stale_until_all_were(where: Any) -> None:
    state = moved(decoded())
    state = state.restart("cache", where=where)
    assert is_stale(state)
    # The other one for other parameters does not complete it.
    other = moved(state).restart("cache", where=[1])
    assert is_stale(other)
    state = moved(decoded()).restart("cache", where=where).restart("cache", where=where)
    assert is_stale(state)
    state = state.restart("cache", where=[1])
    assert not is_stale(state)
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 2.0 * X)


def test_a_restart_of_slots_in_a_fresh_cache_changes_nothing() -> None:
    state = decoded().restart("cache", where=[0])
    assert not is_stale(state)
    assert is_stale(moved(state))


# --- steps that write both ---------------------------------------------------------------------------------------


def test_a_cache_is_made_with_the_parameters_that_came_in() -> None:
    @sw.train_step(wrt="params", writes="cache")
    def train_and_decode(decoder: Decoder, x: Any) -> jax.Array:
        return decoder(x).sum() ** 2

    state, _ = train_and_decode(PLAN.take(Decoder()), X)
    np.testing.assert_array_equal(state["cache"]["sum"], X)
    assert is_stale(state)


def test_a_cache_made_beside_parameters_of_which_none_is_read_is_fresh() -> None:
    @sw.step(writes=("params", "cache"))
    def load(decoder: Decoder, scale: Any, x: Any) -> None:
        decoder.scale[...] = scale
        decoder.sum[...] = decoder.scale[...] * x

    @sw.step(writes=("params", "cache"))
    def load_half(decoder: Decoder, scale: Any, x: Any) -> None:
        decoder.scale[...] = scale
        decoder.sum[...] = decoder.sum[...].at[0].set(scale * x[0])

    state, _ = load(moved(decoded()), 5.0, X)
    np.testing.assert_array_equal(evaluate(state, X), 5.0 * X * X)
    state, _ = load_half(state, 3.0, X)
    assert is_stale(state)


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"weighted": True, "microbatches": 2}], ids=str)
def test_a_step_that_may_keep_what_it_writes_does_not_make_it_fresh(options: Any) -> None:
    @sw.train_step(wrt="params", writes="cache", **options)
    def train_and_fill(decoder: Decoder, x: Any) -> Any:
        decoder.sum[...] = jnp.zeros(2)
        loss = (decoder.scale[...] * x).sum()
        return (loss, x.sum()) if "weighted" in options else loss

    state, _ = train_and_fill(moved(decoded()), X)
    assert is_stale(state)


@pytest.mark.parametrize("options", [{"microbatches": 2}, {"nonfinite": "skip"}], ids=str)
def test_every_train_step_counts(options: Any) -> None:
    step = sw.train_step(wrt="params", **options)(train.fn)
    assert is_stale(step(decoded(), X)[0])


# --- restart and keep --------------------------------------------------------------------------------------------


def test_a_stale_kind_may_restart_before_it_is_read() -> None:
    state = moved(decoded(declared(stale="restart")))
    np.testing.assert_array_equal(evaluate(state, X), np.zeros(2))
    np.testing.assert_array_equal(state["cache"]["sum"], X)  # a step that returns no state restarts for itself alone
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 2.0 * X)
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 4.0 * X)


def test_a_stale_kind_may_be_kept() -> None:
    _, out = decode(moved(decoded(declared(stale="keep"))), X)
    np.testing.assert_array_equal(out, 3.0 * X)


def test_a_kind_that_depends_on_one_that_restarts_is_stale_then() -> None:
    class Two(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.memo = nnx.Intermediate(jnp.zeros(2))
            self.free = nnx.Variable(jnp.zeros(()))

    kinds = KINDS.replace(
        cache=dataclasses.replace(CACHE, stale="restart"), intermediates=sw.Kind(nnx.Intermediate, depends_on="cache")
    )
    state = kinds.plan(Two(), optimizers=OPTIMIZERS).take(Two())
    assert tables_of(state.plan).sources["intermediates"] == ("params", "lora", "cache")
    read = sw.step(lambda two: two.memo[...] + two.sum[...])
    np.testing.assert_array_equal(read(state), np.zeros(2))
    with pytest.raises(sw.StaleError) as raised:
        read(moved(state))
    assert raised.value.message == "<lambda> reads intermediates, which is stale: params has changed since."
    assert raised.value.hint == (
        "state = state.replace(intermediates=...)  # made from the present params\n"
        "or declare it with restart=jnp.zeros_like, and: state = state.restart('intermediates')"
    )


def test_all_stale_kinds_of_a_step_are_one_error() -> None:
    class Two(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.noise = nnx.BatchStat(jnp.zeros(2))

    def drawn(array: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.normal(key, array.shape)

    kinds = KINDS.replace(stats=sw.Kind(nnx.BatchStat, restart=drawn, depends_on="lora"))
    state = kinds.plan(Two()).take(Two())
    read = sw.step(lambda two: two.noise[...] + two.sum[...])
    with pytest.raises(sw.StaleError) as raised:
        read(moved(state, "lora"))
    assert raised.value.message == (
        "<lambda> reads stats, which is stale: lora has changed since; and cache, which is stale: lora has changed "
        "since."
    )
    assert raised.value.kind is None
    assert {leaf.kind for leaf in raised.value.leaves} == {"cache", "stats"}
    assert raised.value.hint == "state = state.restart('stats', 'cache', key=jax.random.key(0))"


# --- what is not known -------------------------------------------------------------------------------------------


def test_inside_a_transform_nothing_is_claimed() -> None:
    state = moved(decoded())
    assert is_stale(state)
    expected = 3.0 * X
    np.testing.assert_array_equal(jax.jit(lambda state: decode(state, X)[1])(state), expected)
    np.testing.assert_array_equal(jax.jit(lambda x: decode(state, x)[1])(X), expected)  # the state closed over
    np.testing.assert_array_equal(jax.vmap(lambda x: decode(state, x)[1])(X[None])[0], expected)
    both = jax.jit(lambda state: decode(moved(state), X))
    both(decoded())
    scanned, _ = jax.lax.scan(lambda state, x: train(state, x), decoded(), X[None])
    assert not is_stale(scanned)
    assert not is_stale(jax.tree.map(lambda array: array, state))
    assert is_stale(state)  # none of it changed what is known of the state itself


def test_without_compilation_it_is_an_error_too() -> None:
    state = moved(decoded())
    with jax.disable_jit():
        assert is_stale(state)
        state, _ = train(state.restart("cache"), X)
        assert is_stale(state)
        state, _ = fill(state, X)
        assert not is_stale(state)


def test_a_step_compiled_ahead_of_time_is_an_error_too() -> None:
    compiled = decode.lower(PLAN.abstract(), X).compile()
    state, _ = compiled(PLAN.take(Decoder()), X)
    with pytest.raises(sw.StaleError, match="decode reads cache"):
        compiled(moved(state), X)


def test_copies_and_pickles_of_a_state_know_what_it_knows() -> None:
    state, fresh = moved(decoded()), decoded()
    for copied in (copy.copy, copy.deepcopy):
        assert is_stale(copied(state))
        assert not is_stale(copied(fresh))


def test_numpy_arrays_in_a_model_are_no_change() -> None:
    model = Decoder(np.float32(1.0))
    model.scale.set_value(np.ones((), np.float32))
    assert not is_stale(PLAN.take(model))
    assert not is_stale(PLAN.take(model))
    model.shift[...] = jnp.ones(())
    assert is_stale(PLAN.take(model))


def test_arrays_that_left_a_state_are_forgotten_with_them() -> None:
    gc.collect()
    before = len(known_arrays._facts)
    state = decoded()
    views = [state["cache"], state["params"]]
    PLAN.put(state, model := Decoder())
    assert len(known_arrays._facts) > before
    del views, model, state
    gc.collect()
    assert len(known_arrays._facts) == before


def test_a_cache_kept_aside_is_recognized() -> None:
    old = decoded()
    kept = old["cache"]
    new = moved(old).replace(cache=jax.tree.map(jnp.zeros_like, kept))
    assert not is_stale(new)  # arrays that were never in a state
    assert is_stale(new.replace(cache=kept))
    assert not is_stale(new.replace(cache=kept, params=old["params"]))


# --- other doors -------------------------------------------------------------------------------------------------


def test_a_transfer_carries_over_what_is_known() -> None:
    state = decoded()
    assert not is_stale(sw.transfer(state, PLAN))
    assert is_stale(sw.transfer(moved(state), PLAN))
    into = PLAN.take(Decoder(3.0))
    assert not is_stale(sw.transfer(state, into, kinds="cache"))  # made elsewhere: not known
    assert is_stale(sw.transfer(moved(state), into, kinds="cache"))
    assert not is_stale(sw.transfer(state, into, kinds=("cache", "params", "lora")))


def test_the_members_of_an_ensemble_are_stale_together() -> None:
    fresh, stale = decoded(), moved(decoded())
    assert not is_stale(PLAN.stack([fresh, fresh]).member(0))
    ensemble = PLAN.stack([fresh, stale])
    assert is_stale(ensemble.member(0))
    restarted = ensemble.restart("cache", where=[[True, False], [True, True]])
    assert is_stale(restarted.member(1))
    assert not is_stale(restarted.restart("cache", where=[1]).member(1))


def test_packed_states_and_states_on_meshes() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    for state in (decoded(pack=True), decoded(mesh=mesh)):
        assert not is_stale(state)
        trained, _ = train(state, X)
        assert is_stale(trained)
        assert not is_stale(trained.restart("cache"))


def test_values_per_device_that_become_one_are_a_change() -> None:
    kinds = KINDS.replace(params=dataclasses.replace(KINDS["params"], placement=sw.PerDevice("data")))
    state = kinds.plan(Decoder()).take(Decoder(), mesh=jax.make_mesh((8,), ("data",)))
    reduced = state.reduce_devices("params")
    assert is_stale(reduced)
    assert not is_stale(reduced.restart("cache"))


def test_several_objects() -> None:
    plan = KINDS.plan(policy=Decoder(), value=Decoder())
    state = plan.take(policy=Decoder(), value=Decoder())
    step = sw.step(lambda policy, value, x: policy(x) + value.sum[...], writes="cache")
    state, _ = step(state, X)
    with pytest.raises(sw.StaleError) as raised:
        step(moved(state), X)
    assert [leaf.path for leaf in raised.value.leaves] == [("policy", "sum"), ("value", "sum")]


def test_an_error_in_a_step_changes_nothing() -> None:
    failing: Step[Any, Any] = sw.step(lambda decoder, x: decoder(x) + jnp.zeros(3), writes="cache")
    state = moved(decoded(declared(stale="restart")))
    with pytest.raises(TypeError):
        failing(state, X)
    state, out = decode(state, X)
    np.testing.assert_array_equal(out, 2.0 * X)


def test_a_donated_state_is_that_first() -> None:
    state = moved(decoded())
    state.restart("cache")
    with pytest.raises(sw.StructureError, match="This state was donated"):
        decode(state, X)


def test_an_audit_reports_it() -> None:
    state = decoded()
    assert sw.audit(decode, state, X).error is None
    stale = moved(state)
    error = sw.audit(decode, stale, X).error
    assert isinstance(error, sw.StaleError)
    assert error.message == "decode reads cache, which is stale: params has changed since."
    assert sw.audit(forward, stale, X).error is None
    assert sw.audit(decode, PLAN.abstract(), X).error is None
    assert sw.audit(decode, stale, X).to_dict()["error"] == str(error)


def test_a_plan_without_dependence_pays_nothing() -> None:
    plan = sw.plan(Decoder())
    state, _ = decode(plan.take(Decoder()), X)
    assert all(part.origin is None and part.known_version is None for part in moved(state).parts)
    assert all(entry.staleness is None for entry in decode._entries[tables_of(plan)].values())
