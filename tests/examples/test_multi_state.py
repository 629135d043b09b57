"""The worked example: what its text says of leaves, shapes and counts, and that both ways of counting agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from statewise.examples import multi_state
from statewise.examples.multi_state import BatchStat, MultiState, multi_state_count, multi_state_filter

Count = Callable[[float, jax.Array, float, float], jax.Array]
WAYS = [multi_state_filter, multi_state_count]
PLAIN = nnx.All(nnx.Variable, nnx.Not(nnx.Param), nnx.Not(BatchStat), nnx.Not(nnx.Cache))


def leaves(model: MultiState, *filters: object) -> int:
    return len(jax.tree.leaves(nnx.state(model, *filters)))


@pytest.fixture
def model() -> MultiState:
    return MultiState(3, 5, nnx.Rngs(0))


def test_the_whole_state_has_six_leaves(model: MultiState) -> None:
    assert leaves(model) == 6


@pytest.mark.parametrize(
    ("of", "count"), [(nnx.Param, 2), (BatchStat, 2), (PLAIN, 1), (nnx.Cache, 1), (nnx.Variable, 6), (nnx.BatchStat, 0)]
)
def test_leaves_by_type(model: MultiState, of: object, count: int) -> None:
    assert leaves(model, of) == count
    assert sw.count(model, of) == count


def test_exactly_is_the_plain_filter_without_its_list(model: MultiState) -> None:
    assert nnx.to_flat_state(nnx.state(model, sw.Exactly(nnx.Variable))).paths == (("step_count",),)
    assert nnx.to_flat_state(nnx.state(model, PLAIN)).paths == (("step_count",),)


def test_batch_stat_is_a_type_of_its_own() -> None:
    assert BatchStat.__mro__[1] is nnx.Variable
    assert multi_state.BatchStat is BatchStat  # at module level, so that it can be pickled and named in a manifest


def test_every_leaf_is_as_declared(model: MultiState) -> None:
    found = {
        path[0]: (leaf.var_type, leaf.get_value().shape, leaf.get_value().dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    f32 = jnp.dtype("float32")
    assert found == {
        "kernel": (nnx.Param, (3, 5), f32),
        "bias": (nnx.Param, (5,), f32),
        "running_mean": (BatchStat, (5,), f32),
        "running_var": (BatchStat, (5,), f32),
        "step_count": (nnx.Variable, (), f32),
        "cache": (nnx.Cache, (4, 5), f32),
    }


def test_first_values(model: MultiState) -> None:
    for zeros in (model.bias, model.running_mean, model.step_count, model.cache):
        np.testing.assert_array_equal(zeros.get_value(), 0.0)
    np.testing.assert_array_equal(model.running_var.get_value(), 1.0)


@pytest.mark.parametrize("in_features", [1, 4, 64, 1000])
def test_the_kernel_has_scale_one_over_root_in_features(in_features: int) -> None:
    hidden = 40_000 // in_features
    kernel = np.asarray(MultiState(in_features, hidden, nnx.Rngs(0)).kernel.get_value())
    expected = 1.0 / math.sqrt(in_features)
    # 40,000 draws: the standard error of the deviation is 0.35 %, that of the mean 0.5 % of the deviation.
    assert kernel.std() == pytest.approx(expected, rel=0.02)
    assert abs(kernel.mean()) < 0.03 * expected


def test_the_kernel_follows_the_seed() -> None:
    first, again, other = (MultiState(3, 5, nnx.Rngs(seed)).kernel.get_value() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (7, 2, 3), (0, 3)])
def test_forward_is_x_at_kernel_plus_bias(shape: tuple[int, ...]) -> None:
    model = MultiState(3, 5, nnx.Rngs(1))
    model.bias[...] = jnp.arange(5.0)
    x = jax.random.normal(jax.random.key(2), shape)
    with jax.numpy_rank_promotion("allow"):  # a bias of rank 1 under a batch of any rank
        y = model(x)
        expected = x @ model.kernel.get_value() + model.bias.get_value()
    assert y.shape == (*shape[:-1], 5)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(
    seed=st.integers(-(2**31), 2**53).map(float),
    size=st.integers(0, 17),
    hidden=st.integers(0, 9).map(float),
    eps=st.floats(allow_nan=False, allow_infinity=False, width=32),
)
def test_the_result_is_the_same_whatever_the_arguments(
    way: Count, seed: float, size: int, hidden: float, eps: float
) -> None:
    result = way(seed, jnp.zeros((size,)), hidden, eps)
    assert result.shape == (3,)
    assert jnp.issubdtype(result.dtype, jnp.floating)
    np.testing.assert_array_equal(result, [2.0, 2.0, 1.0])


@pytest.mark.parametrize("way", WAYS)
def test_numpy_and_jax_scalars_are_floats_too(way: Count) -> None:
    result = way(np.float64(3.0), np.ones(4), jnp.float32(6.0), np.array(0.5))
    np.testing.assert_array_equal(result, [2.0, 2.0, 1.0])


@pytest.mark.parametrize("way", WAYS)
def test_a_fraction_is_cut_off(way: Count) -> None:
    np.testing.assert_array_equal(way(0.9, jnp.ones(3), 5.9, 0.1), [2.0, 2.0, 1.0])


@pytest.mark.parametrize("way", WAYS)
def test_under_the_callers_jit(way: Count) -> None:
    traced = jax.jit(lambda x, eps: way(7.0, x, 4.0, eps))
    for size, eps in [(3, 0.5), (3, -1e30), (8, 0.0)]:
        np.testing.assert_array_equal(traced(jnp.ones(size), eps), [2.0, 2.0, 1.0])


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_with_respect_to_eps_is_zero(way: Count) -> None:
    gradient = jax.grad(lambda eps: way(0.0, jnp.ones(3), 4.0, eps).sum())(0.25)
    assert float(gradient) == 0.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("position", [0, 2], ids=["seed", "hidden"])
def test_what_decides_shapes_cannot_be_traced(way: Count, position: int) -> None:
    def program(value: jax.Array) -> jax.Array:
        seed, hidden = (value, 4.0) if position == 0 else (0.0, value)
        return way(seed, jnp.ones(3), hidden, 0.1)

    with pytest.raises(jax.errors.ConcretizationTypeError, match="concrete"):
        jax.jit(program)(3.0)
