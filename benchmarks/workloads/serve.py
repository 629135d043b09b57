"""Steps that do not train, or hardly: decoding, acting and learning in turns, and doing nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from benchmarks import models
from benchmarks.case import Call, Case, EqxCase, Program
from benchmarks.compare import check, compare, table, time_calls
from benchmarks.measure import Settings
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.ours import Ours
from benchmarks.twins import twin

__all__ = ["decode", "decode_case", "decode_wide", "decode_wide_case", "noop", "rl"]

Tables = list[dict[str, Any]]


# --- decoding --------------------------------------------------------------------------------------------------


def next_token(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens, decode=True)


def decode_case(width: int, depth: int, length: int = 64) -> Case:
    """One token in, logits out; every layer's keys, values and index are written."""

    def loop(program: Any) -> Call:
        step = program("decode")
        tokens = jnp.ones((1, 1), int)
        return lambda: step(tokens)

    return Case(
        lambda: models.Transformer(width, depth, dropout=0.0, cache=(1, length), rngs=nnx.Rngs(0)),
        {"decode": Program(next_token, writes="cache", eqx=twin("decoder_fn"))},
        loop,
        eqx=EqxCase(twin("decoder")),
        tiny=lambda: decode_case(width, 1, length),
    )


def decode(settings: Settings) -> Tables:
    case = decode_case(16, 1) if settings.quick else decode_case(64, 4)
    one = compare(case, settings, key="decode", title="One conversation", per="token")
    return [one, many_caches(case, settings)]


def decode_wide_case(depth: int, width: int = 16, length: int = 32) -> Case:
    """One token through a decoder of 119 Variables a layer; every layer's cache is written."""

    def loop(program: Any) -> Call:
        step = program("decode")
        tokens = jnp.ones(1, int)
        return lambda: step(tokens)

    return Case(
        lambda: models.ScaledDecoder(width, depth, length, rngs=nnx.Rngs(0)),
        {"decode": Program(lambda model, tokens: model(tokens), writes="cache")},
        loop,
        tiny=lambda: decode_wide_case(1, width, length),
    )


def decode_wide(settings: Settings) -> Tables:
    """The shape of tpu-inference#2607: thousands of small Variables, read in every step."""
    depth = 4 if settings.quick else 64
    title = f"{depth} layers of 119 Variables"
    return [compare(decode_wide_case(depth), settings, key="decode_wide", title=title, per="token")]


def many_caches(case: Case, settings: Settings, conversations: int = 8) -> dict[str, Any]:
    """One set of weights under many caches, a token for each conversation in turn.

    Ours twice: one state for each conversation, which share the weights; and one state, whose cache is swapped
    before each token.  By hand, the caches are a list of lists.
    """
    model = case.build()
    ours = Ours(case, model)
    step = ours.step("decode")
    tokens = jnp.ones((1, 1), int)
    states = [_with_own_cache(ours.state) for _ in range(conversations)]
    weights = _with_own_cache(ours.state)
    caches = [_with_own_cache(ours.state)["cache"] for _ in range(conversations)]
    hand = ByHand(case, model)
    fn = jax.jit(hand.call_fn(case.programs["decode"]), donate_argnums=1)
    lists = [[array.copy() for array in hand.cache] for _ in range(conversations)]

    def many_states() -> Any:
        for number, state in enumerate(states):
            states[number], logits = step(state, tokens)
        return logits

    def replaced() -> Any:
        for number, cache in enumerate(caches):
            state, logits = step(weights.replace(cache=cache), tokens)
            caches[number] = state["cache"]
        return logits

    def by_hand() -> Any:
        for number, cache in enumerate(lists):
            lists[number], logits = fn(hand.params, cache, hand.rest, tokens)
        return logits

    calls = {"many-states": many_states, "replace": replaced, "by-hand": by_hand}
    labels = {
        "many-states": "Statewise, a state for each conversation",
        "replace": "Statewise, `state.replace(cache=...)` before each token",
        "by-hand": "`jax.jit` by hand: flat lists, donated",
    }
    outputs = {key: [np.asarray(call()) for _ in range(settings.check_steps)] for key, call in calls.items()}
    worst = {key: check(key, found, outputs["many-states"], case.tolerance) for key, found in outputs.items()}
    rows = time_calls(calls, "many-states", settings, per_call=conversations)
    made = [{"key": key, "label": labels[key], **rows[key], "difference": worst[key]} for key in calls]
    title = f"{conversations} conversations over one set of weights"
    return table("decode_many", title, made, per="token", reference="many-states", conversations=conversations)


def _with_own_cache(state: sw.State) -> sw.State:
    return state.replace(cache=jax.tree.map(jnp.copy, state["cache"]))


# --- acting and learning ---------------------------------------------------------------------------------------


def act(model: Any, observation: jax.Array) -> jax.Array:
    return jnp.tanh(model(observation))


def act_eqx(model: Any, state: None, observation: jax.Array) -> jax.Array:
    return jnp.tanh(model(observation[0]))[None]


def regret(model: Any, observation: jax.Array, action: jax.Array, weight: jax.Array) -> jax.Array:
    """Pulls the policy towards what it did, by how well that went."""
    return jnp.mean(weight * (act(model, observation) - action) ** 2)


def regret_eqx(model: Any, state: None, observation: Any, action: Any, weight: Any) -> tuple[Any, None]:
    return regret(jax.vmap(model), observation, action, weight), None


def rl_case() -> Case:
    """A point is to be pushed to the origin; the world is NumPy, each action is one call and each lesson another."""

    def loop(program: Any) -> Call:
        choose, learn = program("act"), program("learn")
        world = np.random.default_rng(0)
        place = world.normal(size=(1, 4)).astype(np.float32)

        def turn() -> Any:
            nonlocal place
            noise = 0.1 * world.normal(size=(1, 2)).astype(np.float32)
            action = np.asarray(choose(place)) + noise
            moved = (0.95 * place + 0.2 * np.concatenate([action, -action], axis=1)).astype(np.float32)
            weight = np.square(place).sum(1, keepdims=True) - np.square(moved).sum(1, keepdims=True)
            loss = learn(place, action, weight)
            place = moved if np.abs(moved).max() < 5 else world.normal(size=(1, 4)).astype(np.float32)
            return loss

        return turn

    return Case(
        lambda: models.Policy(4, 2, rngs=nnx.Rngs(0)),
        {"act": Program(act, eqx=act_eqx), "learn": Program(regret, trains=True, eqx=regret_eqx)},
        loop,
        optax.adam(1e-3),
        eqx=EqxCase(twin("policy")),
    )


def rl(settings: Settings) -> Tables:
    title = "A policy of six leaves: one action, one lesson"
    return [compare(rl_case(), settings, key="rl", title=title, per="turn")]


# --- nothing ---------------------------------------------------------------------------------------------------


def nothing(model: Any, x: jax.Array) -> jax.Array:
    return x + 1


def nothing_eqx(model: Any, state: None, x: jax.Array) -> jax.Array:
    return x + 1


def noop_case(leaves: int) -> Case:
    def loop(program: Any) -> Call:
        step = program("nothing")
        x = jnp.zeros(())
        return lambda: step(x)

    return Case(
        lambda: models.Vectors(leaves),
        {"nothing": Program(nothing, eqx=nothing_eqx)},
        loop,
        eqx=EqxCase(twin("vectors")),
        tiny=lambda: noop_case(2),
    )


def noop(settings: Settings) -> Tables:
    leaves = 200 if settings.quick else 2000
    title = f"A step that looks at none of {leaves:,} leaves"
    return [compare(noop_case(leaves), settings, key="noop", title=title)]
