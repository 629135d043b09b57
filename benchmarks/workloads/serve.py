"""Steps that do not train, or hardly: decoding, acting and learning in turns, and doing nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from benchmarks import models
from benchmarks.case import Call, Case, EqxCase, Program
from benchmarks.compare import check, compare, fresh, table, time_calls
from benchmarks.machine import order
from benchmarks.measure import Settings, timed
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.flax_nnx import Nnx
from benchmarks.styles.ours import Ours
from benchmarks.twins import twin

__all__ = [
    "FEWEST_CALLS",
    "LOOPS",
    "TOKENS",
    "decode",
    "decode_case",
    "decode_loop",
    "decode_wide",
    "decode_wide_case",
    "noop",
    "rl",
]

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


# Each compiles for a minute; packed it would be six, for a step that hardly returns an array.
WIDE = ("statewise", "by-hand", "nnx.jit_partial", "nnx.jit", "equinox", "equinox-flat")


# A step is longer than a sample is else; but the first call after others' finds none of its code in the processor's
# caches.  So a sample is four calls at least, as in a loop of tokens.
FEWEST_CALLS = 4
# How many tokens one call makes, where it makes several.
TOKENS = 32


def decode_wide_case(depth: int, width: int = 16, length: int = 32) -> Case:
    """One token through a decoder of 119 Variables a layer; every layer's cache is written."""

    def loop(program: Any) -> Call:
        step = program("decode")
        tokens = jnp.ones(1, int)
        return lambda: step(tokens)

    return Case(
        lambda: models.ScaledDecoder(width, depth, length, rngs=nnx.Rngs(0)),
        {"decode": Program(lambda model, tokens: model(tokens), writes="cache", eqx=twin("scaled_decoder_fn"))},
        loop,
        eqx=EqxCase(twin("scaled_decoder")),
        tiny=lambda: decode_wide_case(1, width, length),
    )


def decode_wide(settings: Settings) -> Tables:
    """The shape of tpu-inference#2607: thousands of small Variables, read in every step."""
    depth = 4 if settings.quick else 64
    title = f"{depth} layers of 119 Variables"
    case = decode_wide_case(depth)
    several = dataclasses.replace(settings, fewest_calls=FEWEST_CALLS)
    first = f"{title}, samples of at least four calls"
    one = compare(case, several, key="decode_wide", title=first, per="token", names=WIDE)
    return [one, decode_loop(case, settings, f"{title}, {TOKENS} tokens")]


# --- many tokens in one call -----------------------------------------------------------------------------------


def decode_loop(case: Case, settings: Settings, title: str, tokens: int = TOKENS) -> dict[str, Any]:
    """So many tokens, each the likeliest after the one before it: in one call that may stop early, and in a call each.

    What is timed never stops early; that both loops stop at the same token is checked first.
    """
    copy = fresh(case)
    texts, calls, firsts = {}, {}, {}
    for key in order(LOOPS):
        calls[key] = LOOPS[key].make(case, copy(), tokens)
        firsts[key], text = timed(lambda call=calls[key]: call(-1))
        texts[key] = np.asarray(text)
    worst = {key: check(key, [text], [texts["loop"]], 0.0) for key, text in texts.items()}
    end = int(texts["loop"][tokens // 2])
    length = int(np.argmax(texts["loop"] == end)) + 1
    for key in ("loop", "loop-over-step", "by-hand-loop"):
        stopped = np.asarray(LOOPS[key].make(case, copy(), tokens)(end))
        check(f"{key}, stopped", [stopped], [np.where(np.arange(tokens) < length, texts["loop"], 0)], 0.0)
    rows = time_calls({key: lambda call=call: call(-1) for key, call in calls.items()}, "loop", settings, tokens)
    made = [
        {"key": key, "label": loop.label, **rows[key], "first_call_s": firsts[key], "difference": worst[key]}
        for key, loop in LOOPS.items()
    ]
    return table("decode_loop", title, made, per="token", reference="loop", tokens=tokens)


def _until(decode: Call, tokens: int, while_loop: Call = jax.lax.while_loop) -> Call:
    """The loop of all: of (what decoding writes, a token, the token that ends it); returns the text, zeros after it."""

    def loop(written: Any, token: jax.Array, end: jax.Array) -> Any:
        def unfinished(carry: Any) -> jax.Array:
            _, token, count, _ = carry
            return (count < tokens) & (token[0] != end)

        def one(carry: Any) -> Any:
            written, token, count, text = carry
            written, logits = decode(written, token)
            token = logits.argmax(-1)
            return written, token, count + 1, text.at[count].set(token[0])

        written, _, _, text = while_loop(unfinished, one, (written, token, 0, jnp.zeros(tokens, int)))
        return written, text

    return loop


def _ours_loop(case: Case, model: Any, tokens: int) -> Call:
    fn = case.programs["decode"].fn
    loop = _until(lambda model, token: (model, fn(model, token)), tokens, nnx.while_loop)
    generate = sw.step(lambda model, token, end: loop(model, token, end)[1], writes="cache")
    return _generating(Ours(case, model), generate)


def _loop_over_step(case: Case, model: Any, tokens: int) -> Call:
    ours = Ours(case, model)
    return _generating(ours, jax.jit(_until(ours.step("decode"), tokens), donate_argnums=0))


def _generating(ours: Ours, generate: Call) -> Call:
    def call(end: int) -> Any:
        ours.state, text = generate(ours.state, jnp.ones(1, int), end)
        return text

    return call


def _hand_loop(case: Case, model: Any, tokens: int) -> Call:
    hand = ByHand(case, model)
    fn = hand.call_fn(case.programs["decode"])

    def generate(params: Any, cache: Any, rest: Any, token: jax.Array, end: jax.Array) -> Any:
        return _until(lambda cache, token: fn(params, cache, rest, token), tokens)(cache, token, end)

    compiled = jax.jit(generate, donate_argnums=1)

    def call(end: int) -> Any:
        hand.cache, text = compiled(hand.params, hand.cache, hand.rest, jnp.ones(1, int), end)
        return text

    return call


def _ours_calls(case: Case, model: Any, tokens: int) -> Call:
    return _calls(Ours(case, model).program("decode"), tokens)


def _hand_calls(case: Case, model: Any, tokens: int) -> Call:
    return _calls(ByHand(case, model).program("decode"), tokens)


def _calls(decode: Call, tokens: int) -> Call:
    likeliest = jax.jit(lambda logits: logits.argmax(-1))

    def call(end: int) -> Any:
        token, text = jnp.ones(1, int), []
        for _ in range(tokens):
            token = likeliest(decode(token))
            text.append(token)
        return jnp.concatenate(text)

    return call


@dataclasses.dataclass(frozen=True)
class Loop:
    """One way to generate: its label, and what makes a call, of the token that ends the text, that returns the text."""

    label: str
    make: Callable[[Case, Any, int], Call]


LOOPS = {
    "loop": Loop("Statewise, a step with `nnx.while_loop` in it", _ours_loop),
    "loop-over-step": Loop(
        "Statewise, `jax.lax.while_loop` over a step, which returns the complete state", _loop_over_step
    ),
    "by-hand-loop": Loop("`jax.lax.while_loop` by hand: flat lists, donated", _hand_loop),
    "calls": Loop("Statewise, a call for each token", _ours_calls),
    "by-hand-calls": Loop("`jax.jit` by hand: flat lists, donated, a call for each token", _hand_calls),
}


# --- many conversations ------------------------------------------------------------------------------------------


def many_caches(case: Case, settings: Settings, conversations: int = 8) -> dict[str, Any]:
    """One set of weights under many caches, a token for each conversation in turn.

    Ours twice: one state for each conversation, which share the weights; and one state, whose cache is swapped
    before each token.  By hand, the caches are a list of lists.  `nnx.jit_partial` holds one model, whose cache is
    swapped too.
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

    partial = Nnx(case, case.build(), variant="partial")
    decode_partial = partial.program("decode")
    own = [_cache_of(partial.model) for _ in range(conversations)]

    def jit_partial() -> Any:
        for number, cache in enumerate(own):
            nnx.update(partial.model, cache)
            logits = decode_partial(tokens)
            own[number] = _cache_of(partial.model)
        return logits

    calls = {"many-states": many_states, "replace": replaced, "by-hand": by_hand, "nnx.jit_partial": jit_partial}
    labels = {
        "many-states": "Statewise, a state for each conversation",
        "replace": "Statewise, `state.replace(cache=...)` before each token",
        "by-hand": "`jax.jit` by hand: flat lists, donated",
        "nnx.jit_partial": "`nnx.jit_partial(graph=False)`, `nnx.update` before each token",
    }
    outputs = {key: [np.asarray(call()) for _ in range(settings.check_steps)] for key, call in calls.items()}
    worst = {key: check(key, found, outputs["many-states"], case.tolerance) for key, found in outputs.items()}
    rows = time_calls(calls, "many-states", settings, per_call=conversations)
    made = [{"key": key, "label": labels[key], **rows[key], "difference": worst[key]} for key in calls]
    title = f"{conversations} conversations over one set of weights"
    return table("decode_many", title, made, per="token", reference="many-states", conversations=conversations)


def _cache_of(model: Any) -> Any:
    return nnx.as_pure(nnx.state(model, nnx.Cache))


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
