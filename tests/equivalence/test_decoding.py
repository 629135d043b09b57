"""Decoding token by token with a cache, against `nnx.jit` and against reading the whole sequence at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from equivalence.rivals import assert_same_flat, leaves_of, leaves_of_state

LENGTH, BATCH, WIDTH, ALPHABET = 6, 2, 8, 7


class Decoder(nnx.Module):
    """Two layers of attention over tied embeddings, with a position of its own beside Flax's cache."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(ALPHABET, WIDTH, rngs=rngs)
        self.places = nnx.Param(0.1 * jnp.sin(jnp.arange(LENGTH * WIDTH, dtype=jnp.float32)).reshape(LENGTH, WIDTH))
        self.layers = nnx.List([nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs) for _ in range(2)])
        self.position = nnx.Cache(jnp.array(0))

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.places[...][None, : tokens.shape[1]]
        for layer in self.layers:
            x = x + layer(x, mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x)

    def decode(self, token: Any) -> Any:
        here = jax.lax.dynamic_slice_in_dim(self.places[...], self.position[...], 1)
        x = self.embed(token)[:, None] + here[None]
        for layer in self.layers:
            x = x + layer(x, decode=True)
        self.position[...] += 1
        return self.embed.attend(x)[:, 0]


def decoder() -> Decoder:
    model = Decoder()
    for layer in model.layers:
        layer.init_cache((BATCH, LENGTH, WIDTH))
    return model


def prompt() -> np.ndarray:
    return np.random.default_rng(0).integers(0, ALPHABET, (BATCH, LENGTH))


@sw.step(writes="cache")
def decode(model: Decoder, token: Any) -> Any:
    return model.decode(token)


def test_each_step_gives_the_logits_and_the_cache_of_nnx_jit() -> None:
    model, rival = decoder(), decoder()
    state = sw.plan(model).take(model)
    theirs = nnx.jit(lambda model, token: model.decode(token))
    logits = []
    for token in prompt().T:
        state, mine = decode(state, token)
        np.testing.assert_allclose(mine, theirs(rival, token), rtol=1e-5, atol=1e-6)
        assert_same_flat(leaves_of_state(state), leaves_of(rival))
        logits.append(mine)
    caches = leaves_of_state(state)
    assert int(caches["position",]) == int(caches["layers", 0, "cache_index"]) == LENGTH
    assert (np.abs(caches["layers", 1, "cached_key"]).sum((2, 3)) > 0).all()
    np.testing.assert_allclose(np.stack(logits, 1), model(prompt()), atol=1e-5)


def test_a_restarted_cache_decodes_as_a_new_one() -> None:
    model = decoder()
    state = sw.plan(model).take(model)
    fresh = leaves_of_state(state)
    runs = []
    for _ in range(2):
        logits = []
        for token in prompt().T[:4]:
            state, mine = decode(state, token)
            logits.append(mine)
        runs.append(np.stack(logits))
        state = state.restart("cache")
        assert_same_flat(leaves_of_state(state), fresh, exact=True)
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize("transform", ["scan", "while_loop"])
def test_a_loop_that_feeds_its_token_back_is_the_loop_written_by_hand(transform: str) -> None:
    rival, model = decoder(), decoder()
    theirs = nnx.jit(lambda model, token: model.decode(token).argmax(-1))
    token, expected = jnp.array([1, 2]), []
    for _ in range(LENGTH):
        token = theirs(rival, token)
        expected.append(token)

    def once(state: sw.State, token: Any) -> tuple[sw.State, Any]:
        state, logits = decode(state, token)
        return state, logits.argmax(-1)

    def scanned(state: sw.State, token: Any) -> tuple[sw.State, Any]:
        def body(carry: Any, _: Any) -> Any:
            state, token = once(*carry)
            return (state, token), token

        (state, _), tokens = jax.lax.scan(body, (state, token), length=LENGTH)
        return state, tokens

    def looped(state: sw.State, token: Any) -> tuple[sw.State, Any]:
        def body(carry: Any) -> Any:
            state, token, tokens, at = carry
            state, token = once(state, token)
            return state, token, tokens.at[at].set(token), at + 1

        tokens = jnp.zeros((LENGTH, BATCH), token.dtype)
        state, _, tokens, _ = jax.lax.while_loop(lambda carry: carry[-1] < LENGTH, body, (state, token, tokens, 0))
        return state, tokens

    plan = sw.plan(model)
    state, tokens = jax.jit(scanned if transform == "scan" else looped)(plan.take(model), jnp.array([1, 2]))
    np.testing.assert_array_equal(tokens, np.stack(expected))
    assert_same_flat(leaves_of_state(state), leaves_of(rival))
    plan.put(state, model)
    assert_same_flat(leaves_of(model), leaves_of(rival))


def test_one_set_of_weights_serves_several_caches() -> None:
    model = decoder()
    state = sw.plan(model).take(model)
    first, second = prompt(), prompt()[::-1]
    apart = []
    for tokens in (first, second):
        state = state.restart("cache")
        logits = []
        for token in tokens.T:
            state, mine = decode(state, token)
            logits.append(mine)
        apart.append(np.stack(logits))
    weights = sw.plan(model).take(model)
    caches = [weights["cache"], jax.tree.map(jnp.copy, weights["cache"])]
    interleaved: list[list[Any]] = [[], []]
    for pair in zip(first.T, second.T, strict=True):
        for which, token in enumerate(pair):
            after, mine = decode(weights.replace(cache=caches[which]), token)
            caches[which] = after["cache"]
            interleaved[which].append(mine)
    for mine, expected in zip(interleaved, apart, strict=True):
        np.testing.assert_allclose(np.stack(mine), expected, rtol=1e-6, atol=1e-6)
