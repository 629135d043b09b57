"""Kinds that depend on others: how that is declared, what makes one stale, and what makes it fresh.

`tests/laws/test_stale.py` draws sequences of all of this; here each case has its text, and its numbers.
"""

from __future__ import annotations

import dataclasses
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
from stale_decoder import (
    AVERAGES,
    CACHE,
    KINDS,
    OPTIMIZERS,
    PLAN,
    Decoder,
    X,
    declared,
    decode,
    decoded,
    evaluate,
    fill,
    forward,
    is_stale,
    moved,
    train,
)
from statewise._src.core.plan import tables_of

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
    with nnx.var_defaults(ref=False):  # reading a reference gives a new array, of which nothing is known
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
