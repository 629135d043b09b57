"""Fingerprints stand for all the bits of an array, wherever it lies, and are the same on the devices and the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from statewise._src.inspect.watch import fingerprints as module
from statewise._src.inspect.watch.fingerprints import fingerprints

DTYPES = ["bool", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "float16"]
DTYPES += ["float32", "complex64", "float8_e4m3fn", "float8_e5m2"]


def one(array: Any) -> tuple[int, int]:
    (found,) = fingerprints([array])
    return found


def on_device(array: Any) -> tuple[int, int]:
    """The same where it is computed by the compiled function, for which four alike are enough."""
    found = fingerprints([jnp.asarray(array)] * 4)
    assert len(set(found)) == 1
    return found[0]


def random_array(dtype: str, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == "complex64":
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return np.asarray(rng.normal(size=shape) * 3).astype(jnp.dtype(dtype))


def plain(words: list[int]) -> tuple[int, int]:
    """The definition, in Python's own numbers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    first = second = 0
    for at, word in enumerate(words):
        place = mix((at + 0x9E3779B9) % 2**32)
        first += mix(word ^ place)
        second += mix(word ^ place) * (place | 1)
    return first % 2**32, second % 2**32


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_a_fingerprint_is_what_the_definition_says(words: list[int]) -> None:
    array = np.array(words, np.uint32)
    assert one(array) == plain(words)
    assert on_device(array) == plain(words)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_devices_and_the_host_say_the_same(dtype: str, shape: tuple[int, ...]) -> None:
    array = random_array(dtype, shape)
    assert one(array) == one(jnp.asarray(array)) == on_device(array)


def test_numbers_of_64_bits_are_told_apart_in_all_their_bits() -> None:
    one_up = np.array([1.0, np.nextafter(1.0, 2.0)])
    assert one(one_up[:1]) != one(one_up[1:])
    with jax.enable_x64(True):
        for array in (one_up, np.array([1, 2**40]), one_up + 1j):
            assert one(array) == on_device(array)


@given(hnp.arrays(np.uint32, hnp.array_shapes(max_dims=3, max_side=5)), st.data())
def test_one_flipped_bit_changes_both_sums(array: np.ndarray, data: Any) -> None:
    other = array.copy()
    at = data.draw(st.integers(0, array.size - 1))
    other.reshape(-1)[at] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    before, after = one(array), one(other)
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_lowest_bit_is_found_in_every_dtype(dtype: str) -> None:
    array = random_array(dtype)
    other = array.copy()
    other.view(np.uint8).reshape(-1)[0] ^= 1
    assert one(array) != one(other)
    assert on_device(array) != on_device(other)


@given(hnp.arrays(np.float32, 6, elements=st.floats(width=32), unique=True), st.permutations(range(6)))
def test_a_permutation_is_another_array(array: np.ndarray, order: list[int]) -> None:
    assert (one(array) == one(array[order])) == (array.tobytes() == array[order].tobytes())


def test_a_transposition_is_another_array_of_the_same_shape() -> None:
    array = np.arange(9.0, dtype=np.float32).reshape(3, 3)
    assert one(array) != one(array.T)


def test_nans_are_the_same_where_their_bits_are() -> None:
    nan = np.array([np.nan, 1.0], np.float32)
    assert one(nan) == one(nan.copy()) == on_device(nan)
    other = nan.copy()
    other.view(np.uint32)[0] ^= 1
    assert np.isnan(other[0])
    assert one(other) != one(nan)


def test_minus_zero_is_not_zero() -> None:
    assert one(np.float32(0.0)) != one(np.float32(-0.0))
    assert on_device(np.float32(0.0)) != on_device(np.float32(-0.0))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_are_their_words(impl: str) -> None:
    key, other = jax.random.key(0, impl=impl), jax.random.key(1, impl=impl)
    assert one(key) == one(jax.random.key_data(key))
    assert one(key) != one(other)
    several = jax.random.split(key, 5)
    assert one(several) == one(jax.random.key_data(several))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("d", None), (None, "d"), (None, None)])
def test_a_sharded_array_has_the_fingerprint_of_the_whole(
    spec: tuple[Any, ...], axis_type: AxisType, devices: list[jax.Device]
) -> None:
    array = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    sharding = NamedSharding(jax.make_mesh((8,), ("d",), axis_types=(axis_type,)), PartitionSpec(*spec))
    assert fingerprints([jax.device_put(array, sharding)] * 5) == [one(array)] * 5


def test_a_sharded_array_is_gathered_nowhere(devices: list[jax.Device]) -> None:
    sharding = NamedSharding(jax.make_mesh((8,), ("d",)), PartitionSpec(None, "d"))
    arrays = [jax.device_put(jnp.ones((16, 512)), sharding)]
    text = module._sums.lower(arrays).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_arrays_of_several_devices_and_memories_go_together(devices: list[jax.Device]) -> None:
    array = np.arange(8192, dtype=np.float32)
    kinds = {memory.kind for memory in devices[0].addressable_memories()}
    places: list[Any] = [devices[0], devices[1]]
    places += [jax.sharding.SingleDeviceSharding(devices[2], memory_kind=kind) for kind in sorted(kinds)]
    assert set(fingerprints([jax.device_put(array, place) for place in places])) == {one(array)}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of what is traced, and so compiled, anew."""
    shapes: list[Any] = []
    words = module._words

    def counting(array: Any) -> Any:
        shapes.append(array.shape)
        return words(array)

    monkeypatch.setattr(module, "_words", counting)
    return shapes


def test_arrays_alike_share_programs(traced: list[Any]) -> None:
    arrays = [jnp.full((7, 3), number, jnp.float32) for number in range(1000)]
    found = fingerprints(arrays)
    # 15 stacks of 64, and the 40 that are left, filled up to 64.
    assert traced == [(64, 7, 3)]
    assert fingerprints(arrays) == found == [one(np.asarray(array)) for array in arrays]
    assert len(traced) == 1


def test_a_thousand_shapes_compile_nothing_where_they_are_small(traced: list[Any]) -> None:
    arrays = jax.device_put([np.ones((1 + number, 2), np.float32) for number in range(1000)])
    assert len(set(fingerprints(arrays))) == 1000
    assert traced == []


def test_large_arrays_are_not_stacked(traced: list[Any]) -> None:
    fingerprints([jnp.full((1021, 1031), number) for number in range(3)])
    assert traced == [(1, 1021, 1031)]


def test_it_works_with_jit_disabled_and_under_a_guard_of_transfers() -> None:
    array = jnp.arange(8192.0)
    with jax.disable_jit():
        assert one(array) == one(np.asarray(array))
    with jax.transfer_guard("disallow"):
        assert one(array) == fingerprints([array] * 4)[0]
