"""Checkpoints in object stores: everything that can be done with one on a disk, on gs:// and on s3://."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx

import statewise as sw
from checkpoint_models import as_plain_tree, assert_identical, bits, contents, mixed, spread, taken, trained
from refusals import refused
from statewise._src.checkpoint import store_commit
from statewise._src.checkpoint.orbax import progress
from statewise._src.checkpoint.orbax.stores import StorePath, listing, remove
from statewise.cli import main
from stored_objects import WHOLE, objects, small, value
from strategies import Node

TAKEN = "another path, or sw.Checkpoints(directory), which keeps a checkpoint for each step"


# --- back and forth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["named", "packed"])
def test_a_state_comes_back_to_the_bit(stores: str, layout: str) -> None:
    state = mixed()
    sw.save(f"{stores}/run/1", state, layout=layout)
    assert objects(f"{stores}/run/1") | {"_sharding"} == WHOLE
    assert_identical(sw.restore(f"{stores}/run/1", state.plan.abstract())[0], state)
    assert sw.preview(f"{stores}/run/1", state).ok
    assert sw.inspect(f"{stores}/run/1").total.leaves == len(state.plan.leaves)


def test_a_trained_state_on_a_mesh(stores: str, devices: list[jax.Device]) -> None:
    state = spread(trained(), devices)
    sw.save(f"{stores}/run", state)
    back, _ = sw.restore(f"{stores}/run", state)
    assert_identical(back, state)
    assert [array.sharding for array in jax.tree.leaves(back)] == [array.sharding for array in jax.tree.leaves(state)]
    assert_identical(sw.restore(f"{stores}/run", trained())[0], trained())


def test_large_arrays_are_in_files_of_which_only_the_rest_is_hashed(stores: str) -> None:
    state = taken({"large": jnp.arange(1 << 19, dtype=jnp.float32), "small": jnp.ones(3)})
    sw.save(f"{stores}/run", state)
    manifest = json.loads((StorePath(f"{stores}/run") / "statewise.json").read_bytes())
    files = [facts for name, facts in manifest["content"]["files"].items() if "/d/" in name]
    assert max(facts["bytes"] for facts in files) >= 1 << 21
    assert any("parts" in facts for facts in files)
    assert_identical(sw.restore(f"{stores}/run", state)[0], state)


def test_a_state_without_arrays(stores: str) -> None:
    state = taken({"a": jnp.zeros((0, 3))})
    sw.save(f"{stores}/run", state)
    assert objects(f"{stores}/run") == {"statewise.json"}
    assert sw.restore(f"{stores}/run", state)[1].ok


def test_an_adapter_over_a_base_beside_it_elsewhere_and_on_a_disk(stores: str, tmp_path: pathlib.Path) -> None:
    model = Node(kernel=nnx.Param(jnp.ones(3)), lora=nnx.LoRAParam(jnp.full(2, 7.0)))
    state = sw.plan(model).take(model)
    bases = [f"{stores}/runs/base", f"{stores}/base", tmp_path / "base"]
    for number, base in enumerate(bases):
        sw.save(base, state)
        sw.save(f"{stores}/runs/adapter{number}", state, only="lora", base=base)
        back, report = sw.restore(f"{stores}/runs/adapter{number}", state.plan.abstract())
        assert contents(back) == contents(state)
        assert [leaf.why for leaf in report.leaves] == ["from the base", ""]
    sw.save(tmp_path / "adapter", state, only="lora", base=bases[0])
    assert contents(sw.restore(tmp_path / "adapter", state)[0]) == contents(state)
    for name in listing(StorePath(bases[0])):
        (StorePath(bases[0]) / name).unlink()
    with refused(
        sw.RestoreError,
        f"{stores}/runs/adapter0 was saved over another checkpoint, which is not at {bases[0]}.",
        hint="say where it is now: sw.restore(path, target, base=...)",
    ):
        sw.restore(f"{stores}/runs/adapter0", state)


def test_conversions_to_and_from_a_store(stores: str, tmp_path: pathlib.Path) -> None:
    state = taken({"a": jnp.arange(3.0)})
    safetensors.numpy.save_file({"leaves.a": np.arange(3.0, dtype=np.float32)}, tmp_path / "theirs.safetensors")
    assert sw.convert(tmp_path / "theirs.safetensors", f"{stores}/ours", target=state).ok
    assert contents(sw.restore(f"{stores}/ours", state)[0]) == contents(state)
    sw.convert(f"{stores}/ours", tmp_path / "back.safetensors")
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "back.safetensors")["leaves.a"], np.arange(3.0)
    )
    with refused(sw.SaveError, f"There is already something at {stores}/ours, and nothing is overwritten.", hint=TAKEN):
        sw.convert(tmp_path / "theirs.safetensors", f"{stores}/ours", target=state, dry_run=True)


def test_differences_and_the_command_line(stores: str, tmp_path: pathlib.Path) -> None:
    sw.save(f"{stores}/one", small(1))
    sw.save(f"{stores}/other", small(2))
    assert not sw.diff(f"{stores}/one", small(1))
    assert sw.diff(f"{stores}/one", f"{stores}/other")
    assert main(["inspect", f"{stores}/one"]) == 0
    assert main(["diff", f"{stores}/one", f"{stores}/other"]) == 1
    assert main(["convert", f"{stores}/one", str(tmp_path / "one.safetensors")]) == 0
    assert (tmp_path / "one.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    ["a#b/c%20?d", "[x]*", "with a space/ü", "double//slash/", "a/./b", "a+b&c=d;e,f:g@h!i'j(k)~", "back\\slash"],
)
def test_a_name_is_itself(stores: str, name: str) -> None:
    sw.save(f"{stores}/{name}", small())
    assert value(sw.restore(f"{stores}/{name}", small(0))[0]) == 1


def test_paths_as_objects_and_a_bucket_alone(stores: str) -> None:
    sw.save(epath.Path(stores) / "run", small())
    assert value(sw.restore(epath.Path(stores) / "run", small(0))[0]) == 1
    remove(StorePath(stores), listing(StorePath(stores)))
    sw.save(stores, small(2))
    assert value(sw.restore(f"{stores}/", small(0))[0]) == 2


def test_a_neighbour_whose_name_begins_alike_is_another_one(stores: str) -> None:
    sw.save(f"{stores}/run/10", small(10))
    sw.save(f"{stores}/run/1", small(1))
    assert value(sw.restore(f"{stores}/run/1", small(0))[0]) == 1
    assert value(sw.restore(f"{stores}/run/10", small(0))[0]) == 10
    with refused(
        sw.RestoreError,
        f"There is nothing at {stores}/run/100.",
        hint="sw.save(path, state) writes a checkpoint; look for it beside this path, and whether there is a bucket of "
        "this name",
    ):
        sw.restore(f"{stores}/run/100", small())


def test_a_large_save_shows_how_much_is_written(
    stores: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LARGE", 1)
    monkeypatch.setattr(progress, "LINE", 0.0)
    with caplog.at_level("INFO", "statewise"):
        sw.save(f"{stores}/run", small())
    assert "writing run: 0 of 0 MB" in caplog.text


# --- plain Orbax -----------------------------------------------------------------------------------------------


def test_orbax_reads_it_from_gs(gcs: str) -> None:
    state = mixed()
    sw.save(f"{gcs}/run", state)
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(epath.Path(f"{gcs}/run"))
    assert jax.tree.map(bits, read) == jax.tree.map(bits, as_plain_tree(state))


def test_orbax_and_we_read_it_once_copied_to_a_disk(stores: str, tmp_path: pathlib.Path) -> None:
    state = mixed()
    sw.save(f"{stores}/run", state)
    for name in listing(StorePath(f"{stores}/run")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((StorePath(f"{stores}/run") / name).read_bytes())
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path)
    assert jax.tree.map(bits, read) == jax.tree.map(bits, as_plain_tree(state))
    assert_identical(sw.restore(tmp_path, state)[0], state)


def test_a_plain_orbax_checkpoint_in_a_store(gcs: str) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(epath.Path(f"{gcs}/theirs"), {"leaves": {"a": np.arange(3.0, dtype=np.float32)}})
    assert sw.inspect(f"{gcs}/theirs").total.size == 3
    state = taken({"a": jnp.zeros(3)})
    assert sw.convert(f"{gcs}/theirs", f"{gcs}/ours", target=state).ok
    assert contents(sw.restore(f"{gcs}/ours", state)[0]) == contents(taken({"a": jnp.arange(3.0)}))
    with refused(sw.SaveError, f"There is already something at {gcs}/theirs, and nothing is overwritten.", hint=TAKEN):
        sw.save(f"{gcs}/theirs", state)


# --- what is there, and what is left ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run/notes.txt", "run", "run/statewise.json", "run/_METADATA", "run/d/0123"])
def test_what_is_there_is_never_written_over(stores: str, name: str) -> None:
    (StorePath(stores) / name).write_text("mine")
    with refused(sw.SaveError, f"There is already something at {stores}/run, and nothing is overwritten.", hint=TAKEN):
        sw.save(f"{stores}/run", small())
    assert listing(StorePath(stores)) == [name]


class Killed(BaseException):
    """Ends a save like a signal."""


def left_by_a_killed_writer(url: str, state: sw.State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes everything but the manifest."""

    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store_commit, "_commit", killed)
        with pytest.raises(Killed):
            sw.save(url, state)


def test_what_a_killed_writer_left_is_not_a_checkpoint_and_is_cleared_by_the_next(
    stores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by_a_killed_writer(f"{stores}/run", small(1), monkeypatch)
    before = listing(StorePath(f"{stores}/run"))
    assert before
    said = f"{stores}/run is not a complete checkpoint: its writer did not come to the manifest, or is still writing."
    hint = "wait for its writer; or restore another one: the next save to this path clears it"
    for verb in (
        lambda: sw.restore(f"{stores}/run", small()),
        lambda: sw.inspect(f"{stores}/run"),
        lambda: sw.convert(f"{stores}/run", None, to="orbax"),
    ):
        with refused(sw.RestoreError, said, hint=hint):
            verb()
    assert listing(StorePath(f"{stores}/run")) == before
    sw.save(f"{stores}/run", small(2))
    after = listing(StorePath(f"{stores}/run"))
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 2
    assert {name for name in before if name.startswith("statewise-")}.isdisjoint(after)


def test_of_two_writers_one_wins_and_the_other_says_so(stores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one starts when the first has written everything but its manifest, and is faster."""
    commit = store_commit._commit

    def overtaken(final: StorePath, own: str, data: bytes) -> None:
        monkeypatch.setattr(store_commit, "_commit", commit)
        sw.save(str(final), small(2))
        commit(final, own, data)

    monkeypatch.setattr(store_commit, "_commit", overtaken)
    said = f"Another writer has written {stores}/run at the same time. That one is complete; this one was dropped."
    with refused(sw.SaveError, said, hint="another path for each writer"):
        sw.save(f"{stores}/run", small(1))
    assert objects(f"{stores}/run") == WHOLE
    assert len({name.split("/")[0] for name in listing(StorePath(f"{stores}/run")) if name.startswith("state")}) == 2
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 2


def test_a_save_that_fails_leaves_nothing(stores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403']")

    monkeypatch.setattr(store_commit.StateWriter, "manifest", fails)
    with refused(
        sw.SaveError,
        f"{stores}/run could not be written: the store said 403: Forbidden. It is not a checkpoint; whatever is left "
        "there is removed by the next save to this path.",
        hint="credentials with which this bucket may be read, listed and written",
    ):
        sw.save(f"{stores}/run", small())
    assert objects(f"{stores}/run") == set()
