"""Corruption of a step of `sw.Checkpoints` in an object store: its state, its metrics, the position of its data.

Whatever object it is in, a restore has the right values of all of them, or says what is corrupted; then the iterator is
where it was.  A step without its mark or its manifest is not offered, so that the newest is the one before.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
import pytest

import numbered
import statewise as sw
from corrupting import HARM, QUICK, objects, set_to
from damaging import words
from iterators import Counting, drawn
from proxy import Proxy, flip, truncate
from statewise._src.checkpoint.orbax.stores import StorePath

SLOW = pytest.mark.slow
START = Counting().position
# Without these the step is not complete, whatever else there is.
COMMITS = {"2/commit_success.txt", "2/state/statewise.json"}
# What only Orbax reads; and what says what wrote a position, which Grain's own handlers do not have.
NOT_READ = re.compile(
    r"2/(_CHECKPOINT_METADATA|(\w+/)?commit_success\.txt|state/(_METADATA|_sharding|manifest\.ocdbt))"
)
BESIDE_THE_DATA = "2/data/process_0-of-1.statewise"
# What goes wrong in these cases, the last test has.
NOT_FOUND = (
    ("of another step", "2/metrics/metrics"),
    ("removed", "2/metrics/metrics"),
    ("removed", "2/data/process_0-of-1.json"),
    ("flipped", "2/epoch/metadata"),
)


def save_steps(url: str) -> None:
    """Saves two steps, whose numbers say all that they hold."""
    iterator = Counting()
    with sw.Checkpoints(url) as checkpoints:
        for step in (1, 2):
            drawn(iterator, 3)
            checkpoints.save(step, numbered.state(step), data=iterator, metrics={"loss": step / 4}, epoch=10 + step)


def restored(checkpoints: sw.Checkpoints, *, epoch: bool = False, **options: Any) -> int:
    """Restores everything; returns the step, of which it has the values."""
    iterator, extra = Counting(), ["metrics", "epoch"] if epoch else "metrics"
    try:
        back = checkpoints.restore(numbered.plan().abstract(), data=iterator, extra=extra, **options)
    except sw.StatewiseError:
        assert iterator.position == START
        raise
    assert words(back.state) == words(numbered.state(back.step))
    assert iterator.position == {"epoch": 0, "next": 3 * back.step}
    assert back.extra == {"metrics": {"loss": back.step / 4}} | ({"epoch": 10 + back.step} if epoch else {})
    return back.step


@pytest.fixture
def run(stores: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[sw.Checkpoints]:
    """Two steps; at the end the second of them is as it was."""
    # After an error it is asked several times whether the step is being deleted.
    monkeypatch.setattr("statewise._src.checkpoint.checkpoints._DELETION", (0.0,))
    save_steps(f"{stores}/run")
    with sw.Checkpoints(f"{stores}/run") as checkpoints:
        yield checkpoints


def check_named(error: sw.CorruptedError, name: str) -> None:
    """It says which object or which item is corrupted, or which leaves."""
    item, last = name.split("/")[1], name.rpartition("/")[2]
    assert last in error.message or (item == "state" and error.leaves) or f"The item {item!r}" in error.message, error


def pairs(root: StorePath) -> dict[str, tuple[bytes, bytes]]:
    """The objects of the second step, each with the one that the first has in its place."""
    found = objects(root)
    first, second = ([name for name in found if name.startswith(f"{step}/")] for step in (1, 2))
    return {name: (found[name], found[other]) for other, name in zip(first, second, strict=True)}


@pytest.mark.parametrize("harm", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in HARM])
def test_a_corrupted_object_of_the_newest_step_is_found_or_not_read(harm: str, run: sw.Checkpoints) -> None:
    root, missed = StorePath(str(run.directory)), set()
    for name, (data, other) in pairs(root).items():
        corrupted = HARM[harm](data, other)
        if corrupted == data or (harm, name) in NOT_FOUND:
            continue
        set_to(root, name, corrupted)
        if corrupted is None and name in COMMITS:
            assert (run.steps, run.latest, restored(run)) == ((1,), 1, 1)
        else:
            assert run.steps == (1, 2)
            try:
                assert restored(run) == 2
                missed.add(name)
            except sw.CorruptedError as error:
                check_named(error, name)
        set_to(root, name, data)
    assert (restored(run, epoch=True), restored(run, epoch=True, step=1)) == (2, 1)
    read = {name for name in missed if not NOT_READ.fullmatch(name) and "/epoch/" not in name}
    assert read == ({BESIDE_THE_DATA} if harm == "removed" else set())


def test_data_that_are_wholly_of_another_step_are_found(run: sw.Checkpoints) -> None:
    root = StorePath(str(run.directory))
    for name, (_, other) in pairs(root).items():
        if name.startswith("2/data/"):
            set_to(root, name, other)
    with pytest.raises(sw.CorruptedError, match=r"'data' of step 2 is corrupted: .*: it was saved with step 1\."):
        restored(run)


def test_a_corrupted_step_is_deleted_and_saved_again(run: sw.Checkpoints) -> None:
    """As docs/checkpoints.md says: an older one is restored, this one deleted, and its number saved again."""
    root = StorePath(str(run.directory))
    (name,) = (name for name in pairs(root) if "/d/" in name)
    set_to(root, name, b"")
    with pytest.raises(sw.CorruptedError):
        restored(run)
    assert restored(run, step=1) == 1
    run.manager.delete(2)
    assert run.latest == 1
    iterator = Counting()
    drawn(iterator, 6)
    run.save(2, numbered.state(2), data=iterator, metrics={"loss": 0.5})
    run.wait()
    assert (run.steps, restored(run)) == ((1, 2), 2)


@pytest.mark.parametrize("harm", ["cut", pytest.param("removed", marks=SLOW), pytest.param("flipped", marks=SLOW)])
@pytest.mark.parametrize("options", [None, ocp.v1.training.Checkpointer], ids=["first", "new"])
def test_metadata_of_orbax_that_are_corrupted_stop_neither_a_reader_nor_the_run(
    options: Any, harm: str, stores: str
) -> None:
    url, name = f"{stores}/run", "2/_CHECKPOINT_METADATA"
    save_steps(url)
    set_to(StorePath(url), name, HARM[harm]((StorePath(url) / name).read_bytes(), b""))
    with sw.Checkpoints(url, max_to_keep=2, options=options) as checkpoints:
        assert (restored(checkpoints), checkpoints.steps) == (2, (1, 2))
        for step in (3, 4):
            checkpoints.save(step, numbered.state(step))
            checkpoints.wait()
            assert checkpoints.latest == step
            back = checkpoints.restore(numbered.plan().abstract())
            assert words(back.state) == words(numbered.state(step))
    assert checkpoints.steps == (3, 4)


# --- answers that are wrong --------------------------------------------------------------------------------------

WRONG = {"cut": truncate(0.5), "empty": truncate(0.0), "flipped": flip(0.5), "flipped at the end": flip(1.0)}
# What a restore reads, by what it is called where it is asked for.
READ = (
    "data/process_0-of-1.json",
    BESIDE_THE_DATA,
    "metrics/metrics",
    "state/statewise.json",
    r"state/statewise-\w+/_METADATA",
    r"state/statewise-\w+/_sharding",
    r"state/statewise-\w+/manifest.ocdbt",
    r"state/statewise-\w+/d/\w+",
)


@pytest.mark.parametrize("fault", ["cut", "flipped", pytest.param("empty", marks=SLOW)])
def test_an_answer_that_is_wrong_never_becomes_a_value(fault: str, run: sw.Checkpoints, proxy: Proxy) -> None:
    for name in READ:
        pattern = f"{name.replace('.', '[.]').replace('/', '(/|%2F)')}([?]|$)"
        proxy.reset()
        proxy.faults = [dataclasses.replace(WRONG[fault], pattern=pattern)]
        with pytest.raises((sw.CorruptedError, sw.RestoreError)) as caught:
            restored(run, step=2)
        assert proxy.hits
        error = caught.value
        if isinstance(error, sw.RestoreError):  # on gs:// an answer about an object is JSON
            assert f"{run.directory}/2/state cannot be read: " in error.message, (name, error)
        else:
            assert "corrupted" in error.message, (name, error)
    proxy.reset()
    assert restored(run, epoch=True) == 2


def cut_requests(checkpoints: sw.Checkpoints, proxy: Proxy, passing: float, every: int) -> None:
    """Restores again and again, each time with another answer cut: a listing, or an object."""
    proxy.reset()
    assert restored(checkpoints) == 2
    for number in range(0, len(proxy.requests), every):
        proxy.reset()
        proxy.faults = [truncate(passing, after=number, first=1)]
        try:
            assert restored(checkpoints) == 2
        except (sw.CorruptedError, sw.RestoreError) as error:
            said = ("corrupted", f"{checkpoints.directory} cannot be read: ", "/2/state cannot be read: ")
            assert any(text in error.message for text in said), error  # noqa: PT017 - it may be right instead


def test_no_answer_that_is_cut_ever_becomes_a_value(run: sw.Checkpoints, proxy: Proxy) -> None:
    cut_requests(run, proxy, 0.5, 5)


@SLOW
@pytest.mark.parametrize("passing", [0.0, 0.5, 0.99])
def test_none_of_the_answers_that_is_cut_ever_becomes_a_value(
    passing: float, run: sw.Checkpoints, proxy: Proxy
) -> None:
    cut_requests(run, proxy, passing, 1)


# --- what is not found -------------------------------------------------------------------------------------------


@pytest.mark.xfail(
    strict=True,
    reason="JSON items have no checksum, and a position or JSON item without its file is not called corrupted",
)
@pytest.mark.parametrize(("harm", "name"), NOT_FOUND)
def test_a_corrupted_item_is_found(harm: str, name: str, run: sw.Checkpoints) -> None:
    root = StorePath(str(run.directory))
    data, other = pairs(root)[name]
    set_to(root, name, HARM[harm](data, other))
    with pytest.raises(sw.CorruptedError):
        restored(run, epoch=True)
