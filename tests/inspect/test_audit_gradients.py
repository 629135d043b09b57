"""Which gradients are zero whatever the numbers: found from the jaxpr, compared with `jax.grad` on random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from statewise._src.step.dependence import reached, zero_gradients

A, B, C = (jax.random.normal(jax.random.key(seed), (3,)) for seed in range(3))


def grads_are_zero(loss_of: Callable[..., jax.Array], *arrays: jax.Array) -> list[bool]:
    """What `jax.grad` gives, over several random draws of the same shapes."""
    zero = [True] * len(arrays)
    gradient = jax.jit(jax.grad(loss_of, argnums=range(len(arrays))))
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), len(arrays))
        drawn = [jax.random.normal(key, array.shape) for key, array in zip(keys, arrays, strict=True)]
        grads = gradient(*drawn)
        zero = [was and not np.any(np.asarray(grad)) for was, grad in zip(zero, grads, strict=True)]
    return zero


def scanned(a: jax.Array, b: jax.Array) -> jax.Array:
    """b is read in every turn, and carried, and lets nothing through."""

    def body(carry: Any, x: jax.Array) -> Any:
        total, seen = carry
        return (total + x * a.sum(), jax.lax.stop_gradient(seen + b)), x

    return jax.lax.scan(body, (jnp.zeros(()), b), jnp.arange(4.0))[0][0]


def late(a: jax.Array, b: jax.Array) -> jax.Array:
    """b reaches the loss only in the second turn, through what the first has carried."""

    def body(carry: Any, _: None) -> Any:
        total, before = carry
        return (total + before, b.sum()), None

    return jax.lax.scan(body, (a.sum(), jnp.zeros(())), None, length=3)[0][0]


def delayed(a: jax.Array, b: jax.Array, turns: int) -> jax.Array:
    """b goes through two places of the carry before it reaches what each turn hands out."""

    def body(carry: Any, _: None) -> Any:
        return (carry[1], carry[2], b.sum()), carry[0]

    return jax.lax.scan(body, (a.sum(), a.sum(), a.sum()), None, length=turns)[1].sum()


def later(a: jax.Array, b: jax.Array) -> jax.Array:
    return delayed(a, b, 4)


def too_late(a: jax.Array, b: jax.Array) -> jax.Array:
    return delayed(a, b, 3)


def looped(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, x: x * a.sum() + jax.lax.stop_gradient(b.sum()), jnp.ones(()))


def branched(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.cond(b.sum() > 0, lambda: a.sum(), lambda: (a * 2).sum())


def one_branch(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.cond(a.sum() > 0, lambda: b.sum(), lambda: a.sum())


@jax.custom_vjp
def blocked(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * y


blocked.defvjp(lambda x, y: (x * y, (x, y)), lambda kept, grad: (grad * kept[1], jnp.zeros_like(kept[1])))


@jax.custom_jvp
def straight(x: jax.Array) -> jax.Array:
    return jnp.round(x)


straight.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))

CASES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "both": lambda a, b: (a * b).sum(),
    "unread": lambda a, b: a.sum(),
    "neither": lambda a, b: jnp.zeros(()),
    "stopped": lambda a, b: (a * jax.lax.stop_gradient(b)).sum(),
    "compared": lambda a, b: jnp.where(b > 0, a, 2 * a).sum(),
    "selected": lambda a, b: jnp.where(a > 0, b, 2 * b).sum(),
    "rounded": lambda a, b: (a + jnp.round(b)).sum(),
    "signed": lambda a, b: (a * jnp.sign(b)).sum(),
    "as an index": lambda a, b: a[jnp.argmax(b)],
    "through integers": lambda a, b: (a + b.astype(jnp.int32)).sum(),
    "times zeros": lambda a, b: (a + jnp.zeros(3) * b).sum(),
    "times zeros like": lambda a, b: (a + -jnp.zeros_like(a, shape=(1, 3)).reshape(3) * b).sum(),
    "dot zeros": lambda a, b: a.sum() + b @ jnp.zeros(3),
    "times nothing": lambda a, b: a.sum() + 0.0 * b.sum(),
    "indexed": lambda a, b: a[0] * b[2],
    "jit": jax.jit(lambda a, b: (a * jax.lax.stop_gradient(b)).sum()),
    "remat": jax.checkpoint(lambda a, b: (jnp.sin(a) * jax.lax.stop_gradient(b)).sum()),
    "remat of both": jax.checkpoint(lambda a, b: (jnp.sin(a) * jnp.sin(b)).sum()),
    "vmap": lambda a, b: jax.vmap(lambda x, y: x * jax.lax.stop_gradient(y))(a, b).sum(),
    "scan": scanned,
    "scan, late": late,
    "scan, later": later,
    "scan, too late": too_late,
    "scan, no turns": lambda a, b: jax.lax.scan(lambda c, _: (c * b.sum(), c), a.sum(), None, length=0)[0],
    "loop": looped,
    "cond": branched,
    "cond, one branch": one_branch,
    "custom_vjp": lambda a, b: blocked(a, b).sum(),
    "custom_jvp": lambda a, b: (a * straight(b)).sum(),
    "solved": lambda a, b: jnp.linalg.solve(jnp.outer(b, b) + jnp.eye(3), a).sum(),
    "sorted": lambda a, b: (jnp.sort(a) * jnp.argsort(b)).sum(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_zero_where_that_of_jax_is(name: str) -> None:
    assert zero_gradients(lambda both: CASES[name](*both), [A, B]) == grads_are_zero(CASES[name], A, B)


def test_a_gradient_that_only_happens_to_be_zero_is_none_of_them() -> None:
    dead = lambda both: jax.nn.relu(both[0] - 1e9).sum() + both[1].sum()  # noqa: E731 - a case, like those above
    assert zero_gradients(dead, [A, B]) == [False, False]
    assert not np.any(jax.grad(lambda a: dead([a, B]))(A))


def test_shapes_are_enough_and_nothing_runs() -> None:
    def loss_of(both: Any) -> jax.Array:
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return (both[0] @ both[1]).sum()

    shapes = [jax.ShapeDtypeStruct((100_000, 100_000), jnp.bfloat16)] * 2
    assert zero_gradients(loss_of, shapes) == [False, False]


def test_other_arguments_are_not_differentiated() -> None:
    assert zero_gradients(lambda wrt, scale, keys: wrt[0] * scale, [jnp.ones(()), A], jnp.ones(()), [B]) == [
        False,
        True,
    ]


# --- programs put together at random --------------------------------------------------------------------------------


def apply(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step of a random program; the derivatives at random points are zero where they always are."""
    steps: dict[str, Callable[[], jax.Array]] = {
        "add": lambda: x + y,
        "mul": lambda: x * y,
        "stop": lambda: x + jax.lax.stop_gradient(y),
        "sign": lambda: x + jnp.sign(y),
        "scan": lambda: jax.lax.scan(lambda c, v: (jnp.sin(c) + v, c), x, jnp.stack([y, x]))[0],
        "stacked": lambda: jax.lax.scan(lambda c, v: (c, v * 2), x, jnp.stack([y, y]))[1][1],
        "jit": lambda: jax.jit(lambda x, y: (x * 3, y)[0])(x, y),
        "swap": lambda: jax.lax.scan(lambda c, _: ((c[1], c[0]), None), (x, y), None, length=3)[0][0],
    }
    return steps[name]()


NAMES = ["add", "mul", "stop", "sign", "scan", "stacked", "jit", "swap"]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_random_programs_have_the_zeros_that_jax_finds(program: list[tuple[str, int, int]]) -> None:
    def loss_of(*arrays: jax.Array) -> jax.Array:
        values = list(arrays)
        for name, left, right in program:
            values.append(apply(name, values[left % len(values)], values[right % len(values)]))
        return values[-1].sum()

    found, true = zero_gradients(lambda wrt: loss_of(*wrt), [A, B, C]), grads_are_zero(loss_of, A, B, C)
    # Never is a gradient called zero that is not.  How often a loop turns is not counted, so that what is swapped in it
    # may be either.
    assert all(is_zero or not called for called, is_zero in zip(found, true, strict=True))
    assert found == true or "swap" in [name for name, _, _ in program]


# --- what depends on what --------------------------------------------------------------------------------------------


def test_what_an_output_depends_on_goes_through_loops_and_branches() -> None:
    def program(a: jax.Array, b: jax.Array) -> Any:
        counted = jax.lax.while_loop(lambda c: c[0] < a.sum(), lambda c: (c[0] + 1, c[1] * 2), (jnp.zeros(()), b.sum()))
        chosen = jax.lax.cond(a.sum() > 0, lambda b: b, lambda b: -b, b)
        return counted, chosen, a * 0.0, jax.jit(lambda a, b: (b, a))(a, b)

    closed = jax.make_jaxpr(program)(A, B)
    # How often the loop turns depends on a, and so does all that it carries.
    assert reached(closed, [True, False]) == (True, True, True, False, False, True)
    assert reached(closed, [False, True]) == (False, True, True, False, True, False)
    assert reached(closed, [False, False]) == (False,) * 6


# --- the layers of Flax ----------------------------------------------------------------------------------------------


class Net(nnx.Module):
    """Convolution, normalisation, attention, recurrence; with parameters that train and some that cannot."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 4, (2,), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs))
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.dropout = nnx.Linear(4, 4, rngs=rngs)
        self.gate = nnx.Param(jnp.ones(4))

    def __call__(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        h = self.norm(self.conv(x)) + self.embed(tokens)
        h = self.attend(h) * (self.gate[...] > 0)[None, None]
        return self.rnn(h + jax.lax.stop_gradient(self.dropout(h)))


def test_a_model_of_layers_has_the_zeros_of_nnx_grad() -> None:
    x, tokens = jax.random.normal(jax.random.key(1), (2, 3, 2)), jnp.array([[0, 1, 2], [3, 4, 0]])

    def loss_of(model: Net, x: jax.Array, tokens: jax.Array) -> jax.Array:
        return (model(x, tokens) ** 2).mean()

    model = Net(nnx.Rngs(0))
    state = sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    audit = sw.audit(sw.train_step(loss_of), state, x, tokens)
    grads = dict(nnx.to_flat_state(nnx.jit(nnx.grad(loss_of))(model, x, tokens)))
    zero = {path for path, grad in grads.items() if not np.any(np.asarray(grad[...]))}
    assert {row.path for row in audit.untrained} == zero
    assert {row.path[0] for row in audit.untrained} == {"dropout", "gate"}
    assert len(audit["params"]) == len(grads)
