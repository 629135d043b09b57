"""Packed states: the same numbers and the same views as unpacked ones, in fewer arrays."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.plan import packing
from statewise._src.plan.packing import PackedBuffer, Packing, pack, unpack

pytestmark = pytest.mark.heavy


class Model(nnx.Module):
    """Small leaves of several kinds and dtypes, one large one, a tied one, and none at all."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(5)])
        self.gains = nnx.List([nnx.Param(jnp.ones(4)) for _ in range(5)])
        self.norms = nnx.List([nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs) for _ in range(4)])
        self.halves = nnx.List([nnx.Param(jnp.ones(3, jnp.bfloat16)) for _ in range(4)])
        self.wide = nnx.Param(jnp.ones((4, 8192)))
        self.empty = nnx.Param(jnp.ones((0, 3)))
        self.tied = self.layers[0].kernel
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.cache = nnx.List([nnx.Cache(jnp.zeros((2, 3))) for _ in range(4)])
        self.steps = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = x + nnx.tanh(layer(x)) * gain[...][None]
        for norm in self.norms:
            x = norm(x)
        scale = sum(half[...].astype(jnp.float32).sum() for half in self.halves)
        self.steps[...] += 1
        return self.drop(x @ self.tied[...] * scale) @ self.wide[...]


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "clipped, masked decay": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    ),
    "by label": optax.multi_transform(
        {"matrix": optax.adam(1e-2), "rest": optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "rest", params),
    ),
    "not elementwise": optax.lamb(1e-2),
}
X = jax.random.normal(jax.random.key(1), (6, 4))


@sw.train_step
def train(model: Any, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def assert_same(one: sw.State, other: sw.State, tolerance: float = 0.0) -> None:
    for kind in one:
        a, b = (jax.tree.leaves(state[kind]) for state in (one, other))
        assert jax.tree.structure(one[kind]) == jax.tree.structure(other[kind])
        for left, right in zip(a, b, strict=True):
            assert (left.shape, left.dtype) == (right.shape, right.dtype)
            if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
                left, right = jax.random.key_data(left), jax.random.key_data(right)
            left, right = (np.asarray(array.astype(jnp.float32)) for array in (left, right))
            size = max(1.0, float(np.abs(right).max(initial=0.0)))
            np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance * size)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def states(request: pytest.FixtureRequest) -> tuple[sw.State, sw.State]:
    model = Model(nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": OPTIMIZERS[request.param]})
    plain, packed = plan.take(model), plan.take(model, pack=True)
    for _ in range(3):
        plain, expected = train(plain, X)
        packed, loss = train(packed, X)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    return plain, packed


def test_training_gives_the_same_numbers(states: tuple[sw.State, sw.State]) -> None:
    plain, packed = states
    assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(plain)) / 2
    assert_same(plain, packed, 2e-5)


def test_everything_a_state_can_do_is_as_if_nothing_were_packed(states: tuple[sw.State, sw.State]) -> None:
    plain, packed = states
    assert packed.plan is not plain.plan
    assert [str(leaf) for leaf in packed.plan.leaves] == [str(leaf) for leaf in plain.plan.leaves]
    swapped = packed.replace(params=plain["params"], optimizer=plain["optimizer"], stats=plain["stats"])
    assert_same(plain, swapped.replace(cache=plain["cache"]))
    assert_same(plain.cast(params="bfloat16"), swapped.cast(params="bfloat16"))
    plan, one, other = plain.plan, Model(nnx.Rngs(2)), Model(nnx.Rngs(2))
    plan.put(plain, one)
    plan.put(swapped, other)
    assert_same(plan.take(one), plan.take(other))
    assert jax.tree.map(jnp.shape, packed).plan is packed.plan
    with jax.disable_jit():
        eager, _ = train(jax.tree.map(jnp.copy, packed), X)
    compiled, _ = train(jax.tree.map(jnp.copy, packed), X)
    assert_same(eager, compiled, 2e-5)


def test_a_nan_stays_where_it_is() -> None:
    """Arrays are taken out of a buffer behind a conditional on its first element."""
    model = nnx.List([nnx.Param(jnp.full(3, float(number))) for number in range(6)])
    model[0][...] = jnp.array([jnp.nan, 1.0, 2.0])
    state = sw.plan(model).take(model, pack=True)
    assert len(jax.tree.leaves(state)) == 1
    sums = sw.step(lambda model: [leaf.sum() for leaf in model])(state)
    assert np.isnan(sums[0])
    assert [float(value) for value in sums[1:]] == [3.0, 6.0, 9.0, 12.0, 15.0]


def test_only_the_kinds_named_are_packed() -> None:
    model = Model(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=("cache",))
    assert set(state.tables.packing) == {"cache"}
    assert "cache: 4 arrays in 1" in repr(state)
    with pytest.raises(sw.DeclarationError) as caught:
        sw.plan(model).take(model, pack="caches")
    assert caught.value.message == "There is no kind 'caches'."


def test_slots_of_a_packed_kind_restart_one_by_one() -> None:
    model = nnx.List([nnx.Cache(jnp.arange(6.0).reshape(3, 2) + number) for number in range(4)])
    kinds = sw.Kinds(cache=sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0))
    plan = kinds.plan(model)
    for where in ([1], jnp.array([True, False, True])):
        plain, packed = (plan.take(model, pack=pack).restart("cache", where=where) for pack in (False, True))
        assert_same(plain, packed)
    assert_same(plan.take(model).restart("cache"), plan.take(model, pack=True).restart("cache"))


def test_a_packed_state_under_scan_and_vmap() -> None:
    model = Model(nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})
    ends = []
    for packed in (False, True):
        state, _ = jax.lax.scan(lambda state, _: train(state, X), plan.take(model, pack=packed), None, length=3)
        ends.append(state)
    assert_same(*ends, 2e-5)
    packed = plan.take(model, pack=True)
    axes = packed.plan.axes(cache=0, rng=None)
    many = jax.tree.map(jnp.copy, packed)
    look = sw.step(lambda model, x: model.wide.sum() + model.cache[0].sum() + x)
    index = packed.tables.kind_index["cache"]
    many.parts[index] = type(many.parts[index])(tuple(jnp.stack([array] * 2) for array in many.parts[index].arrays))
    np.testing.assert_allclose(jax.vmap(look, in_axes=(axes, 0))(many, jnp.arange(2.0)), 32768 + np.arange(2.0))


def test_one_step_in_several_programs_of_the_caller() -> None:
    """What the optimizer's proof holds is no hidden argument: JAX forgot those in the second program."""
    model = nnx.List([nnx.Param(jnp.ones(4)) for _ in range(6)])
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})
    train = sw.train_step(lambda model, x: sum(((leaf[...] - x) ** 2).sum() for leaf in model))
    xs = jnp.arange(3.0)

    def scanned(state: sw.State) -> Any:
        return jax.lax.scan(train, state, xs)

    def looped(state: sw.State) -> Any:
        return jax.lax.fori_loop(0, 3, lambda at, carry: train(carry[0], xs[at]), (state, jnp.zeros(())))

    found = []
    for program in (scanned, looped, scanned):
        run, state = jax.jit(program), plan.take(model, pack=True)
        for _ in range(3):
            state, _ = run(state)
        found.append(np.stack(jax.tree.leaves(state["params"])))
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-6)


def test_only_what_a_step_touches_crosses() -> None:
    model = Model(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    count = sw.step(lambda model: model.steps.set_value(model.steps[...] + 1), writes="variables")
    after, _ = count(state)
    before = dict(zip(state.tables.slot_keys, jax.tree.leaves(state), strict=True))
    for key, array in zip(after.tables.slot_keys, jax.tree.leaves(after), strict=True):
        assert (before[key] is array) == ("variables" not in str(key))


def test_pack_and_unpack_are_inverse() -> None:
    arrays = tuple(
        jnp.arange(float(size)).reshape(shape) for size, shape in ((6, (2, 3)), (1, ()), (0, (0, 2)), (2, (2,)))
    )
    specs = [ArraySpec(array.shape, array.dtype) for array in arrays]
    layout = Packing((1,), (PackedBuffer((3, 0), (specs[3], specs[0])), PackedBuffer((2,), (specs[2],))))
    part = pack(layout, arrays)
    assert [array.shape for array in part] == [(), (8,), (0,)]
    for made in (unpack(layout, part), jax.jit(lambda part: unpack(layout, part))(part)):
        for before, after in zip(arrays, made, strict=True):
            assert before.shape == after.shape
            assert (before == after).all()


def test_keys_large_and_lonely_arrays_stay_as_they_are() -> None:
    small, key = ArraySpec((3,), jnp.dtype("float32")), ArraySpec((), jax.random.key(0).dtype)
    large = ArraySpec((packing.LARGEST,), jnp.dtype("float32"))
    chosen = packing.choose(
        {"params": [small, large, small, key, small, small, ArraySpec((3,), jnp.dtype("int32"))]}, ["params"], []
    )
    assert chosen["params"].loose == (1, 3, 6)
    assert [buffer.positions for buffer in chosen["params"].buffers] == [(0, 2, 4, 5)]
    assert packing.choose({"params": [small, large]}, ["params"], []) == {}


class Mixed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.full = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(4)])
        self.half = nnx.List([nnx.Linear(3, 3, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(4)])


def test_a_packed_state_of_mixed_dtypes_can_be_cast_and_trained() -> None:
    model = Mixed(nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.adam(1e-2)})

    @sw.train_step
    def train(model: Any) -> Any:
        return sum(jnp.sum(layer.kernel.astype(jnp.float32) ** 2) for layer in (*model.full, *model.half))

    losses = []
    for packed in (False, True):
        state = plan.take(model, pack=packed).cast(params="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
        for _ in range(3):
            state, loss = train(state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_packed_state_of_numpy_arrays_shows_its_arrays() -> None:
    model = Mixed(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    host = jax.device_get(state)
    for ours, theirs in zip(jax.tree.leaves(host["params"]), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_of_packed_states_says_what_it_is() -> None:
    model = Mixed(nnx.Rngs(0))
    state = sw.plan(model).take(model, pack=True)
    batch = jax.tree.map(lambda array: jnp.stack([array] * 2), state)
    with pytest.raises(sw.StructureError) as caught:
        batch["params"]
    assert caught.value.message == "A buffer of packed arrays is (2, 48), not (48,)."
    assert caught.value.hint == (
        "take one state out of a batch of them: one = jax.tree.map(lambda array: array[0], states)"
    )


def _slices_of(specs: list[ArraySpec]) -> tuple[int, int]:
    """Returns how many slices of a buffer a program has, and how many different ones; checks their values."""
    buffer = PackedBuffer(tuple(range(len(specs))), tuple(specs))
    values = [np.full(spec.shape, number, spec.dtype) for number, spec in enumerate(specs)]
    flat = buffer.join(values)
    program = jax.jit(lambda flat: packing.separated(buffer, flat))
    for found, expected in zip(program(flat), values, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    slices = re.findall(r"stablehlo\.slice %\S+ (.*)", program.lower(flat).as_text())
    return len(slices), len(set(slices))


def test_slices_of_equal_layers_are_equal() -> None:
    """XLA compiles equal slices once: 40 layers of three arrays are cut into runs of layers."""
    slices, different = _slices_of([ArraySpec(shape, jnp.dtype("int32")) for shape in ((4, 4), (4,), ())] * 40)
    assert slices > 2 * 120  # in both branches of a conditional
    assert different < 30


@pytest.mark.parametrize("sizes", [range(1, 71), [2] * 8], ids=["unequal", "few"])
def test_arrays_that_gain_nothing_are_sliced_once(sizes: list[int]) -> None:
    slices, _ = _slices_of([ArraySpec((size,), jnp.dtype("float32")) for size in sizes])
    assert slices == 2 * len(sizes) + 1  # and one element, for the condition
