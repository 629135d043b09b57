"""`names=`: files of other programs, in and out; judged by the package safetensors and by arrays made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from named_models import INDEX, NAMES, Net, check_read, folder_of, theirs


@pytest.mark.parametrize("files", [1, 3])
def test_a_folder_is_read(tmp_path: Path, files: int) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays, files)
    model = Net()
    plan = sw.plan(model)
    target = plan.take(model)
    assert NAMES.check(plan, folder).ok
    assert sw.preview(folder, target, names=NAMES).ok
    state, report = sw.restore(folder, target, names=NAMES)
    check_read(state, arrays)
    assert report.counts == {"params": {"restored": 9}, "rng": {"kept": 4}, "variables": {"kept": 1}}
    assert state["variables"]["count"][...] == 3
    # One file alone, and what `inspect` counts of a folder.
    if files == 1:
        check_read(sw.restore(folder / "model.safetensors", target, names=NAMES)[0], arrays)
    assert sw.inspect(folder)["arrays"].leaves == len(arrays)
    # Several files, whatever they are called.
    several = [file.rename(file.with_name(f"x{number}")) for number, file in enumerate(folder.glob("*.safetensors"))]
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    assert NAMES.check(plan, several).ok
    assert sw.preview(several, target, names=NAMES).path == ", ".join(map(str, several))
    check_read(sw.restore(tuple(map(str, several)), target, names=NAMES)[0], arrays)
    assert sw.inspect(several)["arrays"].leaves == len(arrays)


@pytest.mark.parametrize("most", [None, 300, 1])
def test_a_folder_is_written_and_read_by_the_package(tmp_path: Path, most: int | None) -> None:
    model = Net()
    plan = sw.plan(model, optimizers={"params": optax.adamw(0.1)})
    state = plan.take(model)
    config = tmp_path / "config.json"
    config.write_text('{"a":  1}')
    place = tmp_path / "published"
    report = sw.convert(state, place, names=NAMES, max_shard_bytes=most, extra_files=[config])
    assert report.ok
    assert (place / "config.json").read_bytes() == config.read_bytes()
    read: dict[str, np.ndarray] = {}
    files = sorted(place.glob("*.safetensors"))
    for file in files:
        read |= safetensors.numpy.load_file(file)
        with safetensors.safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert sorted(read) == sorted([*theirs(), "lm_head.weight"]), "a tied leaf is written under each of its names"
    assert np.array_equal(read["lm_head.weight"], read["model.embed.weight"])
    check_read(state, read)
    if most is None:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((place / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in read.values())
        assert {place / file for file in index["weight_map"].values()} == set(files)
        assert len(files) == (len(read) if most == 1 else 6)
    again, _ = sw.restore(place, plan.take(Net(5)), names=NAMES)
    assert jax.tree.all(jax.tree.map(np.array_equal, again["params"], state["params"]))
    # A dry run writes nothing.
    assert sw.convert(state, tmp_path / "not", names=NAMES, dry_run=True).ok
    assert not (tmp_path / "not").exists()


def test_other_dtypes_are_cast_when_asked(tmp_path: Path) -> None:
    arrays = theirs(dtype=jnp.bfloat16)
    folder = folder_of(tmp_path / "theirs", arrays)
    target = sw.plan(Net()).take(Net())
    report = sw.preview(folder, target, names=NAMES)
    assert {leaf.note for leaf in report.problems} == {"is bfloat16 in the checkpoint"}
    state, report = sw.restore(folder, target, names=NAMES, cast=True)
    assert report.counts["params"] == {"cast": 9}
    assert state["params"]["norm"]["scale"][...].dtype == jnp.float32
    check_read(state, {name: array.astype(np.float32) for name, array in arrays.items()})
    half = Net(dtype=jnp.bfloat16)
    check_read(sw.restore(folder, sw.plan(half).take(half), names=NAMES)[0], arrays)


def test_a_mesh_gets_its_slices(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays, 3)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=lambda path, shape: _axis(shape)))
    model = Net()
    plan = kinds.plan(model)
    target = jax.device_put(plan.take(model), plan.shardings(mesh))
    state, _ = sw.restore(folder, target, names=NAMES)
    check_read(state, arrays)
    kernel = state["params"]["layers"][0]["up"]["kernel"][...]
    assert kernel.sharding.spec == jax.P(None, "data")
    assert jax.tree.all(jax.tree.map(lambda one, two: one.sharding == two.sharding, state, target))


def _axis(shape: tuple[int, ...]) -> Any:
    return sw.Sharded(None, "data") if len(shape) == 2 else sw.Replicated()


def test_layers_that_are_stacked_and_matrices_that_are_joined(tmp_path: Path) -> None:
    class Stacked(nnx.Module):
        def __init__(self) -> None:
            self.qkv = nnx.Param(jnp.zeros((3, 5, 4, 2)))  # layer, d, heads (2 + 1 + 1), h
            self.scale = nnx.Param(jnp.zeros((3, 5)))

    names = sw.Names(
        {
            "qkv": sw.Name(
                ["h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"],
                "layer (n h) d -> layer d n h", h=2, join=0, sizes=(4, 2, 2),
            ),
            "scale": "h.{i}.norm.weight",
        }
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {f"h.{i}.norm.weight": rng.normal(size=5).astype(np.float32) for i in range(3)}
    for i in range(3):
        arrays |= {
            f"h.{i}.{part}.weight": rng.normal(size=(size, 5)).astype(np.float32)
            for part, size in zip("qkv", (4, 2, 2), strict=True)
        }
    folder = folder_of(tmp_path / "theirs", arrays, 2)
    model = Stacked()
    plan = sw.plan(model)
    state, report = sw.restore(folder, plan.abstract(), names=names)
    assert report.counts == {"params": {"restored": 2}}
    for i in range(3):
        joined = np.concatenate([arrays[f"h.{i}.{part}.weight"] for part in "qkv"])
        assert np.array_equal(state["params"]["qkv"][...][i], joined.T.reshape(5, 4, 2))
        assert np.array_equal(state["params"]["scale"][...][i], arrays[f"h.{i}.norm.weight"])
    sw.convert(state, tmp_path / "back.safetensors", names=names)
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == arrays.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())


class Odd(nnx.Module):
    """Leaves of unusual forms."""

    def __init__(self, seed: int = 0) -> None:
        self.scalar = nnx.Param(jnp.float32(seed))
        self.empty = nnx.Param(jnp.zeros((0, 3)))
        self.half = nnx.Param(jnp.full((2,), seed, jnp.bfloat16))
        self.pair = nnx.Param((jnp.full(2, seed), jnp.full(3, seed)))
        self.keyed = nnx.Dict({"0": nnx.Param(jnp.full(1, seed + 1.0))})
        self.key = nnx.RngKey(jax.random.key(seed))
        self.raw = nnx.data(jnp.full(2, seed))


ODD = sw.Names({each: f"x.{each.replace('/', '.')}" for each in ("scalar", "half", "keyed/0", "key", "raw")})
ODD |= sw.Names({"pair/{i}": "pair.{i}", "empty": sw.Name("empty", "a b -> b a")})


@pytest.mark.parametrize("packed", [False, True])
def test_leaves_of_every_form_come_back_to_the_bit(tmp_path: Path, packed: bool) -> None:
    plan = sw.plan(Odd())
    state = plan.take(Odd(7), pack=packed)
    sw.convert(state, tmp_path / "there", names=ODD)
    back, report = sw.restore(tmp_path / "there", plan.take(Odd(1), pack=packed), names=ODD)
    assert {each.outcome for each in report.leaves} == {"restored"}
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        assert one.dtype == two.dtype
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def test_moments_and_averages_begin_with_what_is_read(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays)
    plan = sw.Kinds.standard().plan(Net(), optimizers={"params": optax.adamw(0.1)}, averages={"params": sw.EMA(0.9)})
    state, report = sw.restore(folder, plan.take(Net()), names=NAMES)
    check_read(state, arrays)
    check_read(state.with_averages("ema"), arrays)
    assert report.counts["optimizer"] == {"kept": len(jax.tree.leaves(state["optimizer"]))}


def test_an_abstract_target_gets_moments_from_init(tmp_path: Path) -> None:
    names = sw.Names({"kernel": sw.Name("w", "o i -> i o"), "bias": "b"})
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    folder = folder_of(tmp_path / "theirs", arrays)
    make = lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))  # noqa: E731
    plan = sw.Kinds.standard().plan(
        nnx.eval_shape(make), optimizers={"params": optax.adam(0.1)}, averages={"params": sw.EMA(0.9)}
    )
    state, report = sw.restore(folder, plan.abstract(), names=names)
    assert report.counts == {
        "params": {"restored": 2},
        "optimizer": {"restarted": 5},
        "ema": {"restarted": 2},
    }
    params = {"kernel": arrays["w"].T, "bias": arrays["b"]}
    first = optax.adam(0.1).init(params)
    expected = sorted((array.shape, array.tobytes()) for array in map(np.asarray, jax.tree.leaves(first)))
    found = sorted((array.shape, array.tobytes()) for array in map(np.asarray, jax.tree.leaves(state["optimizer"])))
    assert found == expected
    assert np.array_equal(state.with_averages("ema")["params"]["kernel"][...], arrays["w"].T)


def test_thousands_of_rows_are_matched_at_once() -> None:
    names = sw.Names({f"layers/{i}/w": f"model.layers.{i}.w" for i in range(5000)} | {"{i}/b": "{i}.b"})
    assert [names.rows_of(f"layers/{i}/w") for i in (0, 4999)] == [[("layers/0/w", {})], [("layers/4999/w", {})]]
    assert names.rows_of("x/b") == [("{i}/b", {"i": "x"})]
    assert names.rows_of("{i}/b") == [("{i}/b", {"i": "{i}"})]


def test_files_are_converted_into_a_checkpoint_by_names(tmp_path: Path) -> None:
    arrays = theirs()
    folder = folder_of(tmp_path / "theirs", arrays, 2)
    plan = sw.plan(Net())
    target = plan.take(Net())
    report = sw.convert(folder, tmp_path / "run", target=target, names=NAMES)
    assert report.ok
    assert report.source_format == "safetensors"
    assert ("model.layers.1.q.weight", ("layers", 1, "q", "kernel")) in {(n, leaf.path) for n, leaf in report.matched}
    assert [(sw.format_path(leaf.path), leaf.note) for leaf in report.kept if leaf.kind == "variables"] == [
        ("count", "not in the files, as the names say")
    ]
    state, _ = sw.restore(tmp_path / "run", plan.take(Net(3)))
    check_read(state, arrays)
    wrong = sw.Names({row: name for row, name in NAMES.items() if row != "norm/bias"})
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert([*folder.glob("*.safetensors")], tmp_path / "not", target=target, names=wrong)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "norm/bias: Param(8,) float32  kind=params  (has no row in the names)"
    ]
    assert caught.value.hint == "a row in the names, 'norm/bias': 'its name there'; or None, for what is not there"
