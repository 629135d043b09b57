"""The names of primitives are those of the installed JAX: what a public function of JAX traces to is in its set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import pytest
from jax.extend.core import primitives as jax_primitives

from statewise._src.common.compat import jaxprs, primitives

X = jnp.arange(1.0, 4.0)

# Names that the walks know and that the installed JAX may not have: each is, or was, the name in another version, or
# belongs to a primitive that no public function makes now.
OTHER_VERSIONS = {
    "checkpoint": "the name of `jax.checkpoint` before remat2",
    "remat": "as above, and in what JAX prints",
    "closed_call": "taken out in jax 0.12",
    "set_variable": "of flax 0.12.8; tests/step/test_closures.py makes it there",
    "core_call": "made inside of JAX only",
    "pjit": "the name of `jax.jit` up to jax 0.6",
    "psum2": "the name of psum in shard_map up to jax 0.6",
    "all_gather_invariant": "made inside of `shard_map` only",
    "copy_p": "the name of `jnp.copy` up to jax 0.4",
    "expand_dims": "taken out in jax 0.4: a broadcast",
    "layout_constraint": "made by `jax.experimental.layout` only",
    "reshard": "made over Explicit axes only",
    "compute_on": "made by `jax.experimental.compute_on` only",
    "custom_vmap_call": "made by `jax.custom_batching.custom_vmap`, and gone where its rule has run",
}


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


def per_device(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function that calls another one on each device of two."""
    return jax.shard_map(fn, mesh=mesh(), in_specs=jax.P(), out_specs=jax.P(), check_vma=False)


def checked(x: jax.Array) -> jax.Array:
    """Returns the sum over two devices, in a `shard_map` that checks what varies over them."""
    return jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh(), in_specs=jax.P("x"), out_specs=jax.P())(x)


@jax.custom_jvp
def with_jvp(x: jax.Array) -> jax.Array:
    return x + 1


@jax.custom_vjp
def with_vjp(x: jax.Array) -> jax.Array:
    return x + 1


def names(jaxpr: Any) -> Iterator[str]:
    """Yields the name of every primitive of a program, and of the bodies that it calls."""
    for eqn in jaxprs.inner_jaxpr(jaxpr).eqns:
        yield jaxprs.name_of(eqn)
        for body in jaxprs.bodies_of(eqn):
            yield from names(body)


KEY = jax.random.key(0)
with_jvp.defjvp(lambda args, tangents: (args[0], tangents[0]))
with_vjp.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent,))


def add_one(x: jax.Array) -> jax.Array:
    return x + 1


# For each set, functions that are to be one primitive of it, on an array of three.
ROLES: dict[str, list[Callable[[Any], Any]]] = {
    "SAME_VALUE": [
        jnp.copy,
        jax.device_put,
        jax.lax.stop_gradient,
        jax.lax.optimization_barrier,
        lambda x: jax.ad_checkpoint.checkpoint_name(x, "saved"),
        lambda _: jax.random.clone(KEY),
        lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh(), jax.P())),
    ],
    "RESHAPES": [
        lambda x: x[None],
        lambda x: x.reshape(3, 1),
        lambda x: jnp.squeeze(jax.lax.reshape(x, (1, 3)), 0),
        lambda x: jnp.broadcast_to(x, (2, 3)),
    ],
    "PLAIN_CALLS": [jax.jit(add_one), jax.checkpoint(add_one)],
    "CUSTOM_DERIVATIVES": [with_jvp, with_vjp],
    "CALLS": [
        jax.jit(add_one),
        with_jvp,
        with_vjp,
        jax.lax.composite(add_one, "tests.add_one"),
        per_device(add_one),
    ],
    "COLLECTIVE_JOINS": [
        per_device(lambda x: jax.lax.psum(x, "x")),
        per_device(lambda x: jax.lax.pmax(x, "x")),
        per_device(lambda x: jax.lax.pmin(x, "x")),
        per_device(lambda x: jax.lax.all_gather(x, "x")),
        lambda _: checked(jnp.zeros(4)),
    ],
    "ELEMENTWISE": [
        *(jnp.abs, jnp.ceil, jnp.cos, jnp.exp, jnp.exp2, jnp.expm1, jnp.floor, jnp.log, jnp.log1p, jnp.negative),
        *(jnp.sign, jnp.sin, jnp.sqrt, jnp.square, jnp.tan, jnp.tanh, jnp.cbrt, jax.lax.rsqrt, jax.lax.erf),
        *(jax.lax.logistic, lambda x: x + x, lambda x: x * x, lambda x: x / x, lambda x: x**3, lambda x: x**x),
        *(lambda x: jax.lax.max(x, x), lambda x: jax.lax.clamp(x, x, x), lambda x: x < x, lambda x: x.astype(int)),
        lambda x: jax.lax.select(x > 0, x, x),
    ],
    "PRODUCTS": [lambda x: x * x, lambda x: jnp.dot(x, x)],
    "SUMS": [lambda x: x + x, lambda x: x - x],
    "ZERO_OF_ZERO": [jnp.negative, jnp.copy, lambda x: x[None], lambda x: x.astype(int), lambda x: x.reshape(3, 1).T],
    "ZERO_DERIVATIVE": [jnp.ceil, jnp.floor, jnp.round, jnp.sign, jax.lax.stop_gradient],
    "DRAWS": [
        lambda _: jax.random.bits(KEY),
        lambda _: jax.random.fold_in(KEY, 1),
        lambda _: jax.random.key(0),
        lambda x: jax.lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), (2,))[1],
    ],
}
ONES: dict[str, Callable[[Any], Any]] = {
    "SCAN": lambda x: jax.lax.scan(lambda carry, row: (carry, row), x[0], x),
    "WHILE": lambda x: jax.lax.while_loop(lambda carry: carry[0] < 1, lambda carry: carry, x),
    "COND": lambda x: jax.lax.cond(x[0] > 1, add_one, jnp.copy, x),
    "SELECT": lambda x: jax.lax.select(x > 0, x, x),
    "SHARD_MAP": per_device(add_one),
    "CAST": lambda x: x.astype(int),
    "TRANSPOSE": lambda x: x.reshape(3, 1).T,
    "RESHAPE": lambda x: x.reshape(3, 1),
    "SIGN": jnp.sign,
    "RANDOM_UNWRAP": lambda _: jax.random.key_data(KEY),
    "RANDOM_WRAP": lambda x: jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32)),
    "CUSTOM_JVP": with_jvp,
}
PROGRAMS = [(role, fn) for role, functions in ROLES.items() for fn in functions] + list(ONES.items())


def known(role: str) -> frozenset[str]:
    names = getattr(primitives, role)
    return frozenset({names}) if isinstance(names, str) else names


@pytest.mark.parametrize(("role", "fn"), PROGRAMS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_public_function_traces_to_a_name_of_its_role(role: str, fn: Callable[[Any], Any]) -> None:
    traced = list(names(jax.make_jaxpr(fn)(X)))
    assert known(role) & set(traced), f"{role} has none of {traced}: JAX has renamed it"


def test_every_role_is_tried_and_every_name_is_that_of_a_primitive() -> None:
    roles = {name for name in primitives.__all__ if not callable(getattr(primitives, name))}
    assert roles == {*ROLES, *ONES, "SET_VARIABLE"}
    traced = {name for _, fn in PROGRAMS for name in names(jax.make_jaxpr(fn)(X))}
    installed = {value.name for name, value in vars(jax_primitives).items() if name.endswith("_p")} | traced
    names_known = frozenset().union(*map(known, roles))
    assert names_known - installed <= OTHER_VERSIONS.keys() <= names_known


def test_what_takes_a_key_is_known_by_its_name() -> None:
    traced = names(jax.make_jaxpr(lambda x: jax.random.split(jax.random.fold_in(KEY, 1)))(X))
    assert all(map(primitives.uses_keys, traced))
    assert not primitives.uses_keys("add")
