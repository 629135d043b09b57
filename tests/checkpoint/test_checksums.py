"""Checksums: the same sums however an array lies, others where anything in it changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from checkpoint_models import DTYPES, one_of
from statewise._src.checkpoint.format import checksums
from statewise._src.checkpoint.format.checksums import sums_of, sums_of_runs


def on_devices(array: Any) -> tuple[int, int]:
    """The sums as they are taken where no process holds the whole array."""
    plain, placed = checksums._on_devices(array)
    return int(plain), int(placed)


def by_definition(array: Any) -> tuple[int, int]:
    """The two sums as the module's head writes them: word by word, with Python's integers."""
    host = np.asarray(array)
    width = host.dtype.itemsize if host.dtype.itemsize in (1, 2) else 4
    data = host.tobytes()
    words = [int.from_bytes(data[at : at + width], "little") for at in range(0, len(data), width)]
    bits = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}.get(str(host.dtype), 32)
    words = [word & ((1 << bits) - 1) for word in words]
    return sum(words) % 2**32, sum(place * word for place, word in enumerate(words, 1)) % 2**32


# --- they are what they are said to be ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_and_devices_sum_every_dtype_as_it_is_defined(dtype: str) -> None:
    array = one_of(dtype, (3, 5, 2))
    assert sums_of(array) == sums_of(np.asarray(array)) == on_devices(array) == by_definition(array)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1, 1, 1)], ids=str)
def test_arrays_of_every_rank_are_summed(shape: tuple[int, ...]) -> None:
    array = one_of("float32", shape)
    assert sums_of(array) == on_devices(array) == by_definition(array)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_numbers_of_64_bits_and_more_are_summed_in_words_of_four_bytes(dtype: str) -> None:
    with jax.enable_x64(True):
        array = one_of(dtype, (3, 4)) * 3
        assert sums_of(array) == on_devices(array) == by_definition(array)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int16, np.float32, np.uint32]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    )
)
def test_the_sums_are_as_they_are_defined(array: np.ndarray) -> None:
    assert sums_of(array) == by_definition(array)


def test_large_arrays_are_summed_in_pieces_to_the_same() -> None:
    """Three pieces and a rest, with words so large that every sum wraps round."""
    array = np.random.default_rng(0).integers(0, 2**32, 3 * 65536 + 5, dtype=np.uint32)
    places = np.arange(1, array.size + 1, dtype=object)
    expected = int(array.astype(object).sum()) % 2**32, int((array.astype(object) * places).sum()) % 2**32
    assert sums_of(array) == expected == on_devices(jnp.asarray(array))


def test_the_largest_words_do_not_overflow_a_piece() -> None:
    array = np.full(65536, 2**32 - 1, np.uint32)
    assert sums_of(array) == by_definition(array)


# --- however an array lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [("x",), ("x", "y"), (None, "y"), (("x", "y"),), ("y", None, "x"), ()], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "complex64"])
def test_the_sums_do_not_depend_on_the_placement(devices: list[jax.Device], dtype: str, spec: tuple[Any, ...]) -> None:
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("x", "y"))
    array = one_of(dtype, (8, 4, 4))
    placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
    assert sums_of(placed) == on_devices(placed) == sums_of(array)


@pytest.mark.parametrize(
    "spec", [("data",), (None, "model"), ("model", None, "data"), (None, ("data", "model"))], ids=str
)
@pytest.mark.parametrize("dtype", ["float64", "int16", "complex64"])
def test_an_array_in_pieces_is_summed_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, spec: tuple[Any, ...], dtype: str
) -> None:
    monkeypatch.setattr(checksums, "_CHUNK", 32)  # so that a piece, too, is looked at in parts
    monkeypatch.setattr(checksums, "_ROW", 8)
    monkeypatch.setattr(checksums, "_PLACES", np.arange(1, 9, dtype=np.uint32))
    monkeypatch.setattr(checksums, "_ROWS", np.arange(0, 32, 8, dtype=np.uint32))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.enable_x64(True):
        array = (one_of(dtype, (8, 16, 4)) * 7).astype(dtype)
        placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
        kept = checksums.held(placed)
        assert len(kept.parts) > 1
        assert checksums.sums_of(kept) == by_definition(array)


def test_the_sums_do_not_depend_on_the_order_in_memory() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for other in (np.asfortranarray(array), array.repeat(2, axis=2)[..., ::2], array[::-1][::-1]):
        assert sums_of(other) == sums_of(array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_held_of_numpy_is_nobody_else_s(order: str) -> None:
    """Whoever has the array that a read-only view is of can write to it while it is being saved."""
    base = np.arange(6.0).reshape(2, 3, order=order)
    view = base.view()
    view.flags.writeable = False
    for array in (base, view, np.broadcast_to(base, (4, 2, 3)), base[:, 1:], base.T):
        assert not np.shares_memory(checksums.held(array), base)
        assert np.array_equal(checksums.held(array), array)
    own = np.concatenate([base, base])
    own.flags.writeable = False
    assert checksums.held(own) is own  # it owns what it holds, and nobody writes to it


# --- many at once ------------------------------------------------------------------------------------------------


@given(
    hnp.arrays(st.sampled_from([np.uint8, np.int16, np.float32, np.float64, np.bool_]), st.integers(0, 60)),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 20)), max_size=12),
    st.integers(1, 8),
)
def test_runs_of_an_array_are_summed_each_for_itself(
    flat: np.ndarray, pairs: list[tuple[int, int]], chunk: int
) -> None:
    """Runs that follow each other, overlap, are empty, or stand in any order."""
    runs = [(start, length) for start, length in pairs if start + length <= flat.size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_CHUNK", chunk)  # so that some are apart
        found = sums_of_runs(flat, runs)
    assert found == [sums_of(flat[start : start + length]) for start, length in runs]


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_every_dtype_are_summed_as_it_is_defined(dtype: str) -> None:
    flat = np.asarray(one_of(dtype, (11,)))
    runs = [(0, 4), (4, 1), (5, 6), (2, 3)]
    assert sums_of_runs(flat, runs) == [by_definition(flat[start : start + length]) for start, length in runs]


def test_runs_of_the_largest_words_do_not_overflow() -> None:
    flat = np.full(3 * 65536, 2**32 - 1, np.uint32)
    runs = [(0, 65536), (65536, 2 * 65536)]
    assert sums_of_runs(flat, runs) == [by_definition(flat[start : start + length]) for start, length in runs]


# --- what they notice --------------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint32, st.integers(1, 40)), st.integers(0, 10**6), st.integers(0, 31))
def test_one_flipped_bit_changes_them(array: np.ndarray, at: int, bit: int) -> None:
    changed = array.copy()
    changed[at % array.size] ^= np.uint32(1 << bit)
    assert sums_of(changed)[0] != sums_of(array)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_changed_element_of_any_dtype_changes_them(dtype: str) -> None:
    array = np.array(one_of(dtype, (2, 5)))
    before = sums_of(array)
    array[1, 2] = array[1, 3] if array[1, 3] != array[1, 2] else array[1, 1]
    assert sums_of(array)[0] != before[0]


@given(hnp.arrays(np.uint16, st.integers(2, 40)), st.integers(0, 10**6), st.integers(0, 10**6))
def test_two_elements_that_change_places_change_the_second_sum(array: np.ndarray, one: int, other: int) -> None:
    one, other = one % array.size, other % array.size
    swapped = array.copy()
    swapped[[one, other]] = swapped[[other, one]]
    assert sums_of(swapped)[0] == sums_of(array)[0]
    assert (sums_of(swapped) == sums_of(array)) == bool(array[one] == array[other])


def test_zeros_of_two_signs_and_two_nans_have_different_sums() -> None:
    assert sums_of(np.array([0.0], np.float32)) != sums_of(np.array([-0.0], np.float32))
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert sums_of(nans[:1]) != sums_of(nans[1:])


def test_an_empty_array_sums_to_nothing() -> None:
    assert sums_of(np.zeros((0, 3), np.float32)) == (0, 0)


def test_what_an_accelerator_holds_is_summed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no accelerator here: a CPU device stands for one."""
    array = jnp.arange(1000.0)
    expected = sums_of(array)
    monkeypatch.setattr(checksums, "_is_far", lambda array: True)
    with jax.transfer_guard_device_to_host("allow"):  # the two sums come back
        monkeypatch.setattr(checksums, "held", lambda array: pytest.fail("brought to the host"))
        assert sums_of(array) == expected


def test_small_arrays_and_a_cpu_s_are_summed_on_the_host() -> None:
    assert not checksums._is_far(jnp.zeros(1 << 23))
    assert checksums._FAR > 1 << 20
