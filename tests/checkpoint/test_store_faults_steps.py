"""`sw.Checkpoints` on an object store that is slow, throttles, drops connections, and reorders.

Whatever it does: a step is complete or its save raises `SaveError`, what is offered restores to the bit, and the next
save works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

import numbered
import statewise as sw
from damaging import words
from proxy import Fault, Proxy, drop_answer, drop_before_answer, drop_request, refuse
from store_faults import PASSING, RETRIES, check_says_what_the_store_said

SLOW = pytest.mark.slow
# Orbax saves in a thread of its own; what fails there is raised by `wait`, too.
THREADS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def save_step(url: str, step: int, *, keep: int | None = None) -> bool:
    """Saves a step with a manager of its own, and returns whether that says that it is there; if not, it says why."""
    try:
        with sw.Checkpoints(url, max_to_keep=keep) as checkpoints:
            checkpoints.save(step, numbered.state(step))
            checkpoints.wait()
    except sw.SaveError as error:
        check_says_what_the_store_said(error, url)
        return False
    return True


def check_offered(url: str, at_least: Sequence[int], at_most: Sequence[int]) -> None:
    """A new reader and every step that it is offered: no other than these, and with the right values."""
    with sw.Checkpoints(url) as checkpoints:
        steps = checkpoints.steps
        assert set(at_least) <= set(steps) <= set(at_most)
        assert checkpoints.latest == steps[-1]
        for step in steps:
            restored = checkpoints.restore(numbered.plan().abstract(), step=step).state
            assert words(restored) == words(numbered.state(step))


# Orbax's own requests go through gcsfs and s3fs, whose pauses are long.
QUICK = ("slow",)


@THREADS
@pytest.mark.parametrize("fault", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in PASSING])
def test_steps_come_through_or_say_why_not(fault: str, stores: str, proxy: Proxy) -> None:
    url, steps = f"{stores}/run", (1, 2)
    proxy.faults = PASSING[fault]
    saved = [step for step in steps if save_step(url, step)]
    assert proxy.hits
    proxy.reset()
    check_offered(url, saved, steps)
    proxy.faults = PASSING[fault]
    if saved:
        with sw.Checkpoints(url) as checkpoints:
            restored = checkpoints.restore(numbered.plan().abstract(), step=saved[-1]).state
        assert words(restored) == words(numbered.state(saved[-1]))
        assert proxy.hits


FOR_GOOD: dict[str, Fault] = {
    "429": refuse(429),
    "503": refuse(503, retry_after=1),
    "403": refuse(403),
    "drops what is sent": drop_request(),
    "does what it is asked, and does not say so": drop_before_answer(),
    "drops what is read": drop_answer(),
}


@THREADS
@pytest.mark.parametrize("fault", [name if name == "403" else pytest.param(name, marks=SLOW) for name in FOR_GOOD])
def test_retries_end_and_the_next_save_works(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{stores}/run"
    monkeypatch.setenv(RETRIES, "1")
    with sw.Checkpoints(url) as checkpoints:
        checkpoints.save(1, numbered.state(1))
        checkpoints.wait()
        proxy.faults = [FOR_GOOD[fault]]
        with pytest.raises(sw.SaveError) as saving:  # noqa: PT012 - Orbax may be quick enough to raise at once
            checkpoints.save(2, numbered.state(2))
            checkpoints.wait()
        check_says_what_the_store_said(saving.value, url)
        with pytest.raises(sw.RestoreError) as restoring:
            checkpoints.restore(numbered.plan().abstract())
        check_says_what_the_store_said(restoring.value, url)
        proxy.reset()
        check_offered(url, (1,), (1, 2))
        checkpoints.save(3, numbered.state(3))
        checkpoints.wait()
    check_offered(url, (1, 3), (1, 2, 3))


ONCE = {"refused": refuse(403), "dropped": drop_request(), "done, not said": drop_before_answer(), "cut": drop_answer()}


def save_with_faults_at(every: int, stores: str, proxy: Proxy, fault: Fault) -> None:
    """Saves steps, of each of which another request goes wrong; the newest that is complete restores each time."""
    url = f"{stores}/run"
    for last in (1, 2):  # the second finds a step
        proxy.reset()
        assert save_step(url, last, keep=2)
    for number in range(0, len(proxy.requests), every):
        step = number + 3
        proxy.reset()
        proxy.faults = [dataclasses.replace(fault, after=number, first=1)]
        saved = save_step(url, step, keep=2)
        proxy.reset()
        with sw.Checkpoints(url) as checkpoints:
            latest = checkpoints.latest
            assert latest == step or (latest == last and not saved)
            assert words(checkpoints.restore(numbered.plan().abstract()).state) == words(numbered.state(latest))
        last = latest


@THREADS
@pytest.mark.parametrize("fault", ["done, not said"])
def test_whichever_request_goes_wrong_the_newest_complete_step_restores(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    save_with_faults_at(21, stores, proxy, ONCE[fault])


@THREADS
@SLOW
@pytest.mark.parametrize("fault", ONCE)
def test_at_each_request_the_newest_complete_step_restores(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    save_with_faults_at(1, stores, proxy, ONCE[fault])
