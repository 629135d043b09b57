"""Adapters over a base: a LoRA kind saved alone, the rest from a checkpoint that the manifest names and checks."""

from __future__ import annotations

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from checkpoint_models import contents
from disagreeing import ONES, TIE, check_refused, keep, nothing_read
from refusals import refused
from strategies import Node

DIFFERENT = "save these kinds too: only=('lora', 'params', 'stats'); or a new base first: sw.save(base, state)"
ELSEWHERE = "say where it is now: sw.restore(path, target, base=...)"
ANOTHER = "say where that one is: sw.restore(path, target, base=...)"


def model(fill: float = 1.0) -> Node:
    return Node(
        kernel=nnx.Param(fill * ONES), lora=nnx.LoRAParam(fill * jnp.ones(2)), mean=nnx.BatchStat(fill * jnp.ones(3))
    )


def state_with(base: float, lora: float) -> sw.State:
    thing = model(base)
    thing.lora.set_value(lora * jnp.ones(2))
    return sw.plan(thing).take(thing)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a base, and an adapter over it."""
    sw.save(tmp_path / "base", state_with(1, 0))
    sw.save(tmp_path / "adapter", state_with(1, 7), only="lora", base=tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("abstract", [False, True])
def test_an_adapter_and_its_base_come_back_together(saved: pathlib.Path, abstract: bool) -> None:
    assert [kind for kind in sw.inspect(saved / "adapter") if sw.inspect(saved / "adapter")[kind].leaves] == ["lora"]
    target = state_with(5, 5)
    state, report = sw.restore(saved / "adapter", target.plan.abstract() if abstract else target)
    assert contents(state) == contents(state_with(1, 7))
    assert [(one.leaf.path, one.outcome, one.why) for one in report.leaves] == [
        (("kernel",), "restored", "from the base"),
        (("lora",), "restored", ""),
        (("mean",), "restored", "from the base"),
    ]
    assert report == sw.preview(saved / "adapter", target)


def test_a_cast_of_the_base_says_where_it_is_from(saved: pathlib.Path) -> None:
    target = state_with(5, 5).cast(params="bfloat16")
    state, report = sw.restore(saved / "adapter", target, cast=True)
    assert [(one.outcome, one.why) for one in report["params"]] == [("cast", "from float32 to bfloat16, from the base")]
    assert np.array_equal(state["params"]["kernel"], ONES.astype("bfloat16"))


def test_the_adapter_alone_is_read_where_only_it_is_asked_for(saved: pathlib.Path) -> None:
    state, report = sw.restore(saved / "adapter", state_with(5, 5), only="lora")
    assert contents(state) == contents(state_with(5, 7))
    assert report.counts == {"params": {"kept": 1}, "lora": {"restored": 1}, "stats": {"kept": 1}}


def test_both_are_found_where_they_were_moved_together(saved: pathlib.Path) -> None:
    (saved / "there").mkdir()
    for name in ("base", "adapter"):
        shutil.move(saved / name, saved / "there" / name)
    assert contents(sw.restore(saved / "there" / "adapter", state_with(5, 5))[0]) == contents(state_with(1, 7))


def test_a_base_that_was_moved_is_asked_for(saved: pathlib.Path) -> None:
    shutil.move(saved / "base", saved / "elsewhere")
    for look in (sw.restore, sw.preview):
        with refused(
            sw.RestoreError,
            f"{saved}/adapter was saved over another checkpoint, which is not at {saved}/base.",
            hint=ELSEWHERE,
        ):
            look(saved / "adapter", state_with(5, 5))
        with refused(
            sw.RestoreError,
            f"{saved}/adapter was saved over another checkpoint, which is not at {saved}/nowhere.",
            hint=ELSEWHERE,
        ):
            look(saved / "adapter", state_with(5, 5), base=saved / "nowhere")
        with refused(sw.RestoreError, "int is not a path.", hint="sw.restore('run/step_100', target)"):
            look(saved / "adapter", state_with(5, 5), base=3)
    state, report = sw.restore(saved / "adapter", state_with(5, 5), base=os.fspath(saved / "elsewhere"))
    assert contents(state) == contents(state_with(1, 7))
    assert report == sw.preview(saved / "adapter", state_with(5, 5), base=saved / "elsewhere")


def test_another_checkpoint_in_its_place_is_not_believed(saved: pathlib.Path) -> None:
    shutil.rmtree(saved / "base")
    sw.save(saved / "base", state_with(2, 0))
    for look in (sw.restore, sw.preview):
        with refused(
            sw.RestoreError,
            f"{saved}/base is not the checkpoint that this one was saved over.",
            hint=ANOTHER,
        ):
            look(saved / "adapter", state_with(5, 5))


def test_a_base_where_there_is_none(saved: pathlib.Path) -> None:
    with refused(
        sw.RestoreError,
        f"{saved}/base was not saved over another checkpoint.",
        hint="leave base out; to save over one: sw.save(path, state, only=..., base=base)",
    ):
        sw.restore(saved / "base", state_with(5, 5), base=saved / "adapter")


def test_a_damaged_base_is_named(saved: pathlib.Path) -> None:
    target = state_with(5, 5)
    before = contents(target)
    manifest = saved / "base" / "statewise.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"kernel", b"kernal"))
    with refused(
        sw.CorruptedError, f"{manifest} is corrupted: its checksum does not match.", hint="restore another checkpoint"
    ):
        sw.restore(saved / "adapter", target)
    manifest.write_bytes(whole)
    (broken,) = [file for file in (saved / "base").iterdir() if file.name == "manifest.ocdbt"]
    broken.unlink()
    with pytest.raises(sw.CorruptedError) as caught:
        sw.restore(saved / "adapter", target)
    assert caught.value.message.startswith(f"{saved}/base is corrupted: manifest.ocdbt is missing")
    assert {leaf.path for leaf in caught.value.leaves} <= {("kernel",), ("mean",)}
    assert contents(target) == before


# --- saving over a base ------------------------------------------------------------------------------------------


def test_a_base_with_other_values_is_refused(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "base", state_with(1, 0))
    with refused(
        sw.StructureError,
        f"The base {tmp_path}/base does not have the values of this state: a restore would go back to older ones.",
        leaves=[
            "kernel: Param(2, 3) float32  kind=params  (has other values in the base)",
            "mean: BatchStat(3,) float32  kind=stats  (has other values in the base)",
        ],
        hint=DIFFERENT,
    ):
        sw.save(tmp_path / "adapter", state_with(1.5, 7), only="lora", base=tmp_path / "base")
    assert not (tmp_path / "adapter").exists()


def test_a_base_of_other_leaves_is_refused(tmp_path: pathlib.Path) -> None:
    other = Node(kernel=nnx.Param(jnp.ones((3, 2))))
    sw.save(tmp_path / "base", sw.plan(other).take(other))
    with refused(
        sw.StructureError,
        f"The base {tmp_path}/base does not have the values of this state: a restore would go back to older ones.",
        leaves=[
            "kernel: Param(2, 3) float32  kind=params  (is (3, 2) in the base)",
            "mean: BatchStat(3,) float32  kind=stats  (missing from the base)",
        ],
        hint=DIFFERENT,
    ):
        sw.save(tmp_path / "adapter", state_with(1, 7), only="lora", base=tmp_path / "base")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "base"]


# --- what an adapter leaves to its base, and what not ------------------------------------------------------------


def test_of_a_kind_that_the_adapter_has_nothing_is_taken_from_the_base(tmp_path: pathlib.Path) -> None:
    """The base has a LoRA leaf that the adapter's state had no more: it is missing, whatever the base says."""

    def made(*names: str) -> sw.State:
        thing = Node(kernel=nnx.Param(ONES), **{name: nnx.LoRAParam(jnp.ones(2)) for name in names})
        return sw.plan(thing).take(thing)

    sw.save(tmp_path / "base", made("one", "two"))
    sw.save(tmp_path / "adapter", made("one"), only="lora", base=tmp_path / "base")
    check_refused(
        tmp_path / "adapter",
        made("one"),
        made("one", "two"),
        "two: LoRAParam(2,) float32  kind=lora  (missing from the checkpoint)",
        hint=keep("lora"),
    )


def test_disagreements_with_the_base_are_listed_with_the_adapter_s(saved: pathlib.Path) -> None:
    thing = Node(
        kernel=nnx.Param(jnp.ones((2, 4))), lora=nnx.LoRAParam(jnp.ones(3)), mean=nnx.BatchStat(jnp.ones(3, "bfloat16"))
    )
    target = sw.plan(thing).take(thing)
    check_refused(
        saved / "adapter",
        target,
        target,
        "kernel: Param(2, 4) float32  kind=params  (is (2, 3) in the checkpoint)",
        "lora: LoRAParam(3,) float32  kind=lora  (is (2,) in the checkpoint)",
        "mean: BatchStat(3,) bfloat16  kind=stats  (is float32 in the checkpoint)",
        hint="build the model with the sizes that it was saved with\nsw.restore(path, target, cast=True)",
    )


def test_leaves_that_are_tied_in_the_base(tmp_path: pathlib.Path) -> None:
    def made(tie: bool) -> sw.State:
        shared = nnx.Param(ONES)
        thing = Node(a=shared, b=shared if tie else nnx.Param(ONES), lora=nnx.LoRAParam(jnp.ones(2)))
        return sw.plan(thing).take(thing)

    sw.save(tmp_path / "base", made(True))
    sw.save(tmp_path / "adapter", made(True), only="lora", base=tmp_path / "base")
    check_refused(
        tmp_path / "adapter",
        made(True),
        made(False),
        "a: Param(2, 3) float32  kind=params  (is tied to b in the checkpoint)",
        "b: Param(2, 3) float32  kind=params  (tied to a in the checkpoint)",
        hint=TIE,
    )


def test_an_adapter_of_a_base_of_another_layout(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "base", state_with(1, 0), layout="packed")
    sw.save(tmp_path / "adapter", state_with(1, 7), only="lora", base=tmp_path / "base")
    with nothing_read():
        assert sw.preview(tmp_path / "adapter", state_with(5, 5)).ok
    state, _ = sw.restore(tmp_path / "adapter", state_with(5, 5))
    assert jax.tree.all(jax.tree.map(np.array_equal, state, state_with(1, 7)))


def test_a_base_for_nothing_is_not_kept(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "base", state_with(1, 7))
    sw.save(tmp_path / "whole", state_with(1, 7), base=tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    assert sw.restore(tmp_path / "whole", state_with(0, 0))[1].ok


def test_a_base_that_is_not_there_is_refused_at_save(tmp_path: pathlib.Path) -> None:
    with refused(
        sw.RestoreError,
        f"There is nothing at {tmp_path / 'nowhere'}.",
        hint="sw.save(path, state) writes a checkpoint; look for it beside this path",
    ):
        sw.save(tmp_path / "adapter", state_with(1, 7), only="lora", base=tmp_path / "nowhere")
