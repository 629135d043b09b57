"""Conversions: which leaves are matched, kept, cast and left over, and how that is shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import nnx

import statewise as sw
from checkpoint_models import assert_identical, spread, train, trained
from foreign_models import Net, equal, linen, odd, state_of
from statewise._src.checkpoint.interop.convert import convert

# --- which leaves ----------------------------------------------------------------------------------------------


def test_what_weights_cannot_have_keeps_the_values_of_the_target(tmp_path: Path) -> None:
    state = trained()
    sw.save(tmp_path / "first", state, only=("params", "stats", "variables"))
    convert(tmp_path / "first", tmp_path / "weights.safetensors")
    other, _ = train(trained(1), jnp.ones((5, 3)))
    conversion = convert(tmp_path / "weights.safetensors", tmp_path / "back", target=other)
    assert {leaf.note for leaf in conversion.kept} == {"the source has no rng", "the source has no optimizer"}
    back, _ = sw.restore(tmp_path / "back", state)
    for kind in ("params", "stats", "variables"):
        assert equal(back[kind], state[kind])
    assert equal(back["optimizer"], other["optimizer"])


def test_a_kind_that_declares_it_keeps_the_values_of_the_target(tmp_path: Path) -> None:
    net = Net(nnx.Rngs(1))
    kinds = sw.Kinds.standard()
    target = kinds.replace(stats=dataclasses.replace(kinds["stats"], missing="keep")).plan(net).take(net)
    conversion = convert({"params": linen()["params"]}, tmp_path / "imported", target=target)
    assert [str(leaf) for leaf in conversion.kept] == [
        "norm/mean: BatchStat(3,) float32  kind=stats  (missing from the source)",
        "norm/var: BatchStat(3,) float32  kind=stats  (missing from the source)",
    ]


def test_an_ephemeral_kind_is_neither_asked_for_nor_written(tmp_path: Path) -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2)), seen=nnx.Cache(jnp.ones(3)))
    target = sw.plan(model).abstract()
    conversion = convert(
        {"params": {"w": jnp.zeros(2)}, "cache": {"seen": jnp.zeros(3)}}, tmp_path / "a", target=target
    )
    assert (len(conversion.matched), conversion.unexpected) == (1, ("cache/seen",))


def test_a_checkpoint_over_a_base_goes_over_whole(tmp_path: Path) -> None:
    model = nnx.Dict(inner=nnx.LoRALinear(2, 3, lora_rank=1, rngs=nnx.Rngs(0)))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "base", state)
    changed = state.replace(lora=jax.tree.map(lambda array: array + 1, state["lora"]))
    sw.save(tmp_path / "lora", changed, only="lora", base=tmp_path / "base")
    convert(tmp_path / "lora", tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "back", target=state.plan.abstract())
    assert_identical(sw.restore(tmp_path / "back", state)[0], changed)


def test_a_spent_target_has_nothing_to_keep(tmp_path: Path) -> None:
    state = trained()
    sw.save(tmp_path / "first", state, only=("params", "stats", "variables"))
    convert(tmp_path / "first", tmp_path / "weights.safetensors")
    train(state, jnp.ones((5, 3)))
    with pytest.raises(sw.StructureError, match="This state was donated"):
        convert(tmp_path / "weights.safetensors", tmp_path / "back", target=state)


def test_what_has_no_elements_is_said_not_to_be_stored(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", odd())
    for to, note in (("orbax", "has no elements, so that Orbax stores nothing"), ("safetensors", "")):
        told = convert(tmp_path / "first", tmp_path / to, to=to, dry_run=True)
        assert [leaf.note for name, leaf in told.matched if name == "empty"] == [note]


def test_a_state_on_a_mesh_goes_over_whole(tmp_path: Path, devices: list[jax.Device]) -> None:
    state = state_of()
    placed = spread(state, devices)
    sw.save(tmp_path / "first", placed)
    convert(tmp_path / "first", tmp_path / "net.safetensors")
    convert(tmp_path / "net.safetensors", tmp_path / "back", target=placed)
    assert_identical(sw.restore(tmp_path / "back", placed)[0], state)


def test_an_alias_in_the_source_will_do(tmp_path: Path) -> None:
    target = odd()
    sw.save(tmp_path / "first", target)
    convert(tmp_path / "first", tmp_path / "tied.safetensors", rename={"layers/0/kernel": "tied"})
    convert(tmp_path / "tied.safetensors", tmp_path / "back", target=target.plan.abstract())
    assert_identical(sw.restore(tmp_path / "back", target)[0], target)


def test_a_packed_target_will_do(tmp_path: Path) -> None:
    net = Net(nnx.Rngs(1))
    packed = sw.plan(net).take(net, pack=True)
    half = {"params": linen()["params"]}
    kinds = sw.Kinds.standard()
    kept = kinds.replace(stats=dataclasses.replace(kinds["stats"], missing="keep")).plan(net).take(net, pack=True)
    convert(half, tmp_path / "imported", target=kept)
    restored, _ = sw.restore(tmp_path / "imported", packed)
    assert np.array_equal(restored["params"]["dense"]["kernel"], half["params"]["dense"]["kernel"])
    convert(linen(), tmp_path / "abstract", target=packed.plan.abstract())
    assert sw.preview(tmp_path / "abstract", packed).ok


def test_cast_changes_dtypes_and_tells(tmp_path: Path) -> None:
    net = Net(nnx.Rngs(1))
    target = sw.plan(net).take(net).cast(params="bfloat16")
    conversion = convert(linen(), tmp_path / "half.safetensors", target=target, cast=True)
    notes = {leaf.note for name, leaf in conversion.matched if name.startswith("params")}
    assert notes == {"from float32 to bfloat16"}
    read = safetensors.flax.load_file(tmp_path / "half.safetensors")
    assert np.array_equal(read["out.kernel"], linen()["params"]["out"]["kernel"].astype(jnp.bfloat16))


def test_renames_go_into_what_is_written(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", state_of())
    rename = {"dense/kernel": "fc/weight", "dense/bias": None}
    conversion = convert(tmp_path / "first", tmp_path / "net.safetensors", rename=rename)
    assert conversion.unexpected == ("dense/bias",)
    names = set(safetensors.numpy.load_file(tmp_path / "net.safetensors"))
    assert "fc.weight" in names
    assert not any(name.startswith("dense") for name in names)


# --- the dry run, and what it shows ----------------------------------------------------------------------------


def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", state_of())
    for name, options in (("net.safetensors", {}), ("plain", {"to": "orbax"}), ("back", {"target": state_of()})):
        told = convert(tmp_path / "first", tmp_path / name, dry_run=True, **options)
        assert not (tmp_path / name).exists()
        assert told == convert(tmp_path / "first", tmp_path / name, **options)


def test_a_dry_run_reads_no_array(tmp_path: Path) -> None:
    target = state_of().plan.abstract()
    shapes = jax.eval_shape(linen)
    assert convert(shapes, tmp_path / "imported", target=target, dry_run=True).ok


def test_a_dry_run_raises_for_no_disagreement(tmp_path: Path) -> None:
    told = convert({"params": {"dense": {"kernel": jnp.ones((2, 9))}}}, tmp_path / "a", target=state_of(), dry_run=True)
    assert (told.ok, len(told.missing), len(told.problems)) == (False, 7, 1)


def test_a_conversion_is_shown_as_text_html_and_json(tmp_path: Path) -> None:
    variables = {"params": {"kernel": jnp.ones((2, 3)), "more": jnp.ones(1)}}
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    told = convert(variables, "out", target=sw.plan(model).take(model), dry_run=True)
    lines = str(told).splitlines()
    assert lines[0] == f"the mapping to {Path('out').absolute()} (statewise)"
    assert lines[1].split() == ["source", "path", "kind", "shape", "dtype", "outcome", "why"]
    assert [line.split() for line in lines[3:]] == [
        ["params/kernel", "kernel", "params", "(2,", "3)", "float32", "matched", "-"],
        ["-", "bias", "params", "(3,)", "float32", "missing", "missing", "from", "the", "source"],
        ["params/more", "-", "-", "-", "-", "unexpected", "-"],
    ]
    assert "<td" in told._repr_html_()
    assert told.__rich__() is not None
    data = json.loads(told.to_json())
    assert (data["ok"], data["unexpected"], data["missing"][0]["path"]) == (False, ["params/more"], "bias")
    assert data["matched"][0] | {"type": None} == {
        "source": "params/kernel",
        "path": "kernel",
        "kind": "params",
        "type": None,
        "shape": [2, 3],
        "dtype": "float32",
        "aliases": [],
        "size": 6,
        "nbytes": 24,
    }


def test_the_target_stays_as_it_is(tmp_path: Path) -> None:
    target, same = state_of(), state_of()
    convert(linen(), tmp_path / "imported", target=target)
    assert_identical(target, same)
