"""What `compat.jaxprs` says of an equation is what the program was written to do, on any version of JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from statewise._src.common.compat import jaxprs

X = jnp.arange(3.0)


def last(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns the last equation of a function's program."""
    return jax.make_jaxpr(fn)(*args).eqns[-1]


@pytest.mark.parametrize("length", [0, 5])
def test_a_scan_has_constants_then_what_it_carries(length: int) -> None:
    def run(first: Any, second: Any, carry: Any, rows: Any) -> Any:
        def body(carry: Any, row: Any) -> Any:
            return (carry[0] + first.sum(), carry[1] * second), (row + 1, row * 2, carry[0])

        return jax.lax.scan(body, carry, rows)

    eqn = last(run, X, 2.0, (0.0, 1.0), jnp.zeros((length, 2)))
    scan = jaxprs.scan_of(eqn)
    assert (scan.consts, scan.carry, scan.length) == (2, 2, length)
    shapes = [type_.shape for type_ in jaxprs.input_types(scan.body)]
    assert shapes[-3:] == [(), (), (2,)]
    assert [type_.shape for type_ in jaxprs.output_types(scan.body)] == [(), (), (2,), (2,), ()]


def test_a_while_has_the_constants_of_its_condition_first() -> None:
    def run(limit: Any, other: Any, step: Any, carry: Any) -> Any:
        return jax.lax.while_loop(lambda value: value < limit + other, lambda value: value + step.sum(), carry)

    eqn = last(run, 3.0, 1.0, X, 0.0)
    loop = jaxprs.while_of(eqn)
    assert (loop.cond_consts, loop.body_consts) == (2, 1)
    assert [type_.dtype for type_ in jaxprs.output_types(loop.cond)] == [bool]
    assert [type_.shape for type_ in jaxprs.input_types(loop.body)] == [(3,), ()]


def test_the_branches_of_a_cond_are_in_the_order_of_its_index() -> None:
    eqn = last(lambda index, x: jax.lax.switch(index, [jnp.sin, jnp.cos, jnp.tan], x), 1, X)
    called = [[jaxprs.name_of(inner) for inner in jaxprs.inner_jaxpr(body).eqns] for body in jaxprs.branches_of(eqn)]
    assert called == [["sin"], ["cos"], ["tan"]]


@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint, lambda fn: jax.lax.composite(fn, "tests.twice")])
def test_the_body_of_a_call_is_what_was_called(call: Any) -> None:
    eqn = last(call(lambda x: jnp.sin(x)), X)
    body = jaxprs.body_of(eqn)
    inner = jaxprs.inner_jaxpr(body)
    (result,) = jaxprs.eval_jaxpr(inner, jaxprs.consts_of(body), [X])
    np.testing.assert_allclose(result, np.sin(np.arange(3.0)), rtol=1e-6)
    assert [jaxprs.inner_jaxpr(each) for each in jaxprs.bodies_of(eqn)] == [inner]


def test_what_calls_nothing_has_no_body() -> None:
    eqn = last(jnp.sin, X)
    assert jaxprs.body_of(eqn) is None
    assert list(jaxprs.bodies_of(eqn)) == []
    loop = last(lambda x: jax.lax.while_loop(lambda x: x[0] < 1, lambda x: x + 1, x), X)
    assert jaxprs.body_of(loop) is None  # called more than once, or never
    assert len(list(jaxprs.bodies_of(loop))) == 2
    branches = last(lambda x: jax.lax.cond(x[0] > 1, jnp.sin, jnp.cos, x), X)
    assert len(list(jaxprs.bodies_of(branches))) == 2  # in a tuple


def test_the_specs_of_a_shard_map_are_those_given() -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (jax.P("x"), jax.P()), "out_specs": (jax.P(), jax.P("x"))}
    run = jax.shard_map(lambda a, b: (b, a), mesh=mesh, check_vma=False, **specs)
    ins, outs = jaxprs.specs_of(last(run, jnp.zeros(4), jnp.zeros(3)))
    assert (*ins, *outs) == (*specs["in_specs"], *specs["out_specs"])


def collective(fn: Callable[[Any], Any]) -> Any:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    run = jax.shard_map(fn, mesh=mesh, in_specs=jax.P(("x", "y")), out_specs=jax.P(("x", "y")), check_vma=False)
    return jaxprs.inner_jaxpr(jaxprs.body_of(last(run, jnp.zeros(4)))).eqns[0]


def test_a_collective_names_its_axes() -> None:
    assert jaxprs.axes_of(collective(lambda x: jax.lax.psum(x, ("x", "y")))) == {"x", "y"}
    assert jaxprs.axes_of(collective(lambda x: jax.lax.pmax(x, "y"))) == {"y"}
    assert jaxprs.axes_of(collective(lambda x: x + jax.lax.axis_index("x"))) == {"x"}
    assert jaxprs.axes_of(last(jnp.sin, X)) == set()


def test_a_collective_in_groups_says_so() -> None:
    whole = collective(lambda x: jax.lax.all_gather(x, "x"))
    grouped = collective(lambda x: jax.lax.all_gather(x, "x", axis_index_groups=[[0], [1]]))
    assert not jaxprs.has_axis_groups(whole)
    assert jaxprs.has_axis_groups(grouped)


def test_an_operation_is_what_an_equation_does_apart_from_its_operands() -> None:
    first, second, other = (last(fn, X) for fn in (lambda x: x.astype(int), lambda y: (y + 1).astype(int), jnp.sin))
    assert jaxprs.operation_of(first) == jaxprs.operation_of(second) != jaxprs.operation_of(other)
    assert hash(jaxprs.operation_of(first)) == hash(jaxprs.operation_of(second))
    (result,) = jaxprs.operation_of(first).apply([jnp.array([1.5, 2.5])])
    np.testing.assert_array_equal(result, [1, 2])
    # A primitive with several results gives them as a list, however many there are.
    scan = last(lambda x: jax.lax.scan(lambda carry, row: (carry + row, row * 2), 0.0, x), X)
    total, rows = jaxprs.operation_of(scan).apply([1.0, jnp.array([1.0, 2.0, 3.0])])
    np.testing.assert_array_equal(total, 7)
    np.testing.assert_array_equal(rows, [2, 4, 6])


def test_a_transpose_has_its_permutation() -> None:
    eqn = last(lambda x: jnp.transpose(x, (2, 0, 1)), jnp.zeros((1, 2, 3)))
    assert jaxprs.permutation_of(eqn) == (2, 0, 1)


@pytest.mark.parametrize(
    ("fn", "keeps"),
    [
        (lambda x: x.reshape(3, 2), True),
        (lambda x: x[None], True),
        (lambda x: jax.lax.broadcast_in_dim(x, (2, 1, 3), (0, 2)), True),
        (lambda x: jax.lax.reshape(x, (6,), dimensions=(1, 0)), False),  # transposes first
        (lambda x: jax.lax.broadcast_in_dim(x, (4, 2, 3), (1, 2)), False),  # adds elements
    ],
)
def test_a_reshape_keeps_the_order_or_does_not(fn: Callable[[Any], Any], keeps: bool) -> None:
    assert jaxprs.keeps_order(last(fn, jnp.zeros((2, 3)))) is keeps


def test_dead_code_goes_with_the_inputs_that_only_it_reads() -> None:
    closed = jax.make_jaxpr(lambda x, y, z: (x + 1, jnp.sin(y), z))(1.0, X, 2.0)
    smaller, reads = jaxprs.dce(jaxprs.inner_jaxpr(closed), [True, False, True])
    assert reads == [True, False, True]
    assert [jaxprs.name_of(eqn) for eqn in smaller.eqns] == ["add"]
    assert jaxprs.eval_jaxpr(smaller, (), [1.0, 5.0]) == [2.0, 5.0]


def test_constants_are_those_of_the_closed_jaxpr() -> None:
    table = jnp.arange(4.0)
    closed = jax.make_jaxpr(lambda index: table[index])(1)
    (const,) = jaxprs.consts_of(closed)
    np.testing.assert_array_equal(const, np.arange(4.0))
    assert [type_.shape for type_ in jaxprs.input_types(closed)] == [()]


def test_a_reference_is_told_from_an_array() -> None:
    def run(x: Any) -> Any:
        ref = jax.new_ref(x)
        ref[...] = x + 1
        return ref[...]

    eqns = jax.make_jaxpr(run)(X).eqns
    variables = [var for eqn in eqns for var in (*eqn.invars, *eqn.outvars) if not isinstance(var, jaxprs.Literal)]
    assert any(map(jaxprs.is_reference, variables))
    assert not all(map(jaxprs.is_reference, variables))
