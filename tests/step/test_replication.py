"""Which outputs differ from device to device: what the analysis says, beside what the devices really hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meshes import mesh_of
from statewise._src.step.replication import varying

MESH = mesh_of(data=4, model=2)
AXES = frozenset({"data"})


def scanned(x: Any, w: Any) -> Any:
    """A carry that starts alike and comes to differ, one that stays alike, and both stacked."""

    def body(carry: Any, x: Any) -> Any:
        differs, alike, late = carry
        return (differs + x, alike * 2.0, late + differs), (x, alike)

    (differs, alike, late), (rows, likes) = lax.scan(body, (jnp.zeros(()), w.sum(), jnp.zeros(())), x)
    return {"differs": differs, "late": late, "rows": rows, "=alike": alike, "=likes": likes}


def looped(x: Any, w: Any) -> Any:
    return {
        "turns": lax.while_loop(lambda n: n < x.sum(), lambda n: n + 1.0, 0.0),
        "carried": lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + x.sum()), (0, 0.0))[1],
        "=alike": lax.fori_loop(0, 3, lambda _, n: n + w.sum(), 0.0),
    }


def branched(x: Any, w: Any) -> Any:
    return {
        "which": lax.cond(x.sum() > 3, lambda: 1.0, lambda: 2.0),
        "one": lax.cond(w.sum() > 3, lambda: x.sum(), lambda: 2.0),
        "=neither": lax.cond(w.sum() > 3, lambda: w.sum(), lambda: 2.0),
    }


def collected(x: Any, w: Any) -> Any:
    return {
        "=sum": lax.psum(x, "data"),
        "=mean": lax.pmean((x, w), "data"),
        "=max": lax.pmax(x, "data"),
        "=all": lax.all_gather(x, "data"),
        "index": lax.axis_index("data"),
        "next": lax.ppermute(x, "data", [(at, (at + 1) % 4) for at in range(4)]),
        "scattered": lax.psum_scatter(jnp.ones(4), "data", tiled=True),
        "groups": lax.psum(x, "data", axis_index_groups=[[0, 1], [2, 3]]),
        "=joined": lax.psum(x, ("data",)) + w.sum(),
        "again": lax.psum(x, "data") + x,
    }


def called(x: Any, w: Any) -> Any:
    @jax.custom_jvp
    def square(x: Any) -> Any:
        return x**2

    square.defjvp(lambda primals, tangents: (square(*primals), 2 * primals[0] * tangents[0]))
    return {
        "jit": jax.jit(lambda x, w: (x * 2, w * 2))(x, w)[0],
        "=jit": jax.jit(lambda x, w: (x * 2, w * 2))(x, w)[1],
        "remat": jax.checkpoint(jnp.sin)(x),
        "=remat": jax.checkpoint(jnp.sin)(w),
        "custom": square(x),
        "=custom": square(w),
        "gelu": jax.nn.relu(x),
        "=constant": jnp.arange(3),
        "=literal": 1.0,
        "vmapped": jax.vmap(lambda one: lax.psum(one, "data") * one)(x),
        "=vmapped": jax.vmap(lambda one: lax.psum(one, "data"))(x),
    }


def referred(x: Any, w: Any) -> Any:
    """References, which are written in place: at once, in a loop, in a branch."""

    def at_once(value: Any) -> Any:
        ref = jax.new_ref(jnp.zeros(3))
        ref[...] = value
        ref[...] += 1.0
        return ref[...]

    def in_a_loop(value: Any) -> Any:
        ref = jax.new_ref(jnp.zeros(3))

        def body(_: Any, count: Any) -> Any:
            ref[...] += value
            return count + 1

        return lax.fori_loop(0, 3, body, 0), jax.freeze(ref)

    def in_a_branch(which: Any) -> Any:
        ref = jax.new_ref(jnp.zeros(()))

        def write() -> None:
            ref[...] = 1.0

        lax.cond(which > 3, write, lambda: None)
        return ref[...]

    return {
        "given": jax.freeze(jax.new_ref(x)),
        "written": at_once(x),
        "=written": at_once(w),
        "=averaged": at_once(lax.pmean(x, "data")),
        "looped": in_a_loop(x)[1],
        "=averaged after": lax.pmean(in_a_loop(x)[1], "data"),
        "branched": in_a_branch(x.sum()),
    }


@pytest.mark.parametrize("fn", [scanned, looped, branched, collected, called, referred])
def test_what_is_said_to_differ_does_and_what_is_said_to_be_alike_is(fn: Callable[..., Any]) -> None:
    """Outputs whose names begin with `=` are alike on all devices: told from the values, and by the analysis."""
    box: dict[str, Any] = {}

    def on_one(x: Any, w: Any) -> Any:
        box["jaxpr"] = jax.make_jaxpr(fn)(x, w)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fn(x, w))

    x = jax.random.normal(jax.random.key(0), (12,)) + jnp.repeat(jnp.arange(4.0), 3)
    specs = {"in_specs": (jax.P("data"), jax.P()), "out_specs": jax.P("data")}
    each = jax.jit(jax.shard_map(on_one, mesh=mesh_of(data=4), check_vma=False, **specs))(x, jnp.ones(3))
    said = varying(box["jaxpr"], [AXES, frozenset()], AXES)
    names = [keys[0].key for keys, _ in jax.tree_util.tree_flatten_with_path(each)[0]]
    for name, values, over in zip(names, jax.tree.leaves(each), said, strict=True):
        if name.startswith("="):
            assert all(np.array_equal(row, values[0]) for row in np.asarray(values)), name
        assert bool(over) == (not name.startswith("=")), name


def test_each_axis_is_told_apart() -> None:
    box: dict[str, Any] = {}

    def on_one(x: Any) -> Any:
        box["jaxpr"] = jax.make_jaxpr(lambda x: (lax.psum(x, "data"), lax.psum(x, ("data", "model")), x))(x)
        return x

    whole = jax.P(("data", "model"))
    jax.eval_shape(jax.shard_map(on_one, mesh=MESH, in_specs=whole, out_specs=whole, check_vma=False), jnp.ones(8))
    both = frozenset({"data", "model"})
    assert varying(box["jaxpr"], [both], both) == [frozenset({"model"}), frozenset(), both]


def test_a_body_that_nobody_knows_may_differ() -> None:
    closed = jax.make_jaxpr(lambda x: lax.map(lambda one: one, x))(jnp.ones(3))
    assert varying(closed, [frozenset()], AXES) == [frozenset()]
    inner = jax.shard_map(lambda x: x, mesh=MESH, in_specs=jax.P("model"), out_specs=jax.P("model"), check_vma=False)
    assert varying(jax.make_jaxpr(inner)(jnp.ones(4)), [frozenset()], AXES) == [AXES]
