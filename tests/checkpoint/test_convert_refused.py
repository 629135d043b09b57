"""Conversions that are refused: in full, in words, before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import statewise as sw
from foreign_models import linen, state_of
from refusals import refused
from statewise._src.checkpoint.interop.convert import convert
from statewise._src.checkpoint.orbax import flush as flushing

RENAME = "rename={'name in the source': 'path/of/the/leaf'}; what the source has is in the conversion's unexpected"
APART = "give them names that differ: rename={'name in the source': 'another/path'}"


def taken(**values: Any) -> sw.State:
    """A state of Variables with these values."""
    model = {name: value if isinstance(value, nnx.Variable) else nnx.Param(value) for name, value in values.items()}
    return sw.plan(model).take(model)


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- leaves that do not fit ------------------------------------------------------------------------------------


def test_all_that_is_in_the_way_is_one_error(tmp_path: Path) -> None:
    target = taken(w=jnp.ones((2, 3)), half=jnp.ones(2), gone=jnp.ones(2), key=nnx.Variable(jax.random.key(0)))
    given = {"w": jnp.ones((2, 4)), "half": jnp.ones(2, jnp.float16), "key": jax.random.key(0, impl="rbg")}
    with refused(
        sw.RestoreError,
        f"the mapping does not become {tmp_path / 'out'} (statewise): 4 leaves are in the way. "
        "Nothing was read or written.",
        leaves=[
            "gone: Param(2,) float32  kind=params  (missing from the source)",
            "half: Param(2,) float32  kind=params  (is float16 in the source)",
            "key: Variable() key<fry>  kind=variables  (is key<rbg> in the source)",
            "w: Param(2, 3) float32  kind=params  (is (2, 4) in the source)",
        ],
        hint=f"{RENAME}\n"
        "or, to keep the target's values: kinds.replace(params=dataclasses.replace(kinds['params'], missing='keep'))\n"
        "sw.convert(src, dst, ..., cast=True)\n"
        "make the key with jax.random.key(seed, impl='rbg')\n"
        "build the model with the sizes of the source, or rename another to it",
    ):
        convert(given, tmp_path / "out", target=target)
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "wanted", "note"),
    [
        (jnp.ones(2), jnp.ones(2, jnp.int32), "is float32 in the source, which does not become int32"),
        (jnp.ones(2, bool), jnp.ones(2), "is bool in the source, which does not become float32"),
        (jnp.ones(2, jnp.complex64), jnp.ones(2), "is complex64 in the source, which does not become float32"),
    ],
)
def test_a_cast_never_makes_other_numbers(tmp_path: Path, given: Any, wanted: Any, note: str) -> None:
    with refused(
        sw.RestoreError,
        f"the mapping does not become {tmp_path / 'out'} (statewise): 1 leaf is in the way. "
        "Nothing was read or written.",
        leaves=[f"w: Param(2,) {wanted.dtype}  kind=params  ({note})"],
        hint="plan the model with the dtype of the source",
    ):
        convert({"w": given}, tmp_path / "out", target=taken(w=wanted), cast=True)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.array([1, 1 << 40]), jnp.int32),
        (np.array([-1], np.int32), jnp.uint8),
        (np.array([1e300]), jnp.float32),
        (np.array([1e38], np.float32), jnp.float16),
        (np.array([1e6], np.float32), jnp.float8_e4m3fn),
    ],
)
def test_a_cast_never_loses_a_number(tmp_path: Path, given: Any, wanted: Any) -> None:
    dtype = jnp.dtype(wanted).name
    with refused(
        sw.RestoreError,
        f"the mapping does not become {tmp_path / 'out'} (statewise). "
        "Casting would lose numbers: 1 leaf has some that the new dtype cannot represent. Nothing was written.",
        leaves=[
            f"w: Param({len(given)},) {dtype}  kind=params  ({given.dtype} numbers, one of magnitude "
            f"{float(abs(given).max()):.3g}, that {dtype} cannot represent)"
        ],
        kind="params",
        hint="plan the model with the dtype of the source",
    ):
        convert({"w": given}, tmp_path / "out", target=taken(w=jnp.zeros(len(given), wanted)), cast=True)
    assert listed(tmp_path) == []


def test_rounding_and_infinities_are_no_loss(tmp_path: Path) -> None:
    given = np.array([0.1, np.inf, np.nan, 1e-300])
    convert({"w": given}, tmp_path / "out", target=taken(w=jnp.zeros(4)), cast=True)
    read, _ = sw.restore(tmp_path / "out", taken(w=jnp.zeros(4)))
    assert np.array_equal(read["params"]["w"], given.astype(np.float32), equal_nan=True)


def test_a_leaf_in_another_collection_is_missing_and_said_to_be_there(tmp_path: Path) -> None:
    variables = linen()
    variables["params"]["norm"] |= variables.pop("batch_stats")["norm"]
    with pytest.raises(sw.RestoreError) as caught:
        convert(variables, tmp_path / "out", target=state_of())
    assert [str(leaf) for leaf in caught.value.leaves] == [
        f"norm/{name}: BatchStat(3,) float32  kind=stats  "
        f"(missing from the source, where params/norm/{name} is of another type)"
        for name in ("mean", "var")
    ]


def test_an_abstract_target_has_nothing_to_keep(tmp_path: Path) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), rngs=nnx.Rngs(0))
    with refused(
        sw.RestoreError,
        f"the mapping does not become {tmp_path / 'out'} (statewise): 2 leaves are in the way. "
        "Nothing was read or written.",
        leaves=[
            "rngs/default/count: RngCount() uint32  kind=rng  (the source has no rng)",
            "rngs/default/key: RngKey() key<fry>  kind=rng  (the source has no rng)",
        ],
        hint="a target with values, which are kept: target=plan.take(model)",
    ):
        convert({"w": jnp.ones(2)}, tmp_path / "out", target=sw.plan(model).abstract())


def test_a_key_of_a_checkpoint_of_statewise_stays_a_key(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", taken(w=nnx.Variable(jnp.ones(2, jnp.uint32))))
    with pytest.raises(sw.RestoreError) as caught:
        convert(tmp_path / "first", tmp_path / "out", target=taken(w=nnx.Variable(jax.random.key(0))))
    assert [leaf.note for leaf in caught.value.leaves] == ["is uint32 in the source"]


# --- what a format cannot hold ---------------------------------------------------------------------------------


def saved(folder: Path, state: sw.State) -> Path:
    sw.save(folder / "first", state)
    return folder / "first"


def test_dtypes_that_safetensors_lacks_are_listed(tmp_path: Path) -> None:
    source = saved(tmp_path, taken(a=jnp.ones(2, jnp.int4), b=jnp.ones(2), c=jnp.ones(1, jnp.float8_e4m3b11fnuz)))
    with refused(
        sw.RestoreError,
        f"{source} does not become {tmp_path / 'a.safetensors'} (safetensors): 2 leaves are in the way. "
        "Nothing was read or written.",
        leaves=[
            "a: Param(2,) int4  kind=params  (safetensors has no int4)",
            "c: Param(1,) float8_e4m3b11fnuz  kind=params  (safetensors has no float8_e4m3b11fnuz)",
        ],
        hint="state.cast(...) to a dtype that it has, or leave it out: rename={'a': None}\n"
        "state.cast(...) to a dtype that it has, or leave it out: rename={'c': None}",
    ):
        convert(source, tmp_path / "a.safetensors")
    assert listed(tmp_path) == ["first"]


def test_dtypes_that_orbax_lacks_are_listed(tmp_path: Path) -> None:
    source = saved(tmp_path, taken(a=jnp.ones(2, jnp.int4), c=jnp.ones(1, jnp.float8_e4m3b11fnuz)))
    with pytest.raises(sw.RestoreError) as caught:
        convert(source, tmp_path / "plain", to="orbax")
    assert [leaf.note for leaf in caught.value.leaves] == ["Orbax has no float8_e4m3b11fnuz"]


def test_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    model = {"a": nnx.Dict(b=nnx.Param(jnp.ones(1))), "a.b": nnx.Param(jnp.ones(2))}
    source = saved(tmp_path, sw.plan(model).take(model))
    with refused(
        sw.RestoreError,
        f"{source} does not become {tmp_path / 'a.safetensors'} (safetensors): 1 leaf is in the way. "
        "Nothing was read or written.",
        leaves=["a.b: Param(2,) float32  kind=params  (would have the same name as a/b)"],
        hint=APART,
    ):
        convert(source, tmp_path / "a.safetensors")
    with pytest.raises(sw.RestoreError) as caught:
        convert(source, tmp_path / "plain", to="linen")
    assert [leaf.note for leaf in caught.value.leaves] == ["would have the same name as a/b"]
    convert(source, tmp_path / "a.safetensors", rename={"a.b": "a_b"})
    assert sorted(safetensors.numpy.load_file(tmp_path / "a.safetensors")) == ["a.b", "a_b"]


def test_a_name_of_the_source_becomes_one_leaf_only(tmp_path: Path) -> None:
    model = {"a": nnx.Dict(b=nnx.Param(jnp.ones(1))), "a.b": nnx.Param(jnp.ones(1))}
    safetensors.numpy.save_file({"a.b": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(sw.RestoreError) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "out", target=sw.plan(model).take(model))
    assert [leaf.note for leaf in caught.value.leaves] == ["its name in the source is also that of a/b"]
    assert caught.value.hint == RENAME


def test_two_names_of_the_source_for_one_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sw.RestoreError) as caught:
        convert({"v": jnp.ones(1), "w": jnp.ones(1)}, tmp_path / "out", target=taken(w=jnp.ones(1)), rename={"v": "w"})
    assert [str(leaf) for leaf in caught.value.leaves] == ["w: Array(1,) float32  (has the same path as v)"]


def test_keys_that_only_look_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sw.RestoreError) as caught:
        convert({"w": {0: jnp.ones(1), "0": jnp.zeros(1)}}, tmp_path / "plain", to="orbax")
    assert [leaf.note for leaf in caught.value.leaves] == ["has the same name as another in the source"]
    assert caught.value.hint == (
        "keys that only look alike (0 and '0') cannot be distinguished in another format: change one of them"
    )


def test_a_leaf_where_others_hang_below_is_refused(tmp_path: Path) -> None:
    rename = {"w": "v/part/whole", "v/part": "v/part"}
    with pytest.raises(sw.RestoreError) as caught:
        convert({"w": jnp.ones(1), "v": {"part": jnp.ones(1)}}, tmp_path / "plain", to="orbax", rename=rename)
    assert [leaf.note for leaf in caught.value.leaves] == ["would be a parent of v/part/whole"]
    assert caught.value.hint == APART


def test_the_name_that_safetensors_keeps_for_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sw.RestoreError) as caught:
        convert({"__metadata__": jnp.ones(1)}, tmp_path / "a.safetensors")
    assert [leaf.note for leaf in caught.value.leaves] == ["has a name that safetensors reserves"]


def test_an_array_outside_of_variables_has_no_collection(tmp_path: Path) -> None:
    model = nnx.Dict(raw=nnx.data(jnp.ones(2)), w=nnx.Param(jnp.ones(2)))
    source = saved(tmp_path, sw.plan(model).take(model))
    with refused(
        sw.RestoreError,
        f"{source} does not become variables (linen): 1 leaf is in the way. Nothing was read or written.",
        leaves=["raw: Array(2,) float32  kind=variables  (is not a Variable, so that it is not in a Linen collection)"],
        hint="hold it in an nnx.Variable, or leave it out: rename={'raw': None}",
    ):
        convert(source, None, to="linen")
    assert list(convert(source, None, to="linen", rename={"raw": None}).tree) == ["params"]


def test_without_types_there_are_no_collections(tmp_path: Path) -> None:
    with pytest.raises(sw.RestoreError) as caught:
        convert({"w": jnp.ones(1), "layer": {"v": jnp.ones(1)}}, None, to="linen")
    assert [leaf.note for leaf in caught.value.leaves] == ["is not in a collection that NNX knows"] * 2
    assert caught.value.hint == (
        "say which type each leaf has: sw.convert(src, dst, to='linen', target=plan.abstract()); "
        "or register the collection: nnx.register_variable_name(name, Type)"
    )


# --- what goes wrong on the way --------------------------------------------------------------------------------


def test_a_damaged_checkpoint_writes_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path, taken(w=jnp.ones(100)))
    for file in source.rglob("d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(sw.CorruptedError, match="is corrupted"):
        convert(source, tmp_path / "a.safetensors")
    assert listed(tmp_path) == ["first"]


def fails_in_orbax(patch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device [more words]")

    patch.setattr("orbax.checkpoint.Checkpointer.save", fail)


def fails_in_safetensors(patch: pytest.MonkeyPatch) -> None:
    def fail(arrays: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr("safetensors.numpy.save_file", fail)


@pytest.mark.parametrize(
    ("fail", "name", "reason"),
    [
        (fails_in_orbax, "plain", "No space left on device"),
        (fails_in_safetensors, "a.safetensors", "No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[Any], None], name: str, reason: str
) -> None:
    fail(monkeypatch)
    with refused(
        sw.SaveError,
        f"{tmp_path / name} could not be written: {reason}. Nothing of it is left.",
        hint="free some space, or choose a directory that can be written to",
    ):
        convert({"w": jnp.ones(1)}, tmp_path / name, to="safetensors" if "." in name else "orbax")
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", ["plain", "a.safetensors"])
@pytest.mark.parametrize("late", [False, True])
def test_of_two_writers_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, late: bool) -> None:
    final = tmp_path / name

    def other_writes(*args: Any) -> None:
        final.write_text("of another")

    monkeypatch.setattr(flushing, "flush", other_writes)
    if late and name == "a.safetensors":  # between the last look and the writing
        monkeypatch.setattr(flushing, "flush", lambda place: None)
        monkeypatch.setattr(os, "link", lambda place, path: (other_writes(), os.stat(place), os.symlink(place, path)))
    with refused(
        sw.SaveError,
        f"Another writer has written {final} at the same time. That one is complete; this one was dropped.",
        hint="another path for each writer",
    ):
        convert({"w": jnp.ones(1)}, final, to="safetensors" if "." in name else "orbax")
    assert final.read_text() == "of another"
    assert listed(tmp_path) == [name]


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(place: Path, path: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    convert({"w": jnp.ones(1)}, tmp_path / "a.safetensors")
    assert listed(tmp_path) == ["a.safetensors"]


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.safetensors"
    with refused(
        sw.SaveError,
        f"{path} could not be written: Not a directory. Nothing of it is left.",
        hint="free some space, or choose a directory that can be written to",
    ):
        convert({"w": jnp.ones(1)}, path)
