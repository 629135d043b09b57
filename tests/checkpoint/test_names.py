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
from refusals import refused

INDEX = "model.safetensors.index.json"


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
        self.q = nnx.LinearGeneral(8, (2, 4), rngs=rngs, param_dtype=dtype)
        self.up = nnx.Linear(8, 6, use_bias=False, rngs=rngs, param_dtype=dtype)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Net(nnx.Module):
    """A tied embedding, layers, dropout, a counter."""

    def __init__(self, seed: int = 0, dtype: Any = jnp.float32) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(10, 8, rngs=rngs, param_dtype=dtype)
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs, param_dtype=dtype)
        self.head = self.embed
        self.count = nnx.Variable(jnp.array(3))


NAMES = sw.Names(
    {
        "embed/embedding": "model.embed.weight",
        "head/embedding": "lm_head.weight",
        "layers/{i}/q/kernel": sw.Name("model.layers.{i}.q.weight", "(n h) d -> d n h"),
        "layers/{i}/q/bias": sw.Name("model.layers.{i}.q.bias", "(n h) -> n h"),
        "layers/{i}/up/kernel": sw.Name("model.layers.{i}.up.weight", "o i -> i o"),
        "norm/scale": "model.norm.weight",
        "norm/bias": "model.norm.bias",
        "count": None,
    }
)


def theirs(seed: int = 1, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The file's arrays, made by hand."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (10, 8), "model.norm.weight": (8,)}
    shapes["model.norm.bias"] = (8,)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.q.weight": (8, 8), f"model.layers.{layer}.q.bias": (8,)}
        shapes[f"model.layers.{layer}.up.weight"] = (6, 8)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def check_read(state: sw.State, arrays: dict[str, np.ndarray]) -> None:
    """Compares what was read with the file's arrays, rearranged by NumPy."""
    params = state["params"]
    assert np.array_equal(params["embed"]["embedding"][...], arrays["model.embed.weight"])
    for layer in range(2):
        block, name = params["layers"][layer], f"model.layers.{layer}"
        assert np.array_equal(block["q"]["kernel"][...], arrays[f"{name}.q.weight"].T.reshape(8, 2, 4))
        assert np.array_equal(block["q"]["bias"][...], arrays[f"{name}.q.bias"].reshape(2, 4))
        assert np.array_equal(block["up"]["kernel"][...], arrays[f"{name}.up.weight"].T)
    assert np.array_equal(params["norm"]["scale"][...], arrays["model.norm.weight"])


def folder_of(place: Path, arrays: dict[str, np.ndarray], files: int = 1) -> Path:
    """A folder as models are published, written by the package."""
    place.mkdir()
    if files == 1:
        safetensors.numpy.save_file(arrays, place / "model.safetensors", {"format": "pt"})
        return place
    owner = {name: f"model-{number % files + 1}.safetensors" for number, name in enumerate(arrays)}
    for file in set(owner.values()):
        safetensors.numpy.save_file({name: arrays[name] for name in arrays if owner[name] == file}, place / file)
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    return place


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


def test_everything_that_is_wrong_is_listed_before_an_array_is_read(tmp_path: Path) -> None:
    arrays = theirs()
    arrays["model.norm.bias"] = arrays["model.norm.bias"][:5]
    arrays["extra"] = np.ones(2, np.float32)
    del arrays["model.layers.1.up.weight"]
    folder = folder_of(tmp_path / "theirs", arrays)
    names = sw.Names(
        {path: name for path, name in NAMES.items() if path != "layers/{i}/q/bias"}
        | {"layers/{j}/up/kernel": sw.Name("model.layers.{j}.up.weight", "o i -> i o"), "norm/scale": "model.norm.bias"}
    )
    plan = sw.plan(Net())
    report = names.check(plan, folder)
    assert not report.ok
    assert [f"{leaf.path[-1]}@{leaf.path[-3]}: {leaf.note}" if len(leaf.path) > 2 else f"{leaf.path[0]}: {leaf.note}" for leaf in report.problems] == [  # noqa: E501
        "bias@0: has no row in the names",
        "kernel@0: is in several rows: 'layers/{i}/up/kernel', 'layers/{j}/up/kernel'",
        "bias@1: has no row in the names",
        "kernel@1: is in several rows: 'layers/{i}/up/kernel', 'layers/{j}/up/kernel'",
        "norm: model.norm.bias is (5,) in the source, and not (8,)",
        "norm: would be read from model.norm.bias, which is also norm/bias",
        "norm: model.norm.bias is (5,) in the source, and not (8,)",
    ]  # fmt: skip
    unused = [each.leaf.path[0] for each in report.leaves if each.outcome == "dropped"]
    assert "extra" in unused
    target = plan.take(Net())
    with pytest.raises(sw.RestoreError, match="Nothing was read or changed"):
        sw.restore(folder, target, names=names)
    absent = NAMES.check(plan, folder)
    assert [leaf.note for leaf in absent.problems if leaf.path[-2] == "up"] == [
        "the source has no model.layers.1.up.weight"
    ]


def test_a_state_that_has_no_row_for_a_leaf_is_not_written(tmp_path: Path) -> None:
    model = Net()
    state = sw.plan(model).take(model)
    names = sw.Names({path: name for path, name in NAMES.items() if path not in ("count", "norm/bias")})
    with pytest.raises(sw.RestoreError) as caught:
        sw.convert(state, tmp_path / "published", names=names)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "count: Variable() int32  kind=variables  (has no row in the names)",
        "norm/bias: Param(8,) float32  kind=params  (has no row in the names)",
    ]
    assert list(tmp_path.iterdir()) == []
    twice = sw.Names(dict(NAMES) | {"norm/bias": "model.norm.weight"})
    with pytest.raises(sw.RestoreError, match=r"would be written as model\.norm\.weight, which is also norm/bias"):
        sw.convert(state, tmp_path / "published", names=twice)
    with pytest.raises(sw.StructureError, match="no values"):
        sw.convert(sw.plan(model).abstract(), tmp_path / "published", names=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_tied_leaves_that_differ_in_the_files_are_refused(tmp_path: Path) -> None:
    arrays = theirs()
    arrays["lm_head.weight"] = arrays["model.embed.weight"].copy()
    model = Net()
    target = sw.plan(model).take(model)
    check_read(sw.restore(folder_of(tmp_path / "equal", arrays), target, names=NAMES)[0], arrays)
    arrays["lm_head.weight"][0] += 1
    folder = folder_of(tmp_path / "differ", arrays)
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(folder, target, names=NAMES)
    assert [leaf.note for leaf in caught.value.leaves] == [
        "is tied, and has two different values in the source: embed/embedding and head/embedding"
    ]


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ("{", "it has no weight_map"),
        ('{"weight_map": []}', "its weight_map does not give a file for each name"),
        ('{"weight_map": {"a": 3}}', "its weight_map does not give a file for each name"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "it names '../model.safetensors', which is not a file of"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "it names '/etc/passwd', which is not a file of the folder"),
        ('{"weight_map": {"a": ".."}}', "it names '..', which is not a file of the folder"),
    ],
)
def test_an_index_that_is_not_one(tmp_path: Path, index: str, why: str) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    (folder / INDEX).write_text(index)
    with pytest.raises(sw.CorruptedError) as caught:
        NAMES.check(sw.plan(Net()), folder)
    assert caught.value.message.startswith(f"{folder / INDEX} is not an index: {why}")


def test_an_index_and_files_that_do_not_agree(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs(), 3)
    plan = sw.plan(Net())
    whole = json.loads((folder / INDEX).read_text())
    moved = dict.fromkeys(whole["weight_map"], "model-1.safetensors") | {"none": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved | {"more": "model-3.safetensors"}}))
    with pytest.raises(sw.CorruptedError, match=r"model\.norm\.weight is in model-2\.safetensors, and the index has"):
        NAMES.check(plan, folder)
    (folder / INDEX).write_text(json.dumps(whole))
    (folder / "model-2.safetensors").unlink()
    with refused(
        sw.CorruptedError,
        f"{folder} is not complete: its index names model-2.safetensors, which is not there.",
        hint="fetch the folder again",
    ):
        NAMES.check(plan, folder)
    (folder / INDEX).unlink()
    safetensors.numpy.save_file({"model.norm.bias": np.ones(8, np.float32)}, folder / "second.safetensors")
    with pytest.raises(sw.CorruptedError, match=r"model\.norm\.bias is in model-3\.safetensors and in second"):
        NAMES.check(plan, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 is not a number of bytes."),
        ({"extra_files": "config.json"}, "extra_files is one path, and not several."),
        ({"extra_files": ["nowhere/config.json"]}, "There is no file at nowhere/config.json."),
        ({"names": None}, "A state is converted by names, and there are none."),
        ({"names": {"a": "b"}}, "A state is converted by names, and names is dict."),
        ({"cast": True}, "A state is written under other names into safetensors files: target, rename, cast and other"),
        (
            {"to": "orbax"},
            "A state is written under other names into safetensors files: target, rename, cast and other",
        ),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = Net()
    given: dict[str, Any] = {"names": NAMES} | options
    with pytest.raises(sw.StatewiseError) as caught:
        sw.convert(sw.plan(model).take(model), tmp_path / "published", **given)
    assert caught.value.message.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "theirs", theirs())
    model = Net()
    plan = sw.plan(model)
    with refused(
        sw.StructureError,
        "names is dict, and not sw.Names.",
        hint="names=sw.Names({'embed/embedding': 'model.embed_tokens.weight'})",
    ):
        sw.restore(folder, plan.abstract(), names={"a": "b"})  # type: ignore[arg-type]
    with refused(
        sw.RestoreError, "Files of other names have neither a base nor members.", hint="leave out base and members"
    ):
        sw.restore(folder, plan.abstract(), names=NAMES, base=folder)
    with refused(
        sw.StructureError,
        "Names are checked against a plan, not Net.",
        hint="names.check(sw.plan(model), path)",
    ):
        NAMES.check(model, folder)  # type: ignore[arg-type]
    with refused(
        sw.SaveError,
        "max_shard_bytes and extra_files are of a folder, which is written from a state by names.",
        hint="sw.convert(state, 'folder', names=names, max_shard_bytes=5 * 2**30)",
    ):
        sw.convert(folder / "model.safetensors", tmp_path / "x.safetensors", max_shard_bytes=3)
    with refused(
        sw.StructureError,
        "With names a state is converted, and not PosixPath.",
        hint="sw.convert(state, 'folder', names=names); to read such files: sw.restore(path, target, names=names)",
    ):
        sw.convert(folder, tmp_path / "x", names=NAMES)


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
