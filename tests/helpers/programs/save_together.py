"""One of several processes that save and restore a state together; run by test_save_together.py."""

from __future__ import annotations

import os
import sys
from typing import Any

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.checkpoint.interop import safetensors
from statewise._src.checkpoint.orbax import read as orbax_read
from statewise._src.checkpoint.orbax.values import DiskValues


def make() -> nnx.Linear:
    """The same model in every process."""
    return nnx.Linear(8, 16, rngs=nnx.Rngs(0))


def spread(state: sw.State) -> sw.State:
    """A state over all devices of all processes: what can be is split, the rest is on each of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array: jax.Array) -> jax.Array:
        splits = array.ndim and array.shape[0] % jax.device_count() == 0
        sharding = jax.NamedSharding(mesh, jax.P("all") if splits else jax.P())
        whole = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, state)


def assert_same_shards(state: sw.State, back: sw.State) -> None:
    """Asserts that two states have the same shardings, and the same values on the devices of this process."""
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert ours.sharding == theirs.sharding
        for one, other in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)


class Stack(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.Param(jnp.zeros((4, 3, 2)))
        self.norm = nnx.Param(jnp.zeros(3))


NAMES = sw.Names({"layers": sw.Name("layers.{i}.weight", "layer o i -> layer i o"), "norm": "norm.weight"})


def published() -> dict[str, dict[str, np.ndarray]]:
    """Two files: the layers of each process, of which each of its two devices has one; and what all have."""
    rng = np.random.default_rng(0)
    layers = {f"layers.{layer}.weight": rng.normal(size=(2, 3)).astype(np.float32) for layer in range(4)}
    first = {"norm.weight": rng.normal(size=3).astype(np.float32)}
    for layer in range(2):
        first[f"layers.{layer}.weight"] = layers.pop(f"layers.{layer}.weight")
    return {"0.safetensors": first, "1.safetensors": layers}


def read_named(folder: str, number: int) -> None:
    """Reads files of other names: each process the arrays that its own devices need, and no other."""
    read: list[tuple[str, int]] = []
    read_range = safetensors.read_range

    def noted(file: Any, offset: int, shape: Any, index: Any, into: np.ndarray) -> None:
        read.append((file.name[-len("0.safetensors") :], into.nbytes))
        read_range(file, offset, shape, index, into)

    safetensors.read_range = noted
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=lambda path, shape: split(shape)))
    mesh = jax.make_mesh((4,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    state, _ = sw.restore(folder, kinds.plan(nnx.eval_shape(Stack)).abstract(mesh), names=NAMES)
    arrays = {name: array for file in published().values() for name, array in file.items()}
    whole = np.stack([arrays[f"layers.{layer}.weight"].T for layer in range(4)])
    layers, norm = state["params"]["layers"][...], state["params"]["norm"][...]
    for shard in layers.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])
    for shard in norm.addressable_shards:
        np.testing.assert_array_equal(shard.data, arrays["norm.weight"])
    # Two layers, one for each device; and the norm once, for both.
    assert sorted(read) == sorted([(f"{number}.safetensors", 24)] * 2 + [("0.safetensors", 12)]), read


def save_large(path: str) -> None:
    """Saves large arrays, and reads from their files what this process needs of them."""
    rng = np.random.default_rng(0)
    shapes = {"split": (1024, 520), "whole": (1025, 300)}
    model = nnx.Dict(**{name: nnx.Param(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()})
    state = spread(sw.plan(model).take(model))
    sw.save(path, state)
    read: list[tuple[str, int]] = []
    start = DiskValues.start

    def noted(self: DiskValues, name: str, store: Any, part: tuple[slice, ...] = ()) -> Any:
        coming = start(self, name, store, part)
        read.append((name.rpartition(".")[2], 0 if coming is None else coming.array.nbytes))
        return coming

    DiskValues.start = noted
    assert_same_shards(state, sw.restore(path, state)[0])
    # A quarter for each of the two devices of this process; and the whole once, for both.
    assert sorted(read) == [("split", 1024 * 520)] * 2 + [("whole", 1025 * 300 * 4)], read
    read_in_groups(path, state)


def read_in_groups(path: str, state: sw.State) -> None:
    """Reads each array apart from the others; then one process cannot read the second, and both say so."""
    orbax_read._AT_ONCE = 1
    assert_same_shards(state, sw.restore(path, state)[0])
    open_stored = orbax_read.open_stored

    def fails(database: Any, key: Any) -> Any:
        if jax.process_index() == 1 and key[-1] == "whole":
            raise OSError("cannot be read here")
        return open_stored(database, key)

    orbax_read.open_stored = fails
    expected: tuple[type[sw.StatewiseError], str] = (
        (sw.CorruptedError, "cannot be read here")
        if jax.process_index() == 1
        else (sw.RestoreError, "process 1 could not read its parts, and its own error says why")
    )
    with pytest.raises(expected[0], match=expected[1]):
        sw.restore(path, state)


def split(shape: tuple[int, ...]) -> sw.Sharded | sw.Replicated:
    return sw.Sharded("all") if len(shape) == 3 else sw.Replicated()


def main(number: int, count: int, port: str, folder: str, *stores: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    model = make()
    state = spread(sw.plan(model, optimizers={"params": optax.adam(1e-2)}).take(model))
    train = sw.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    x = jnp.ones((4, 8))
    state, _ = train(state, x)
    sw.save(f"{folder}/together", state)
    back, report = sw.restore(f"{folder}/together", state)
    assert report.counts == {"params": {"restored": 2}, "optimizer": {"restored": 5}}
    assert_same_shards(state, back)
    for store in stores:
        sw.save(f"{store}/together", state)
        assert_same_shards(state, sw.restore(f"{store}/together", state)[0])
    if count == 2:
        read_named(f"{folder}/theirs", number)
        save_large(f"{folder}/large")
    print("the same", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
