"""A position beside a cache that a restart leaves behind: by lint and by audit, and no false alarm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from hints import parses
from linted import clean, codes, finds

TOKEN = jnp.ones(())


class Layer(nnx.Module):
    """A cache with its position, which is named and typed as is asked for."""

    def __init__(self, name: str = "cur_ind", type_: Any = nnx.Variable, value: Any = None) -> None:
        self.keys = nnx.Cache(jnp.zeros(4))
        self.name = name
        setattr(self, name, type_(jnp.array(0) if value is None else value))

    def __call__(self, token: Any) -> Any:
        position = getattr(self, self.name)
        self.keys[...] = self.keys[...].at[position[...]].set(token)
        position[...] += 1
        return self.keys[...].sum()


class Position(nnx.Variable):
    pass


def hint(name: str, others: str = "kinds") -> str:
    return (
        f"kinds = {others} | sw.Kinds(positions=sw.Kind(sw.Path('**/{name}'), saved=False, restart=jnp.zeros_like))"
        "  # or a function that returns its initial value\n"
        "state = state.restart('cache', 'positions')\n"
        f"or, where the model makes it: self.{name} = nnx.Cache(jnp.array(0))"
    )


@pytest.mark.parametrize("type_", [nnx.Variable, Position])
@pytest.mark.parametrize(
    "name", ["cur_ind", "index", "cache_index", "idx", "pos", "position", "length", "offset", "step"]
)
def test_a_position_by_its_name(name: str, type_: Any) -> None:
    model = nnx.List([Layer(name, type_)])
    finds(
        "position-left-behind",
        "1 position in a cache does not restart with it.",
        [f"0/{name}: {type_.__name__}() int32  kind=variables"],
        hint(name),
        model,
    )
    parses(hint(name))


@pytest.mark.parametrize(
    "kinds",
    [
        sw.Kinds.standard(),
        sw.Kinds(
            cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like),
            counters=sw.Kind(sw.Exactly(nnx.Variable)),
        ),
    ],
    ids=["rest", "named"],
)
def test_the_hint_restarts_it(kinds: sw.Kinds) -> None:
    model = Layer()
    (found,) = sw.lint(model, kinds=kinds)
    line, restart, _ = found.hint.splitlines()
    scope: dict[str, Any] = {"sw": sw, "nnx": nnx, "jnp": jnp, "dataclasses": dataclasses, "kinds": kinds}
    exec(line, scope)
    kinds = scope["kinds"]
    clean(model, kinds=kinds)
    step = sw.step(lambda layer, token: layer(token), writes=("cache", "positions"))
    state, first = step(kinds.plan(model).take(model), TOKEN)
    scope["state"] = state
    exec(restart, scope)
    state, again = step(scope["state"], TOKEN)
    assert float(first) == float(again)
    assert int(state["positions"]["cur_ind"]) == 1
    assert sw.audit(step, state, TOKEN).left_behind == ()


def test_what_is_no_such_position() -> None:
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 8, 4))
    kept = sw.Kinds.standard().replace(cache=sw.Kind(nnx.Cache, saved=False))
    clean(attention)
    clean(Layer(type_=nnx.Cache))
    clean(nnx.Dict(layer=Layer(type_=nnx.Cache), step=nnx.Variable(jnp.array(0))))  # of the model, not of the cache
    clean(nnx.Dict(step=nnx.Variable(jnp.array(0)), w=nnx.Param(jnp.ones(2))))
    clean(Layer("positive"))
    clean(Layer("index", value=jnp.zeros(())))
    clean(Layer("tokens", value=jnp.zeros(3, int)))
    clean(Layer(), kinds=kept)  # nothing restarts, so nothing is left behind
    assert codes(Layer(), kinds=sw.Kinds.standard()) == ["position-left-behind"]


def test_audit_tells_it_of_a_step_that_writes_both_whatever_the_name() -> None:
    model = nnx.Dict(layer=Layer("n"), calls=nnx.Variable(jnp.array(0)))
    state = sw.plan(model).take(model)

    def decode(model: Any, token: Any) -> Any:
        model.calls[...] += 1
        return model.layer(token)

    audit = sw.audit(sw.step(decode, writes=("cache", "variables")), state, TOKEN)
    assert [row.path for row in audit.left_behind] == [("layer", "n")]
    assert audit.left_behind_hint == hint("n")
    assert "left behind by restart()" in str(audit)
    assert "self.n = nnx.Cache(jnp.array(0))" in str(audit)
    reads = sw.audit(sw.step(lambda model, token: model.layer.keys[...].sum()), state, TOKEN)
    assert reads.left_behind == ()
    assert reads.left_behind_hint is None


def test_audit_says_nothing_of_flax_layers() -> None:
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 8, 4))
    state = sw.plan(attention).take(attention)
    step = sw.step(lambda model, x: model(x), writes=("cache", "rng"))
    assert sw.audit(step, state, jnp.ones((1, 1, 4))).left_behind == ()


class LayerCache(nnx.Module):
    """As in jax-ml/bonsai: a start for each sequence of the batch, and one position for all."""

    def __init__(self) -> None:
        self.k_cache = nnx.Cache(jnp.zeros((2, 8)))
        self.start_ind = nnx.Variable(-jnp.ones(2, jnp.int32))
        self.cur_ind = nnx.Variable(jnp.array(0))
        self.tokens = nnx.Variable(jnp.zeros(8, jnp.int32))

    def __call__(self, token: Any) -> Any:
        self.start_ind[...] = jnp.where(self.start_ind[...] < 0, 1, self.start_ind[...])
        self.k_cache[...] = self.k_cache[...].at[:, self.cur_ind[...]].set(token)
        self.tokens[...] = self.tokens[...].at[self.cur_ind[...]].set(3)
        self.cur_ind[...] += 1
        return self.k_cache[...].sum()


def test_a_position_for_each_slot_and_no_tokens() -> None:
    model = LayerCache()
    (found,) = sw.lint(model)
    assert [sw.format_path(leaf.path) for leaf in found.leaves] == ["cur_ind", "start_ind"]
    decode = sw.step(lambda model, token: model(token), writes=("cache", "variables"))
    audit = sw.audit(decode, sw.plan(model).take(model), TOKEN)
    assert [sw.format_path(row.path) for row in audit.left_behind] == ["cur_ind", "start_ind"]
