"""Several processes at an object store: one of them fails or is killed while they save; others go on with the run."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import numbered
import statewise as sw
from damaging import words
from programs.fail_in_store import PATIENCE
from programs.restart_together import go_on
from proxy import Fault, Proxy, refuse
from started import Started, started
from statewise._src.checkpoint.orbax.stores import StorePath, listing

SLOW = pytest.mark.slow
# What the second of two processes writes, under the number 2.
OF_THE_SECOND = r"(/|%2F)2(/|%2F)(state(/|%2F))?statewise-\w+(/|%2F)1(/|%2F)"
REFUSED: Fault = refuse(403, pattern=OF_THE_SECOND, methods=("PUT", "POST"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where processes wait for the test; what they print goes beside it."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> tuple[str, Proxy]:
    """An empty bucket on the store that a test names, and its proxy."""
    return request.getfixturevalue(request.param), request.getfixturevalue(f"{request.param}_proxy")


def said_of(running: Started, number: int, name: int) -> list[str]:
    """What a process has said of the saves of this number."""
    lines = running.said(number).splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def wait_until_refused(running: Started, proxy: Proxy, folder: Path) -> list[str]:
    """Waits until both have said that 2 was not saved, and lets them go on without a fault; returns what they said."""
    running.wait_until(lambda: proxy.hits > 0 and all(said_of(running, number, 2) for number in range(2)))
    proxy.reset()
    said = [said_of(running, number, 2)[0] for number in range(2)]
    (folder / "go").touch()
    return said


def check_is(state: sw.State, step: int) -> None:
    assert words(state) == words(numbered.state(step))


# --- sw.save -----------------------------------------------------------------------------------------------------


def test_of_two_processes_one_is_refused_and_then_one_is_killed(
    stores: str, proxy: Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both say so; nothing half-written is a checkpoint; the next save to the path works, here by one process."""
    base = f"{stores}/run"
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "0")
    proxy.faults = [REFUSED]
    with started("fail_in_store.py", folder, 2, "alone", base, "1", "2 refused", "2", "3 killed") as running:
        first, second = wait_until_refused(running, proxy, folder)
        assert first == f"{base}/2 could not be written: process 1 has failed, and its own error says why."
        assert second.startswith(f"{base}/2 could not be written: the store said 403: ")
        assert running.ends() == [0, -signal.SIGKILL]
        assert [said_of(running, number, 2)[1:] for number in range(2)] == [["nothing"], ["nothing"]]
        (dead,) = said_of(running, 0, 3)
    assert dead.startswith(f"{base}/3 could not be written: another process has ended or cannot be reached: ")
    assert "statewise.json" not in listing(StorePath(f"{base}/3"))
    with pytest.raises(sw.RestoreError, match=r"There is nothing at|is not a complete checkpoint"):
        sw.restore(f"{base}/3", numbered.plan().abstract())
    (StorePath(base) / "3/statewise-0123456789abcdef/1/d/0").write_bytes(b"as the killed process may leave it")
    sw.save(f"{base}/3", numbered.state(3))
    for step in (1, 2, 3):
        restored, report = sw.restore(f"{base}/{step}", numbered.plan().abstract())
        assert report.ok
        check_is(restored, step)
    sw.save(f"{base}/clean", numbered.state(3))
    assert len(listing(StorePath(f"{base}/3"))) == len(listing(StorePath(f"{base}/clean")))


# --- sw.Checkpoints ----------------------------------------------------------------------------------------------


def some(always: set[tuple[str, ...]], *choices: Iterable[str]) -> list[Any]:
    """All combinations; those that are not named are slow tests."""
    return [pytest.param(*each, marks=() if each in always else SLOW) for each in itertools.product(*choices)]


@pytest.mark.parametrize(
    ("bucket", "way", "what"),
    some(
        {("gcs", "first", "killed"), ("s3", "new", "refused")}, ("gcs", "s3"), ("first", "new"), ("killed", "refused")
    ),
    indirect=["bucket"],
)
def test_a_step_of_which_one_of_two_has_failed_is_not_offered_and_the_next_run_writes_it(
    way: str, what: str, bucket: tuple[str, Proxy], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait with a timeout for a killed process says so when that is over; one process goes on."""
    url, proxy = f"{bucket[0]}/run", bucket[1]
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "0")
    proxy.faults = [REFUSED] if what == "refused" else []
    with started("fail_in_store.py", folder, 2, way, url, "1", f"2 {what}") as running:
        if what == "refused":
            wait_until_refused(running, proxy, folder)
        else:
            running.wait_until(lambda: running.processes[1].poll() is not None)
            (folder / "go").touch()
        assert running.ends() == [0, 0 if what == "refused" else -signal.SIGKILL]
        said = said_of(running, 0, 2) + said_of(running, 1, 2)
    assert len(said) == (2 if what == "refused" else 1)
    for text in said:
        assert text.startswith("Step 2 (") or url in text
        assert text.endswith(f" is still being written to {url} after {PATIENCE} s.") or "could not be" in text
    with sw.Checkpoints(url) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest) == ((1,), 1)
        check_is(checkpoints.restore(numbered.plan().abstract()).state, 1)
        assert checkpoints.save(2, numbered.state(2))
        checkpoints.wait()
        assert checkpoints.steps == (1, 2)
        check_is(checkpoints.restore(numbered.plan().abstract()).state, 2)
    left = {name.partition("/")[2] for name in listing(StorePath(url)) if name.startswith("2/state/statewise-")}
    assert len({name.split("/")[1] for name in left}) == 1
    assert not [name for name in listing(StorePath(url)) if name.endswith(".statewise-writer")]


FIRST_SAYS = (
    "A step could not be written to {}: process 1 has failed, and its own error says why. Earlier steps are complete."
)


def check_went_on(running: Started, url: str | Path) -> None:
    """The processes have saved step 2 after all, and then 3."""
    running.check_ended_well()
    assert [[said_of(running, number, step)[-1] for number in range(2)] for step in (2, 3)] == [["nothing"] * 2] * 2
    with sw.Checkpoints(url) as checkpoints:
        assert checkpoints.steps == (1, 2, 3)
        for step in checkpoints.steps:
            check_is(checkpoints.restore(numbered.plan().abstract(), step=step).state, step)


@pytest.mark.parametrize(
    ("bucket", "way"), some({("gcs", "first"), ("s3", "new")}, ("gcs", "s3"), ("first", "new")), indirect=["bucket"]
)
def test_each_of_two_processes_says_that_one_has_failed_to_write_a_step(
    way: str, bucket: tuple[str, Proxy], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No one waits for a timeout; then the same processes write that step, and the next one."""
    url, proxy = f"{bucket[0]}/run", bucket[1]
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "0")
    proxy.faults = [REFUSED]
    with started("fail_in_store.py", folder, 2, way, url, "1", "2 refused", "2", "3") as running:
        first, second = wait_until_refused(running, proxy, folder)
        check_went_on(running, url)
    assert first == FIRST_SAYS.format(url)
    assert second.startswith(f"A step could not be written to {url}: the store said 403: ")


@pytest.mark.parametrize("way", ["first", "new"])
def test_each_of_two_processes_says_that_the_disk_of_one_was_full(way: str, folder: Path, tmp_path: Path) -> None:
    url = tmp_path / "steps"
    (folder / "go").touch()
    with started("fail_in_store.py", folder, 2, way, url, "1", "2 full", "2", "3") as running:
        check_went_on(running, url)
        first, second = (said_of(running, number, 2)[0] for number in range(2))
    assert first == FIRST_SAYS.format(url)
    assert second == f"A step could not be written to {url}: No space left on device. Earlier steps are complete."


@pytest.mark.parametrize("way", ["first", pytest.param("new", marks=SLOW)])
def test_one_of_two_processes_does_not_answer_and_the_other_says_so_when_the_limit_of_orbax_is_over(
    way: str, folder: Path, tmp_path: Path
) -> None:
    url = tmp_path / "steps"
    with started("fail_in_store.py", folder, 2, way, url, "1", "2 silent") as running:
        running.wait_until(lambda: bool(said_of(running, 0, 2)))
        (folder / "go").touch()
        running.check_ended_well()
        (said,) = said_of(running, 0, 2)
    assert said.startswith(f"A step could not be written to {url}: ")
    assert said.endswith(" seconds. Earlier steps are complete.") or "another process has ended or cannot be" in said
    with sw.Checkpoints(url) as checkpoints:
        assert checkpoints.steps == (1,)


# --- other numbers of processes ----------------------------------------------------------------------------------


def go_on_with(count: int, urls: list[str], folder: Path) -> None:
    """A run of so many processes: each restores what the one before has saved, and saves the next step."""
    if count == 1:
        for url in urls:
            go_on(url)
        return
    with started("restart_together.py", folder, count, *urls) as running:
        running.check_ended_well()


def check_steps(last: int, urls: list[str]) -> None:
    for url in urls:
        with sw.Checkpoints(url) as checkpoints:
            assert checkpoints.steps == tuple(range(1, last + 1))
            for step in checkpoints.steps:
                check_is(checkpoints.restore(numbered.plan().abstract(), step=step).state, step)


@pytest.fixture
def saved_by_two(gcs: str, s3: str, tmp_path: Path) -> list[str]:
    """A run on each store, of which two processes have saved the first step."""
    urls = [f"{gcs}/run", f"{s3}/run"]
    go_on_with(2, urls, tmp_path / "first")
    return urls


def test_one_process_goes_on_with_the_run_of_two_and_then_two_go_on_with_that(
    saved_by_two: list[str], tmp_path: Path
) -> None:
    go_on_with(1, saved_by_two, tmp_path / "second")
    go_on_with(2, saved_by_two, tmp_path / "third")
    check_steps(3, saved_by_two)


@SLOW
def test_four_processes_go_on_with_the_run_of_two_and_then_one_and_two_do(
    saved_by_two: list[str], tmp_path: Path
) -> None:
    for run, count in enumerate((4, 1, 2)):
        go_on_with(count, saved_by_two, tmp_path / f"run {run}")
    check_steps(4, saved_by_two)
