"""An object store that is slow, throttles, drops connections, truncates, and reorders.

Whatever it does: a save is complete or raises `SaveError`, a restore has the saved values or raises, an error says what
the store said, retries end, and what was complete before still restores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import pytest

import numbered
import statewise as sw
from damaging import words
from proxy import Fault, Proxy, delay, drop_answer, drop_before_answer, drop_request, flip, refuse, truncate
from statewise._src.checkpoint.orbax.stores import StorePath, listing
from store_faults import PASSING, RETRIES, check_says_what_the_store_said

SLOW = pytest.mark.slow


def outcome(path: str) -> sw.State | sw.RestoreError | sw.CorruptedError:
    """What a restore gives, or what it raises."""
    try:
        return sw.restore(path, numbered.plan().abstract())[0]
    except (sw.RestoreError, sw.CorruptedError) as error:
        return error


def is_step(path: str, number: int) -> bool:
    """Whether there is a checkpoint, which then has to be right; if there is none, the error says so."""
    found = outcome(path)
    if isinstance(found, sw.State):
        assert words(found) == words(numbered.state(number))
        return True
    assert isinstance(found, sw.RestoreError), found
    assert found.message.startswith((f"There is nothing at {path}.", f"{path} is not a complete checkpoint")), found
    return False


@pytest.mark.parametrize("fault", PASSING)
def test_a_save_and_a_restore_come_through(fault: str, stores: str, proxy: Proxy) -> None:
    proxy.faults = PASSING[fault]
    sw.save(f"{stores}/step_1", numbered.state(1))
    assert proxy.hits
    proxy.reset()
    proxy.faults = PASSING[fault]
    assert is_step(f"{stores}/step_1", 1)
    assert proxy.hits
    proxy.reset()
    assert is_step(f"{stores}/step_1", 1)


# --- a store that does not recover -------------------------------------------------------------------------------

FOR_GOOD: dict[str, Sequence[Fault]] = {
    "429": [refuse(429)],
    "429, and says for how long": [refuse(429, retry_after=1)],
    "503": [refuse(503)],
    "403": [refuse(403)],
    "drops what is sent": [drop_request()],
    "does what it is asked, and does not say so": [drop_before_answer()],
    "drops what is read": [drop_answer()],
}


@pytest.mark.parametrize(
    "fault",
    [name if name in ("503", "403", "drops what is read") else pytest.param(name, marks=SLOW) for name in FOR_GOOD],
)
def test_retries_end_and_the_error_says_what_the_store_said(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    sw.save(f"{stores}/step_1", numbered.state(1))
    monkeypatch.setenv(RETRIES, "2")
    proxy.faults = FOR_GOOD[fault]
    with pytest.raises(sw.SaveError) as saving:
        sw.save(f"{stores}/step_2", numbered.state(2))
    check_says_what_the_store_said(saving.value, f"{stores}/step_2")
    for verb in (sw.restore, sw.preview):
        with pytest.raises(sw.RestoreError) as restoring:
            verb(f"{stores}/step_1", numbered.plan().abstract())
        check_says_what_the_store_said(restoring.value, f"{stores}/step_1")
    with pytest.raises(sw.RestoreError) as inspecting:
        sw.inspect(f"{stores}/step_1")
    check_says_what_the_store_said(inspecting.value, f"{stores}/step_1")
    proxy.reset()
    assert is_step(f"{stores}/step_1", 1)
    if not is_step(f"{stores}/step_2", 2):
        sw.save(f"{stores}/step_2", numbered.state(2))
    assert is_step(f"{stores}/step_2", 2)


# --- one request goes wrong, and is not repeated -----------------------------------------------------------------

ONCE = {"refused": refuse(503), "dropped": drop_request(), "done, not said": drop_before_answer(), "cut": drop_answer()}


def requests_of_a_save(stores: str, proxy: Proxy) -> int:
    before = len(proxy.requests)
    sw.save(f"{stores}/counted", numbered.state(0))
    return len(proxy.requests) - before


def save_with_one_fault(stores: str, proxy: Proxy, fault: Fault, number: int) -> None:
    """Saves a step while one of its requests goes wrong: it is there if the save says so, and else the next is."""
    path = f"{stores}/step_{number}"
    proxy.reset()
    proxy.faults = [dataclasses.replace(fault, after=number, first=1)]
    error: sw.SaveError | None = None
    try:
        sw.save(path, numbered.state(number))
    except sw.SaveError as raised:
        error = raised
    assert proxy.hits == 1
    proxy.reset()
    there = is_step(path, number)
    if error is None:
        assert there
        return
    check_says_what_the_store_said(error, path)
    assert not there or error.message.startswith(f"It is not known whether {path} is complete"), error
    if not there:
        sw.save(path, numbered.state(number))
        assert is_step(path, number)


@pytest.mark.parametrize("fault", ONCE)
def test_whichever_request_of_a_save_goes_wrong_nothing_is_half_written(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    for number in range(0, requests_of_a_save(stores, proxy), 7):
        save_with_one_fault(stores, proxy, ONCE[fault], number)


@SLOW
@pytest.mark.parametrize("fault", ONCE)
def test_whichever_request_of_a_save_goes_wrong_at_each_of_them(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    for number in range(requests_of_a_save(stores, proxy)):
        save_with_one_fault(stores, proxy, ONCE[fault], number)


def test_a_save_that_is_refused_waits_for_what_is_on_its_way_and_leaves_nothing(
    stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small objects are written at the same time: none may come after the others have been removed."""
    monkeypatch.setenv(RETRIES, "0")
    proxy.faults = [
        refuse(503, pattern="_sharding", methods=("POST", "PUT")),
        delay(0.3, pattern=r"manifest\.ocdbt", methods=("POST", "PUT")),
    ]
    with pytest.raises(sw.SaveError) as saving:
        sw.save(f"{stores}/step_1", numbered.state(1))
    check_says_what_the_store_said(saving.value, f"{stores}/step_1")
    assert proxy.hits == 2
    time.sleep(0.5)
    assert listing(StorePath(f"{stores}/step_1")) == []


@pytest.mark.parametrize("fault", ["refused", "cut"])
def test_whichever_request_of_a_restore_goes_wrong_it_raises_or_is_right(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    restore_with_one_fault(stores, proxy, ONCE[fault], every=7)


@SLOW
@pytest.mark.parametrize("fault", ONCE)
def test_whichever_request_of_a_restore_goes_wrong_at_each_of_them(
    fault: str, stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRIES, "0")
    restore_with_one_fault(stores, proxy, ONCE[fault], every=1)


def restore_with_one_fault(stores: str, proxy: Proxy, fault: Fault, every: int) -> None:
    for error in refusals_of_a_restore(stores, proxy, fault, every):
        check_says_what_the_store_said(error, f"{stores}/step_1")


def refusals_of_a_restore(
    stores: str, proxy: Proxy, fault: Fault, every: int
) -> Iterator[sw.RestoreError | sw.CorruptedError]:
    """Restores again and again, each time with the fault at one request; yields what is raised: else all is right."""
    path = f"{stores}/step_1"
    sw.save(path, numbered.state(1))
    proxy.reset()
    assert is_step(path, 1)
    for number in range(0, len(proxy.requests), every):
        proxy.reset()
        proxy.faults = [dataclasses.replace(fault, after=number, first=1)]
        found = outcome(path)
        if isinstance(found, sw.State):
            assert words(found) == words(numbered.state(1))
        else:
            yield found


WRONG = {"cut": truncate(0.5), "empty": truncate(0.0), "flipped": flip(0.5), "flipped at the end": flip(1.0)}


# What a restore reads: each of these is asked for, in an order that its threads settle.
OBJECTS = (r"statewise\.json", "_METADATA", "_sharding", r"manifest\.ocdbt", "(/|%2F)d(/|%2F)")


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_an_answer_that_is_wrong_never_becomes_a_value(fault: str, stores: str, proxy: Proxy) -> None:
    path = f"{stores}/step_1"
    sw.save(path, numbered.state(1))
    for pattern in OBJECTS:
        proxy.reset()
        proxy.faults = [dataclasses.replace(WRONG[fault], pattern=pattern)]
        found = outcome(path)
        assert not isinstance(found, sw.State), pattern
        assert path in found.message


@SLOW
@pytest.mark.parametrize("fault", WRONG)
def test_no_answer_that_is_wrong_ever_becomes_a_value(fault: str, stores: str, proxy: Proxy) -> None:
    wrong = list(refusals_of_a_restore(stores, proxy, WRONG[fault], every=1))
    assert wrong
    assert all(f"{stores}/step_1" in error.message for error in wrong)
