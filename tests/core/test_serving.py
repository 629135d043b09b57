"""One set of weights serving many caches, as an inference server has it: slots end and begin, weights arrive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw


class Decoder(nnx.Module):
    """Remembers all it has seen, for each slot on its own."""

    def __init__(self, slots: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(8, 4, rngs=rngs)
        self.memory = nnx.Cache(jnp.zeros((slots, 4)))
        self.length = nnx.Cache(jnp.zeros(slots, jnp.int32))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        self.memory[...] = 0.9 * self.memory[...] + self.embed(tokens)
        self.length[...] += 1
        return self.embed.attend(self.memory[...])


TRACES: list[str] = []


@sw.step(writes="cache")
def decode(model: Decoder, tokens: jax.Array) -> jax.Array:
    TRACES.append("decode")
    return model(tokens).argmax(-1)


def serving() -> sw.State:
    kinds = sw.Kinds.standard().replace(
        cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0),
    )
    model = Decoder(3, nnx.Rngs(0))
    return kinds.plan(model).take(model)


def alone(state: sw.State, tokens: list[int]) -> list[int]:
    """One request in a fresh cache, by NNX itself."""
    model = Decoder(1, nnx.Rngs(0))
    nnx.update(model, state["params"])
    return [int(model(jnp.array([token])).argmax(-1)[0]) for token in tokens]


def test_one_set_of_weights_serves_many_caches() -> None:
    state = serving()
    caches = [jax.tree.map(jnp.copy, state["cache"]) for _ in range(2)]
    requests = [[1, 2, 3], [4, 5, 6]]
    TRACES.clear()
    found: list[list[int]] = [[], []]
    for turn in range(3):
        for number in range(2):
            serves, tokens = decode(state.replace(cache=caches[number]), jnp.full(3, requests[number][turn]))
            assert serves.part("params") is state.part("params")
            caches[number] = serves["cache"]
            found[number].append(int(tokens[0]))
    assert found == [alone(state, request) for request in requests]
    assert TRACES == ["decode"]


def test_slots_are_restarted_one_by_one_while_the_weights_change() -> None:
    """As an inference server does: a request ends, its slot begins anew, the others go on; then new weights arrive."""
    state, requests = serving(), [[1, 2, 3, 4], [5, 6, 7, 1], [2, 2]]
    found: list[list[int]] = [[], [], []]
    TRACES.clear()
    for turn in range(4):
        if turn == 2:  # the third slot's request was over after two tokens
            state = state.restart("cache", where=[2])
            requests[2] = [0, 0, 3, 3]
        state, tokens = decode(state, jnp.array([request[turn] for request in requests]))
        for number, token in enumerate(tokens.tolist()):
            found[number].append(token)
    assert found[0] == alone(state, [1, 2, 3, 4])
    assert found[1] == alone(state, [5, 6, 7, 1])
    assert found[2] == alone(state, [2, 2]) + alone(state, [3, 3])
    assert state["cache"]["length"].tolist() == [4, 4, 2]
    trained = Decoder(3, nnx.Rngs(1))
    state = sw.transfer(sw.plan(trained).take(trained), state, kinds="params")
    assert state["cache"]["length"].tolist() == [4, 4, 2]
    decode(state, jnp.arange(3))
    assert TRACES == ["decode"]
