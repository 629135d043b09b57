"""What a jaxpr forwards and reads: primitive by primitive (the laws: test_effects_laws.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from statewise._src.step.effects import effects_of, forwarded

X = jnp.arange(6.0).reshape(2, 3)
MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def sources(fn: Callable[..., Any], *args: Any) -> tuple[int | None, ...]:
    return forwarded(jax.make_jaxpr(fn)(*args))


def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hands on, and computes."""
    return x, x * 2


def custom_jvp(fn: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


def custom_vjp(fn: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda *args: (fn(*args), None), lambda _, grads: (grads,))
    return wrapped


def custom_vmap(fn: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = jax.custom_batching.custom_vmap(fn)
    wrapped.def_vmap(lambda size, mapped, *args: (jax.vmap(fn)(*args), (True, True)))
    return wrapped


def composite(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.lax.composite(fn, name="tests.both")


# --- one equation at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x,
        lambda x: x[...],
        lambda x: x.astype(x.dtype),
        jnp.copy,
        jax.lax.stop_gradient,
        jax.lax.optimization_barrier,
        jax.device_put,
        lambda x: checkpoint_name(x, "here"),
        lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(MESH, jax.P("d"))),
        lambda x: x.T.T,
        lambda x: jnp.squeeze(jnp.moveaxis(jnp.moveaxis(x[None], 0, 2), 2, 0), 0),
        lambda x: x.ravel().reshape(2, 3),
        lambda x: jnp.squeeze(x[None, :, None], (0, 2)),
        lambda x: jax.lax.map(lambda row: row, x),
        lambda x: jnp.where(x.sum() > 0, x, x),
        lambda x: jax.lax.select_n(x > 0, x, jnp.copy(x)),
    ],
)
def test_moved_about_but_not_changed(fn: Callable[..., Any]) -> None:
    assert sources(fn, X) == (0,)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * 1,
        lambda x: x.T.reshape(2, 3),
        lambda x: x.reshape(3, 2).T.reshape(3, 2).T,
        lambda x: jnp.swapaxes(x.reshape(3, 2), 0, 1),
        lambda x: x[::-1],
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
        lambda x: jnp.ones((2, 3)),
        lambda x: np.ones((2, 3)),
        lambda x: jnp.broadcast_to(x[:1], (2, 3)),
        lambda x: jnp.where(x > 0, x, 0.0),
        lambda x: x.at[0].set(x[0]),
    ],
)
def test_computed(fn: Callable[..., Any]) -> None:
    assert sources(fn, X) == (None,)


def test_a_constant_is_no_input() -> None:
    constant = jnp.ones((2, 3))
    assert sources(lambda x: (constant, x, 3.0), X) == (None, 0, None)


def test_outputs_are_told_apart() -> None:
    assert sources(lambda a, b, c: (b, a, b, a + b), 1.0, 2.0, 3.0) == (1, 0, 1, None)


def test_another_type_is_another_value() -> None:
    # The words of the key are the same, and so is the shape of the array of them.
    key = jax.random.key(0, impl="rbg")
    rewrap = jax.random.wrap_key_data
    assert sources(lambda k: rewrap(jax.random.key_data(k), impl="rbg"), key) == (0,)
    assert sources(lambda k: rewrap(jax.random.key_data(k), impl="unsafe_rbg"), key) == (None,)
    assert sources(jax.random.clone, key) == (0,)
    data = jax.random.key_data(key)
    assert sources(lambda d: jax.random.key_data(rewrap(d, impl="rbg")), data) == (0,)
    assert sources(lambda k: jax.random.key_data(k), key) == (None,)
    assert sources(lambda k: jax.random.split(k)[0], key) == (None,)


def test_a_reference_may_be_written() -> None:
    def through_reference(x: jax.Array) -> jax.Array:
        reference = jax.new_ref(x)
        reference[...] = reference[...] + 1
        return reference[...]

    assert sources(through_reference, X) == (None,)


# --- calls -----------------------------------------------------------------------------------------------------------


CALLS = [jax.jit, jax.checkpoint, custom_jvp, custom_vjp, custom_vmap, composite, jax.named_call]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_through_calls(call: Callable[..., Any]) -> None:
    assert sources(call(both), X) == (0, None)
    assert sources(lambda x: call(call(both))(x), X) == (0, None)
    assert sources(lambda x, y: call(lambda x, y: (y, x))(x, y), X, X) == (1, 0)
    if call is not composite:  # which JAX cannot map
        assert sources(lambda x: jax.vmap(call(both))(x), X) == (0, None)


def test_through_calls_that_are_differentiated() -> None:
    def loss(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        kept, changed = jax.checkpoint(both)(x)
        (carried, _), stacked = jax.lax.scan(lambda c, row: ((c[0], c[1] * row.sum()), row), (kept, 1.0), x)
        return changed.sum(), (kept, carried, stacked)

    assert sources(lambda x: jax.value_and_grad(loss, has_aux=True)(x)[0][1], X) == (0, 0, 0)


def test_through_shard_map() -> None:
    def moved(into: Any, out: Any, **options: Any) -> tuple[int | None, ...]:
        return sources(jax.shard_map(lambda x: x, mesh=MESH, in_specs=into, out_specs=out, **options), X)

    assert moved(jax.P("d"), jax.P("d")) == (0,)
    assert moved(jax.P(), jax.P()) == (0,)
    # Each device's half taken for the whole, and the whole for each device's half.
    assert moved(jax.P("d"), jax.P(), check_vma=False) == (None,)
    assert moved(jax.P(), jax.P("d")) == (None,)


# --- control flow ----------------------------------------------------------------------------------------------------


def test_through_cond() -> None:
    def run(*branches: Callable[..., Any]) -> tuple[int | None, ...]:
        return sources(lambda i, x, y: jax.lax.switch(i, branches, x, y), 1, X, X)

    keep, swap, write = (lambda x, y: (x, y)), (lambda x, y: (y, x)), (lambda x, y: (x, y + 1))
    assert run(keep, keep) == (1, 2)
    assert run(swap, swap, swap) == (2, 1)
    assert run(keep, write) == (1, None)
    assert run(keep, swap) == (None, None)


def test_branches_that_know_one_value_by_two_names() -> None:
    assert sources(lambda p, x: jax.lax.cond(p, lambda y: y, lambda y: x, x), True, X) == (1,)
    assert sources(lambda p, x: jax.lax.cond(p, lambda y: jax.jit(jnp.copy)(y), lambda y: y, x), True, X) == (1,)


def test_cond_under_vmap_is_a_selection() -> None:
    def run(write: float) -> tuple[int | None, ...]:
        kept = jax.checkpoint(lambda row: row * write if write else row)
        return sources(jax.vmap(lambda row: jax.lax.cond(row.sum() > 0, kept, lambda row: row, row)), X)

    assert run(0.0) == (0,)
    assert run(2.0) == (None,)


def test_through_scan() -> None:
    def run(body: Callable[..., Any], length: int = 2, **options: Any) -> tuple[int | None, ...]:
        rows = X[:length]
        return sources(lambda a, b, x, k: jax.lax.scan(body(k), (a, b), x, **options), 1.0, 2.0, rows, 3.0)

    for options in ({}, {"reverse": True}, {"unroll": 2}, {"length": 2}):
        assert run(lambda k: lambda c, row: (c, (row, row + 1)), **options) == (0, 1, 2, None)
    assert run(lambda k: lambda c, row: ((c[0], c[1] * k), (row, row[::-1]))) == (0, None, 2, None)
    assert run(lambda k: lambda c, row: ((c[1], c[0]), row)) == (None, None, 2)
    # What is stacked is more than the carried value or the constant.
    assert run(lambda k: lambda c, row: (c, (c[0], k))) == (0, 1, None, None)
    assert run(lambda k: lambda c, row: ((c[0], row[0]), ())) == (0, None)


def test_a_constant_handed_out_by_a_loop() -> None:
    def run(length: int, start: Callable[..., Any]) -> tuple[int | None, ...]:
        return sources(lambda c, k: jax.lax.scan(lambda _, __: (k, ()), start(c, k), length=length)[0], 1.0, 2.0)

    assert run(3, lambda c, k: c) == (1,)
    assert run(0, lambda c, k: c) == (None,)  # without a turn it is still the first value
    assert run(0, lambda c, k: k) == (1,)

    def turning(c: Any, k: Any) -> Any:
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, k, c[1]), (0, c, k))

    assert sources(turning, 1.0, 2.0) == (None, None, None)
    assert sources(lambda k: turning(k, k), 2.0) == (None, 0, 0)


def test_a_scan_without_turns() -> None:
    nothing = jnp.zeros((0, 3))
    assert sources(lambda c, x: jax.lax.scan(lambda c, row: (c, row), c, x), 1.0, nothing) == (0, 1)


def test_a_scan_along_another_axis() -> None:
    def along_columns(x: jax.Array) -> Any:
        rows = jax.lax.scan(lambda c, row: (c, both(row)), 0.0, jnp.moveaxis(x, 1, 0))[1]
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), rows)

    assert sources(along_columns, X) == (0, None)
    for axis in (0, 1):
        mapped = jax.vmap(lambda row: jax.lax.scan(lambda c, v: (c, both(v)), 0.0, row)[1], axis, axis)
        assert sources(mapped, X) == (0, None)


def test_through_while() -> None:
    def run(body: Callable[..., Any]) -> tuple[int | None, ...]:
        def loop(n: Any, a: Any, b: Any, k: Any) -> Any:
            limit = k * 2
            return jax.lax.while_loop(lambda c: c[0] < limit, body(k), (n, a, b))

        return sources(loop, 0.0, 1.0, 2.0, 3.0)

    assert run(lambda k: lambda c: (c[0] + 1, c[1], c[2])) == (None, 1, 2)
    assert run(lambda k: lambda c: (c[0] + k, c[2], c[1])) == (None, None, None)
    assert run(lambda k: lambda c: (c[0] + k, c[1], k)) == (None, 1, None)
    assert run(lambda k: lambda c: (c[0] + 1, c[1], jax.jit(both)(c[2])[0])) == (None, 1, 2)


def test_a_long_chain_is_followed() -> None:
    def chain(p: Any, x: jax.Array) -> Any:
        keep = jax.jit(jnp.copy)
        for _ in range(1500):
            x = jax.lax.select_n(p, keep(x), x)
        return x

    assert sources(chain, True, 1.0) == (1,)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_reads_and_the_smaller_jaxpr() -> None:
    def fn(a: Any, b: Any, c: Any, d: Any) -> Any:
        unused = c * 2
        return jnp.sin(b), a, b + 1, c, jax.jit(lambda d, unused: d)(d, unused)

    effects = effects_of(jax.make_jaxpr(fn)(1.0, 2.0, 3.0, 4.0), [(1, 0), (2, 1), (3, 2), (4, 3)])
    assert effects.written == (False, True, False, False)
    assert effects.read == (False, True, False, False)
    assert len(effects.jaxpr.invars) == 1
    assert len(effects.jaxpr.outvars) == 2


def test_reads_inside_a_loop() -> None:
    def fn(a: Any, b: Any, c: Any, x: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            return (carry[0], carry[1] + 1, carry[2] * carry[1]), row

        (a, b, c), rows = jax.lax.scan(body, (a, b, c), x)
        return a, b, rows

    effects = effects_of(jax.make_jaxpr(fn)(1.0, 2.0, 3.0, X), [(0, 0), (1, 1), (2, 3)])
    assert effects.written == (False, True, False)
    assert effects.read == (False, True, False, False)


def test_what_only_has_an_effect_is_kept() -> None:
    def fn(a: Any) -> Any:
        jax.debug.print("{}", a)
        return a

    effects = effects_of(jax.make_jaxpr(fn)(1.0), [(0, 0)])
    assert effects.written == (False,)
    assert effects.read == (True,)
