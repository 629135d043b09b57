"""The tables of flax's own `nnx.RoPE`: found where they are saved, and with the hint a model of any length restores."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import parses
from linted import clean, codes, finds

RoPE: Any = getattr(nnx, "RoPE", None)
# Flax's own layer reads its tables in a way that flax has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
needs_rope = pytest.mark.skipif(RoPE is None, reason="flax 0.12.8 does not have nnx.RoPE")

TABLES = sw.Path("**/cached_sin") | sw.Path("**/cached_cos")


class Block(nnx.Module):
    def __init__(self, length: int, theta: float, rngs: nnx.Rngs) -> None:
        self.rope = RoPE(theta, embedding_size=4, max_seq_len=length)
        self.mix = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q = self.rope(self.mix(x))
        seen = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        return x + jax.nn.softmax(jnp.where(seen, q @ q.T, -jnp.inf)) @ x


class Decoder(nnx.Module):
    """Generates by feeding back what it made; the length that it may reach is that of its tables."""

    def __init__(self, length: int, theta: float = 500.0, depth: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.blocks = nnx.List([Block(length, theta, rngs) for _ in range(depth)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


def followed(hint: str, kinds: sw.Kinds) -> sw.Kinds:
    scope: dict[str, Any] = {"sw": sw, "nnx": nnx, "jnp": jnp, "dataclasses": dataclasses, "kinds": kinds}
    exec(hint, scope)
    return scope["kinds"]  # type: ignore[no-any-return]


def hint(declaration: str, theta: str = "500.0") -> str:
    return (
        "def table(array, path):\n"
        f"    rope = nnx.RoPE({theta}, embedding_size=2 * array.shape[-1], max_seq_len=array.shape[-2])\n"
        "    return jnp.broadcast_to(getattr(rope, path[-1])[...], array.shape).astype(array.dtype)\n"
        f"kinds = {declaration}"
    )


OF = "sw.Path('**/cached_sin') | sw.Path('**/cached_cos')"
OWN = f"sw.Kinds(constants=sw.Kind({OF}, frozen=True, saved=False, restart=table))"


@needs_rope
def test_the_tables_of_rope_are_found_in_kinds_that_are_saved() -> None:
    finds(
        "constant-saved",
        "The kind 'variables' is saved, and holds 4 tables of nnx.RoPE.",
        [
            f"blocks/{block}/rope/cached_{name}: Variable(8, 2) float32  kind=variables"
            for block in (0, 1)
            for name in ("cos", "sin")
        ],
        hint(f"kinds | {OWN}"),
        Decoder(8),
    )
    finds(
        "constant-saved",
        "The kind 'plain' is saved, and holds 2 tables of nnx.RoPE.",
        [f"cached_{name}: Variable(8, 2) float32  kind=plain" for name in ("cos", "sin")],
        hint(
            "kinds.replace(plain=dataclasses.replace(kinds['plain'], "
            f"of=nnx.All(sw.Exactly(nnx.Variable), nnx.Not({OF})))) | {OWN}",
            "10000.0",
        ),
        RoPE(embedding_size=4, max_seq_len=8),
        kinds=sw.Kinds(plain=sw.Kind(sw.Exactly(nnx.Variable))),
    )
    parses(hint(f"kinds | {OWN}"))


@needs_rope
def test_what_is_not_a_table_or_is_not_saved_is_not_found() -> None:
    clean(RoPE())  # without a length there are no tables
    clean(nnx.Dict(rope=RoPE(), cached_sin=nnx.Variable(jnp.ones(3)), cached_cos=nnx.Variable(jnp.ones(3))))
    kinds = sw.Kinds.standard() | sw.Kinds(constants=sw.Kind(TABLES, saved=False))
    clean(Decoder(8), kinds=kinds)
    clean(kinds.plan(Decoder(8)))
    model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    rope = RoPE(embedding_size=2, max_seq_len=8)
    model.attention_fn = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)  # type: ignore[attr-defined]
    clean(model)  # the tables are not leaves of this model


@needs_rope
@pytest.mark.parametrize("given", ["plan", "state", "abstract", "objects", "members"])
def test_however_the_model_is_passed(given: str) -> None:
    model = Decoder(8)
    plan = sw.plan(model)
    passed: dict[str, Any] = {
        "plan": [plan],
        "state": [plan.take(model)],
        "abstract": [nnx.eval_shape(lambda: Decoder(8))],
        "objects": [model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)],
        "members": [plan.stack([plan.take(model), plan.take(model)])],
    }
    assert set(codes(*passed[given])) == {"constant-saved"}


@needs_rope
def test_a_table_that_layers_share_is_one_and_a_subclass_is_meant_too() -> None:
    class Scaled(RoPE):  # type: ignore[misc]
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x) * 2  # type: ignore[no-any-return]

    rope = Scaled(embedding_size=4, max_seq_len=8)
    (found,) = sw.lint(nnx.Dict(a=nnx.Dict(rope=rope), b=nnx.Dict(rope=rope)), ignore="tied-weights")
    assert found.message == "The kind 'variables' is saved, and holds 2 tables of nnx.RoPE."


@needs_rope
def test_two_frequencies_of_one_kind_are_one_finding(tmp_path: Path) -> None:
    model = nnx.Dict(near=Block(8, 10.0, nnx.Rngs(0)), far=Block(8, 1000.0, nnx.Rngs(1)))
    (found,) = sw.lint(model)
    kinds = followed(found.hint, sw.Kinds.standard())
    clean(model, kinds=kinds)
    plan = kinds.plan(model)
    assert [len(plan[name]) for name in ("constants", "variables")] == [4, 0]
    sw.save(tmp_path / "saved", plan.take(model))
    longer = nnx.Dict(near=Block(16, 10.0, nnx.Rngs(0)), far=Block(16, 1000.0, nnx.Rngs(1)))
    fresh, _ = sw.restore(tmp_path / "saved", kinds.plan(longer).abstract())
    for name in ("near", "far"):
        table = longer[name].rope.cached_cos[...]
        assert jnp.array_equal(fresh["constants"][name]["rope"]["cached_cos"][...], table)


@needs_rope
def test_the_hints_for_two_kinds_can_both_be_followed_at_once() -> None:
    model = nnx.Dict(near=Block(8, 10.0, nnx.Rngs(0)), far=Block(8, 1000.0, nnx.Rngs(1)))
    kinds = sw.Kinds(
        params=sw.Kind(nnx.Param),
        near=sw.Kind(sw.Path("near/rope/**"), optional=True),
        far=sw.Kind(sw.Path("far/rope/**"), optional=True),
    )
    found = sw.lint(model, kinds=kinds)
    assert [each.code for each in found] == ["constant-saved"] * 2
    for each in found:
        kinds = followed(each.hint, kinds)
    assert "constant-saved" not in codes(model, kinds=kinds)
    plan = kinds.plan(model)
    assert [len(plan[name]) for name in ("constants", "constants_2", "near", "far")] == [2, 2, 0, 0]


@needs_rope
def test_a_leaf_of_the_same_name_stays_where_it_is() -> None:
    model = nnx.Dict(rope=RoPE(embedding_size=4, max_seq_len=8), cached_sin=nnx.Variable(jnp.ones(3)))
    (found,) = sw.lint(model)
    kinds = followed(found.hint, sw.Kinds.standard())
    clean(model, kinds=kinds)
    plan = kinds.plan(model)
    assert [sw.format_path(leaf.path) for leaf in plan["constants"]] == ["rope/cached_cos", "rope/cached_sin"]
    assert [sw.format_path(leaf.path) for leaf in plan["variables"]] == ["cached_sin"]


@sw.step
def logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def generate(state: sw.State, length: int, steps: int) -> list[int]:
    return _generated(lambda tokens: logits(state, tokens), length, steps)


def generate_by_flax(model: Decoder, length: int, steps: int) -> list[int]:
    call = nnx.jit(lambda model, tokens: model(tokens))
    return _generated(lambda tokens: call(model, tokens), length, steps)


def _generated(call: Any, length: int, steps: int) -> list[int]:
    tokens = np.zeros(length, np.int32)
    for position in range(steps):
        tokens[position + 1] = call(jnp.asarray(tokens))[position].argmax()
    return tokens.tolist()[: steps + 1]  # type: ignore[no-any-return]


def trained(kinds: sw.Kinds, length: int) -> sw.State:
    model = Decoder(length)
    plan = kinds.plan(model, optimizers={"params": optax.adam(0.05)})

    @sw.train_step
    def train(model: Decoder, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:-1]), tokens[1:]).mean()

    state = plan.take(model)
    for _ in range(10):
        state, _ = train(state, jnp.array([1, 5, 2, 3, 6, 4, 0, 1]))
    return state


@needs_rope
def test_without_the_hint_another_length_is_refused(tmp_path: Path) -> None:
    """What the rule is there for, and that the tables do cost space."""
    kinds = sw.Kinds.standard()
    state = trained(kinds, 8)
    sw.save(tmp_path / "run", state)
    assert sw.inspect(tmp_path / "run")["variables"].nbytes == 4 * 8 * 2 * 4
    longer = kinds.plan(Decoder(32), optimizers={"params": optax.adam(0.05)})
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", longer.abstract())
    assert {leaf.path[-1] for leaf in caught.value.leaves} == {"cached_sin", "cached_cos"}


@needs_rope
@pytest.mark.parametrize("target", ["abstract", "values"])
@pytest.mark.parametrize("base", ["standard", "named"])
def test_with_the_hint_a_model_of_another_length_restores_and_generates(tmp_path: Path, target: str, base: str) -> None:
    named = sw.Kinds(params=sw.Kind(nnx.Param), plain=sw.Kind(sw.Exactly(nnx.Variable)), rest=sw.Kind(...))
    kinds = {"standard": sw.Kinds.standard(), "named": named}[base]
    (found,) = sw.lint(Decoder(8), kinds=kinds)
    kinds = followed(found.hint, kinds)
    state = trained(kinds, 8)
    sw.save(tmp_path / "run", state)
    census = sw.inspect(tmp_path / "run")
    assert not any(census[kind].leaves for kind in census if kind not in ("params", "optimizer"))

    plan = kinds.plan(Decoder(32), optimizers={"params": optax.adam(0.05)})
    longer, report = sw.restore(tmp_path / "run", plan.abstract() if target == "abstract" else plan.take(Decoder(32)))
    assert report.counts["constants"] == {"restarted" if target == "abstract" else "kept": 4}
    # The judge is flax: its own tables of that length, and its own model with the trained weights.
    tables = RoPE(500.0, embedding_size=4, max_seq_len=32)
    for name in ("cached_sin", "cached_cos"):
        for block in (0, 1):
            np.testing.assert_array_equal(
                longer["constants"]["blocks"][block]["rope"][name], getattr(tables, name)[...]
            )
    model = Decoder(32)
    nnx.update(model, nnx.state(state.plan.build(state), nnx.Param))
    assert generate(longer, 32, 20) == generate_by_flax(model, 32, 20)
    assert generate(state, 8, 6) == generate(longer, 32, 6)  # within the first length, the length does not matter


@needs_rope
def test_with_the_hint_stacked_layers_and_members_get_their_tables(tmp_path: Path) -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> Block:
        return Block(8, 500.0, nnx.Rngs(key))

    model = nnx.Dict(blocks=make(jax.random.split(jax.random.key(0), 3)))
    kinds = followed(sw.lint(model)[0].hint, sw.Kinds.standard())
    plan = kinds.plan(model)
    sw.save(tmp_path / "layers", plan.take(model))
    state, _ = sw.restore(tmp_path / "layers", plan.abstract())
    sin = RoPE(500.0, embedding_size=4, max_seq_len=8).cached_sin[...]
    np.testing.assert_array_equal(state["constants"]["blocks"]["rope"]["cached_sin"], jnp.stack([sin] * 3))

    single = kinds.plan(Decoder(8))
    members = single.stack([single.take(Decoder(8))] * 2)
    sw.save(tmp_path / "members", members)
    state, _ = sw.restore(tmp_path / "members", members.plan.abstract())
    np.testing.assert_array_equal(state["constants"]["blocks"][0]["rope"]["cached_sin"], jnp.stack([sin] * 2))


@needs_rope
def test_with_the_hint_no_step_writes_the_tables() -> None:
    model = Decoder(8)
    kinds = followed(sw.lint(model)[0].hint, sw.Kinds.standard())

    @sw.step(writes=("variables",))
    def spoil(model: Decoder) -> None:
        model.blocks[0].rope.cached_sin[...] *= 2

    with pytest.raises(sw.UndeclaredWriteError):
        spoil(kinds.plan(model).take(model))
