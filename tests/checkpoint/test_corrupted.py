"""Damage on disk: whatever file it is in, it is found before a wrong value comes back, and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from damaging import files, plan, state, words
from refusals import refused
from statewise._src.checkpoint.format import files as on_disk
from strategies import Node

LAYOUTS = ("named", "packed")
OFFSETS = 40
AGAIN = "restore another checkpoint"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each layout; tests damage copies, or put back what they change."""
    folder = tmp_path_factory.mktemp("whole")
    for layout in LAYOUTS:
        sw.save(folder / layout, state(), layout=layout)
    return folder


def flipped(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def some_offsets(size: int, seed: str) -> list[tuple[int, int]]:
    """Offsets with a bit each, the first and the last byte among them."""
    dice = random.Random(seed)
    inner = dice.sample(range(size), min(size, OFFSETS))
    return [(offset, dice.randrange(8)) for offset in sorted({0, size - 1, *inner})]


# --- small files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_in_any_file_is_found_and_the_file_is_named(layout: str, whole: Path) -> None:
    folder = whole / layout
    target = state(7)
    before = words(target)
    for name in files(folder):
        path = folder / name
        data = path.read_bytes()
        for offset, bit in some_offsets(len(data), name):
            flipped(path, offset, bit)
            with pytest.raises(sw.CorruptedError) as caught:
                sw.restore(folder, target, only="stats")
            assert name in caught.value.message, (name, offset, bit)
            path.write_bytes(data)
    assert words(target) == before
    assert words(sw.restore(folder, target)[0]) == words(state())


HARM: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("harm", HARM)
def test_a_file_that_is_no_longer_whole_is_named(layout: str, harm: str, whole: Path, tmp_path: Path) -> None:
    target = state(7)
    before = words(target)
    for number, name in enumerate(files(whole / layout)):
        folder = tmp_path / str(number)
        shutil.copytree(whole / layout, folder)
        HARM[harm](folder / name)
        with pytest.raises(sw.CorruptedError) as caught:
            sw.restore(folder, target)
        assert name in caught.value.message
    assert words(target) == before


def test_the_error_for_a_flipped_bit_names_the_file_and_says_what_to_do(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "packed", folder)
    flipped(folder / "_METADATA", 5, 0)
    (folder / "manifest.ocdbt").unlink()
    message = f"{folder} is corrupted: _METADATA is not what was written; manifest.ocdbt is missing."
    leaves = [
        "layers/1/mean: BatchStat(2,) float32  kind=stats  (cannot be read)",
        "layers/1/var: BatchStat(2,) float32  kind=stats  (cannot be read)",
    ]
    with refused(sw.CorruptedError, message, leaves=leaves, hint=AGAIN):
        sw.restore(folder, state(), only="stats")


def test_leaves_that_a_damaged_file_does_not_concern_are_not_named(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "named", folder)
    flipped(folder / "_sharding", 5, 0)
    with refused(sw.CorruptedError, f"{folder} is corrupted: _sharding is not what was written.", hint=AGAIN):
        sw.restore(folder, state())


def test_a_manifest_that_is_damaged_is_named_and_said_to_be(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "named", folder)
    flipped(folder / "statewise.json", 1000, 0)
    message = f"{folder / 'statewise.json'} is corrupted: its checksum does not match."
    for reading in (sw.inspect, lambda path: sw.preview(path, state()), lambda path: sw.restore(path, state())):
        with refused(sw.CorruptedError, message, hint=AGAIN):
            reading(folder)


def test_a_folder_without_a_manifest_is_none_of_ours(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole / "named", folder)
    (folder / "statewise.json").unlink()
    with pytest.raises(sw.CorruptedError, match=r"has no statewise\.json"):
        sw.restore(folder, state())


def test_damage_of_the_base_is_found_through_the_adapter(tmp_path: Path) -> None:
    sw.save(tmp_path / "base", state())
    sw.save(tmp_path / "adapter", state(), only="stats", base=tmp_path / "base")
    assert words(sw.restore(tmp_path / "adapter", state(7))[0]) == words(state())
    name = next(name for name in files(tmp_path / "base") if name.startswith("d/"))
    flipped(tmp_path / "base" / name, 30, 0)
    with pytest.raises(sw.CorruptedError) as caught:
        sw.restore(tmp_path / "adapter", state(7))
    assert f"{tmp_path / 'base'} is corrupted: {name}" in caught.value.message


# --- files too large for a checksum of their own -------------------------------------------------------------------


def large() -> Node:
    return Node(
        dense=nnx.Linear(32, 48, rngs=nnx.Rngs(0)),
        half=nnx.Param(jax.random.normal(jax.random.key(0), (900,)).astype(jnp.bfloat16)),
        counts=nnx.Variable(jnp.arange(700)),
        zeros=nnx.Cache(jnp.zeros(2000)),
    )


KINDS = sw.Kinds(rest=sw.Kind(...))


def outside_of_arrays(facts: dict[str, Any], offset: int) -> bool:
    """Whether a byte of a large file is one of those that have a SHA-256."""
    return any(start <= offset < start + length for start, length in facts.get("parts", [[0, facts["bytes"]]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_in_a_large_file_names_the_leaf_or_the_file(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "SMALL_FILE", 1500)
    target = KINDS.plan(large()).take(large())
    folder = tmp_path / layout
    sw.save(folder, target, layout=layout)
    facts = json.loads((folder / "statewise.json").read_text())["content"]["files"]
    named = set()
    for name in files(folder):
        path, data = folder / name, (folder / name).read_bytes()
        if len(data) <= 1500 or name == "statewise.json":
            continue
        inside = some_offsets(len(data), path.parent.name)
        behind = [
            (start + offset, bit)
            for start, length in facts[name].get("parts", [])
            for offset, bit in some_offsets(length, name)
        ]
        for offset, bit in [*inside, *behind]:
            flipped(path, offset, bit)
            with pytest.raises(sw.CorruptedError) as caught:
                sw.restore(folder, target)
            leaves = caught.value.leaves
            # Behind the arrays is TensorStore's index, which is no leaf's, and without which none can be read.
            of_index = f"{name} is not what was written" in caught.value.message
            assert of_index or len(leaves) == 1, (name, offset, bit)
            assert of_index == outside_of_arrays(facts[name], offset)
            named |= set() if of_index else {leaf.path for leaf in leaves}
            path.write_bytes(data)
    assert {("dense", "kernel"), ("counts",), ("zeros",)} <= named
    assert any("parts" in fact for fact in facts.values())
    assert words(sw.restore(folder, target)[0]) == words(target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_file_that_is_shorter_or_missing_names_file_and_leaves(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "SMALL_FILE", 1500)
    target = KINDS.plan(large()).take(large())
    folder = tmp_path / layout
    sw.save(folder, target, layout=layout)
    sizes = {name: (folder / name).stat().st_size for name in files(folder) if name != "statewise.json"}
    largest = max(sizes, key=lambda name: sizes[name])
    data = (folder / largest).read_bytes()
    for kept in (data[:100], data[: len(data) // 2], b"", None):
        (folder / largest).unlink()
        if kept is not None:
            (folder / largest).write_bytes(kept)
        wrong = "is missing" if kept is None else f"has {len(kept)} bytes, not {len(data)}"
        with pytest.raises(sw.CorruptedError) as caught:
            sw.restore(folder, target)
        assert caught.value.message == f"{folder} is corrupted: {largest} {wrong}."
        assert {leaf.note for leaf in caught.value.leaves} == {"cannot be read"}
        assert caught.value.leaves
        (folder / largest).write_bytes(data)
    assert words(sw.restore(folder, target)[0]) == words(target)


def test_a_sound_checkpoint_has_no_damage(whole: Path) -> None:
    for layout in LAYOUTS:
        assert words(sw.restore(whole / layout, plan().abstract())[0]) == words(state())
