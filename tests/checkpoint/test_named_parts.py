"""Arrays of other names, by parts: which bytes of a file are read, and how they come onto devices."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from named_models import folder_of
from statewise._src.checkpoint.interop import placed, read_range


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([1, 8, 64]), st.integers(0, 40), st.data())
def test_a_part_of_a_file_is_what_numpy_slices(shape: list[int], run: int, chunk: int, data: st.DataObject) -> None:
    array = np.arange(math.prod(shape), dtype=np.int16).reshape(shape)
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_range, "_RUN", run)
        patch.setattr(read_range, "_CHUNK", chunk)
        into = np.full(array[tuple(index)].shape, -1, np.int16)
        read_range.read_range(io.BytesIO(b"xyz" + array.tobytes()), 3, shape, index, into)
    assert np.array_equal(into, array[tuple(index)])


class Stacked(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.zeros((4, 8, 6)))  # layer, d, o
        self.b = nnx.Param(jnp.zeros((6, 4)))  # o, layer


NAMES = sw.Names({"w": sw.Name("h.{i}.w", "layer o d -> layer d o"), "b": sw.Name("h.{i}.b", "layer o -> o layer")})


def arrays_of(layers: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"w": (6, 8), "b": (6,)}
    return {
        f"h.{layer}.{name}": rng.normal(size=shape).astype(np.float32)
        for layer, (name, shape) in itertools.product(range(layers), shapes.items())
    }


def check(state: sw.State, arrays: dict[str, np.ndarray]) -> None:
    params = state["params"]
    assert np.array_equal(params["w"][...], np.stack([arrays[f"h.{layer}.w"].T for layer in range(4)]))
    assert np.array_equal(params["b"][...], np.stack([arrays[f"h.{layer}.b"] for layer in range(4)], 1))


PLACEMENTS = [
    sw.Replicated(),
    sw.Sharded("a"),
    sw.Sharded("a", "b"),
    sw.Sharded(None, ("b", "a")),
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stack_comes_onto_a_mesh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Any, streamed: bool
) -> None:
    """Also as on accelerators, one layer at a time into each device's part, though these devices are the CPU's."""
    if streamed:
        monkeypatch.setattr(placed, "_is_streamed", lambda place: True)
    arrays = arrays_of()
    folder = folder_of(tmp_path / "theirs", arrays, 3)
    kinds = sw.Kinds.standard().replace(
        params=sw.Kind(nnx.Param, placement=lambda path, shape: placement if len(shape) == 3 else sw.Replicated())
    )
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    target = kinds.plan(Stacked()).abstract(mesh)
    state, report = sw.restore(folder, target, names=NAMES)
    assert report.ok
    check(state, arrays)
    assert jax.tree.all(jax.tree.map(lambda array, wanted: array.sharding == wanted.sharding, state, target))


def test_a_device_has_only_one_layer_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed, "_is_streamed", lambda place: True)
    buffers: list[tuple[int, ...]] = []
    aligned = placed._aligned

    def noted(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        buffers.append(shape)
        return aligned(shape, dtype)

    monkeypatch.setattr(placed, "_aligned", noted)
    arrays = arrays_of()
    model = Stacked()
    state, _ = sw.restore(folder_of(tmp_path / "theirs", arrays), sw.plan(model).take(model), names=NAMES)
    check(state, arrays)
    assert sorted(buffers) == [(1, 8, 6)] * 4 + [(6, 1)] * 4


def test_a_wider_dtype_is_read_into_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 files in a float32 model, as on the CPU: without a copy of the whole in bfloat16."""
    buffers: list[Any] = []
    aligned = placed._aligned
    monkeypatch.setattr(placed, "_aligned", lambda shape, dtype: buffers.append(dtype) or aligned(shape, dtype))
    arrays = {name: array.astype(jnp.bfloat16) for name, array in arrays_of().items()}
    folder = folder_of(tmp_path / "theirs", arrays)
    model = Stacked()
    state, report = sw.restore(folder, sw.plan(model).take(model), names=NAMES, cast=True)
    assert report.counts == {"params": {"cast": 2}}
    check(state, {name: array.astype(np.float32) for name, array in arrays.items()})
    assert {str(dtype) for dtype in buffers} == {"float32"}
    # The reverse may lose numbers, which is known only of all of them.
    half = sw.plan(model).take(model).cast(params="bfloat16")
    exact = folder_of(tmp_path / "exact", arrays_of())
    state, _ = sw.restore(exact, half, names=NAMES, cast=True)
    check(state, {name: array.astype(jnp.bfloat16) for name, array in arrays_of().items()})
    large = arrays_of() | {"h.1.b": np.full(6, 3.4e38, np.float32)}
    with pytest.raises(sw.RestoreError, match="Casting would lose numbers"):
        sw.restore(folder_of(tmp_path / "large", large), half, names=NAMES, cast=True)


def test_an_array_that_was_read_can_be_donated(tmp_path: Path) -> None:
    """On the CPU it is the buffer that was read into, which JAX must not free twice or write to."""
    arrays = {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}
    model = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    target = sw.plan(model).take(model)
    folder = folder_of(tmp_path / "theirs", arrays)
    state, _ = sw.restore(folder, target, names=sw.Names({"kernel": "kernel"}))
    add = jax.jit(lambda state: jax.tree.map(lambda array: array + 1, state), donate_argnums=0)
    for _ in range(3):
        state = add(state)
    assert np.array_equal(state["params"]["kernel"][...], arrays["kernel"] + 3)


def test_only_the_bytes_of_this_process_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an array in rows on 8 devices, each row once, whole; by an index over the part that a device has."""
    arrays = {"w": np.arange(64 * 2048, dtype=np.float32).reshape(64, 2048)}
    folder = folder_of(tmp_path / "theirs", arrays)
    read: list[tuple[int, int]] = []
    of_file: Any = read_range._read

    def noted(file: Any, offset: int, into: np.ndarray) -> None:
        read.append((offset, into.nbytes))
        of_file(file, offset, into)

    monkeypatch.setattr(read_range, "_read", noted)
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.Sharded("a")))
    model = nnx.eval_shape(lambda: nnx.Linear(64, 2048, use_bias=False, rngs=nnx.Rngs(0)))
    target = kinds.plan(model).abstract(jax.make_mesh((8,), ("a",)))
    state, _ = sw.restore(folder, target, names=sw.Names({"kernel": "w"}))
    assert np.array_equal(state["params"]["kernel"][...], arrays["w"])
    assert sizes(read) == [64 * 2048 * 4 // 8] * 8
    assert len({offset for offset, _ in read}) == 8


def sizes(read: Sequence[tuple[int, int]]) -> list[int]:
    return [size for _, size in read]
