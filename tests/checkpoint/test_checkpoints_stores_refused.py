"""`sw.Checkpoints` on object stores: two writers of a step, what is not ours, and what a store says."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import socket
import threading
from typing import Any

import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from proxy import Proxy, refuse
from refusals import refused
from statewise._src.checkpoint.orbax.state_writer import StateWriter
from statewise._src.checkpoint.orbax.store_steps import Claim
from statewise._src.checkpoint.orbax.stores import StorePath, listing, remove

NEW = ocp.v1.training.Checkpointer
INTERFACES = pytest.mark.parametrize("options", [None, pytest.param(NEW, marks=pytest.mark.slow)], ids=["first", "new"])
TOOLS = "another step; or remove it with the tools of the store"


class Held:
    """Has the first call of a method wait, before it does anything, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        method, first = getattr(owner, name), iter([True])

        def waits(*args: Any) -> Any:
            if next(first, False):
                self.reached.set()
                assert self.go.wait(60)
            return method(*args)

        monkeypatch.setattr(owner, name, waits)


@INTERFACES
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Claim, "commit"), (StateWriter, "manifest")],
    ids=["before it looks for its name", "after that"],
)
def test_of_two_writers_of_a_step_the_last_to_begin_wins_and_the_other_says_so(
    owner: type, name: str, options: Any, stores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{stores}/run"
    held = Held(monkeypatch, owner, name)
    with sw.Checkpoints(url, options=options) as winner:
        loser = sw.Checkpoints(url, options=options)
        loser.save(7, numbered(1), metrics={"loss": 1.0})
        assert held.reached.wait(60)
        assert winner.steps == ()
        winner.save(7, numbered(2), metrics={"loss": 2.0})
        winner.wait()
        held.go.set()
        with refused(
            sw.SaveError,
            f"Another writer (which has ended) has written {url}/7 at the same time; this one was dropped.",
            hint="another directory for each writer",
        ):
            loser.wait()
        assert loser.steps == winner.steps == (7,)
        back = winner.restore(numbered(0), extra="metrics")
        assert (number_of(back.state), back.extra["metrics"]) == (2, {"loss": 2.0})
        assert loser.save(8, numbered(3))
        loser.close()
        assert winner.steps == (7, 8)


def test_who_writes_at_the_same_time_is_named(stores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{stores}/run"
    held = Held(monkeypatch, Claim, "commit")
    with sw.Checkpoints(url) as checkpoints:
        checkpoints.save(7, numbered(1))
        assert held.reached.wait(60)
        Claim(StorePath(f"{url}/7"), "0" * 16)
        held.go.set()
        who = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(sw.SaveError, match=f"Another writer \\({who}\\) has written {url}/7 at the same time"):
            checkpoints.wait()
        assert checkpoints.steps == ()


def test_who_comes_later_and_finds_the_step_complete_leaves_it_to_its_writer(stores: str) -> None:
    url = f"{stores}/run"
    with sw.Checkpoints(url) as checkpoints:
        checkpoints.save(7, numbered(1))
        checkpoints.manager.wait_until_finished()
        later = Claim(StorePath(f"{url}/7"), "0" * 16)
        assert checkpoints.steps == (7,)
        later.release()
        checkpoints.wait()
        assert number_of(checkpoints.restore(numbered(0)).state) == 1
        checkpoints.save(8, numbered(2))
        checkpoints.manager.wait_until_finished()
        remove(StorePath(url), ["8.statewise-writer", "8/state/statewise.json"])  # by one that began it, and removes it
        with pytest.raises(sw.SaveError, match=r"Another writer \(which has ended\) has written .*/8 at the same time"):
            checkpoints.wait()


def test_a_step_that_is_complete_is_not_written_over_whoever_wrote_it(
    stores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{stores}/run"
    with sw.Checkpoints(url) as first, sw.Checkpoints(url) as second:
        first.save(7, numbered(1))
        first.wait()
        message = f"There is already a step 7 in {url}."
        hint = "another step; checkpoints.manager.delete(7) removes one that is corrupted"
        with refused(sw.SaveError, message, hint=hint):
            second.save(7, numbered(2))
        # The same where it is completed just after it was looked for.
        monkeypatch.setattr(sw.Checkpoints, "_new_step", lambda self, step, force: step)
        with refused(sw.SaveError, message, hint=hint):
            second.save(7, numbered(2))
        assert number_of(second.restore(numbered(0)).state) == 1
    assert {name.partition("/")[0] for name in listing(StorePath(url))} == {"7"}


def test_what_is_not_ours_stays(stores: str) -> None:
    url = f"{stores}/run"
    (StorePath(url) / "7/notes.txt").write_text("mine")
    with sw.Checkpoints(url) as checkpoints:
        assert checkpoints.steps == ()
        message = f"There is already something at {url}/7, which is not a checkpoint of Statewise."
        with refused(sw.SaveError, message, hint=TOOLS):
            checkpoints.save(7, numbered(1))
        assert checkpoints.save(8, numbered(1))
        checkpoints.wait()
        assert checkpoints.steps == (8,)
    assert (StorePath(url) / "7/notes.txt").read_text() == "mine"


def test_without_its_mark_or_without_its_manifest_a_step_is_none(stores: str) -> None:
    url = f"{stores}/run"
    with sw.Checkpoints(url) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, numbered(step))
        checkpoints.wait()
        remove(StorePath(url), ["2/commit_success.txt", "3/state/statewise.json"])
        assert (checkpoints.steps, checkpoints.latest) == ((1,), 1)
        message = f"Step 3 in {url} is not a complete checkpoint."
        with refused(sw.SaveError, message, hint="checkpoints.manager.delete(3)"):
            checkpoints.save(3, numbered(5))
        checkpoints.manager.delete(3)
        assert checkpoints.save(3, numbered(5))
        checkpoints.wait()
        assert number_of(checkpoints.restore(numbered(0)).state) == 5
    with sw.Checkpoints(url) as checkpoints:  # which has never seen the second step
        assert checkpoints.save(2, numbered(6), force=True)
        checkpoints.wait()
        assert checkpoints.steps == (1, 2, 3)


# --- what a store says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["gs", "s3"])
def test_the_library_of_a_store_that_is_missing_is_named(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    library, extra = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}[store]
    with refused(sw.SaveError, f"Steps on {store}:// need {library}.", hint=f"pip install 'statewise[{extra}]'"):
        sw.Checkpoints(f"{store}://bucket/run")


@pytest.mark.parametrize("store", ["gs", "s3"])
def test_a_url_without_a_bucket_is_refused(store: str) -> None:
    with pytest.raises(sw.SaveError, match=f"{store}:// cannot be a path: it does not name a bucket"):
        sw.Checkpoints(f"{store}://")


def test_a_bucket_that_is_not_there_is_made_by_nobody(s3: str) -> None:
    url = f"{s3}-none/run"
    with pytest.raises(sw.SaveError, match=f"{url} cannot be used: the store said 404: .*[Bb]ucket"):
        sw.Checkpoints(url)


def test_a_store_that_refuses_is_quoted(stores: str, proxy: Proxy) -> None:
    url = f"{stores}/run"
    with sw.Checkpoints(url) as checkpoints:
        checkpoints.save(1, numbered(1))
        checkpoints.wait()
        proxy.faults = [refuse(403)]
        for ask in (lambda: checkpoints.steps, lambda: checkpoints.latest, checkpoints.path, checkpoints.inspect):
            with pytest.raises(sw.RestoreError, match=f"{url} cannot be read: the store said 403"):
                ask()
        with pytest.raises(sw.SaveError, match=f"A step could not be written to {url}: the store said 403"):
            checkpoints.save(2, numbered(2))
        proxy.faults = [refuse(403, methods=("PUT", "POST"))]
        with pytest.raises(sw.SaveError, match=f"A step could not be written to {url}: .*403"):
            checkpoints.save(2, numbered(2))
        proxy.faults = []
        assert checkpoints.steps == (1,)
        assert checkpoints.save(2, numbered(2))
        checkpoints.wait()
        assert checkpoints.steps == (1, 2)


@pytest.mark.parametrize("url", ["gs://bucket/run*", "s3://bucket/lr[0.1]/steps", "gs://bucket/run?"])
def test_a_directory_that_is_a_pattern_for_gcsfs(url: str) -> None:
    """Orbax would delete the steps of `run1` with those of `run*`."""
    [character] = {"*", "?", "["} & {*url}
    with refused(
        sw.SaveError,
        f"{url} cannot hold steps: gcsfs and s3fs, with which Orbax deletes steps, take {character!r} for a pattern.",
        hint="another directory, without such characters",
    ):
        sw.Checkpoints(url, max_to_keep=1)


@pytest.mark.parametrize(
    "options",
    [
        ocp.CheckpointManagerOptions(step_prefix="run[1]"),
        ocp.CheckpointManagerOptions(step_name_format=ocp.path.step.standard_name_format(step_prefix="run[1]")),
        functools.partial(NEW, step_name_format=ocp.v1.path.step.standard_name_format(step_prefix="run[1]")),
    ],
    ids=["prefix", "format", "new"],
)
@pytest.mark.parametrize("place", ["gs://bucket/run", "run"])
def test_a_name_of_steps_that_is_a_pattern(options: Any, place: str, tmp_path: pathlib.Path) -> None:
    """Orbax would not find them on a disk, and in a store delete those of other names too."""
    with pytest.raises(sw.SaveError) as caught:
        sw.Checkpoints(place if "://" in place else tmp_path / place, options=options)
    said = r"Steps cannot be named as 'run\[1\](_0)?': Orbax takes '\[' for a pattern\."
    assert re.fullmatch(said, caught.value.message)
    assert caught.value.hint == "names without such characters: ocp.CheckpointManagerOptions(step_prefix='at')"
    assert not any(tmp_path.iterdir())
