"""Writers that save to one path of an object store at the same time: one wins, and the others say so."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

import numbered
import statewise as sw
from damaging import words
from proxy import Fault, Proxy, delay, refuse
from statewise._src.checkpoint.orbax.stores import StorePath, listing
from writers import Template

OTHER_PATH = "another path for each writer"
LISTINGS = r"/o\?|list-type=2"


def save_all(path: str, numbers: Sequence[int]) -> dict[int, sw.SaveError]:
    """Saves the states of these numbers at the same time, and returns the errors of those that did not win."""
    errors: dict[int, sw.SaveError] = {}
    start = threading.Barrier(len(numbers))

    def save(number: int) -> None:
        state = numbered.state(number)
        start.wait()
        try:
            sw.save(path, state)
        except sw.SaveError as error:
            errors[number] = error

    threads = [threading.Thread(target=save, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def lost(path: str) -> tuple[str, str]:
    """What a writer says that did not win: at the end, or before it has written anything."""
    return (
        f"Another writer has written {path} at the same time. That one is complete; this one was dropped.",
        f"There is already something at {path}, and nothing is overwritten.",
    )


def check_is(path: str, number: int, objects: int) -> None:
    restored, report = sw.restore(path, numbered.plan().abstract())
    assert report.ok
    assert words(restored) == words(numbered.state(number))
    assert len(listing(StorePath(path))) == objects


def clean(stores: str) -> int:
    """The number of objects of a checkpoint that nobody else has written to."""
    sw.save(f"{stores}/clean", numbered.state(0))
    return len(listing(StorePath(f"{stores}/clean")))


def race(stores: str, rounds: int) -> None:
    objects = clean(stores)
    for number in range(rounds):
        path, numbers = f"{stores}/step_{number}", range(4)
        errors = save_all(path, numbers)
        (winner,) = set(numbers) - errors.keys()
        assert all(error.message in lost(path) for error in errors.values()), errors
        check_is(path, winner, objects)


def test_of_four_writers_one_wins(stores: str) -> None:
    race(stores, 3)


@pytest.mark.slow
def test_of_four_writers_one_wins_a_hundred_times(stores: str) -> None:
    race(stores, 100)


def test_of_two_programs_one_wins(stores: str, store_writers: Template) -> None:
    path, objects = f"{stores}/step_1", clean(stores)
    state = numbered.state(999)
    errors: list[sw.SaveError] = []

    def save() -> None:
        try:
            sw.save(path, state)
        except sw.SaveError as error:
            errors.append(error)

    seen = store_writers.killed("plain", stores, 1, 0.0, saves=1, when_begun=save)
    messages = [error.message for error in errors] + ([seen.failed] if seen.failed else [])
    assert len(messages) == 1
    assert messages[0] in lost(path)
    check_is(path, 1 if errors else 999, objects)


LATE_MANIFEST = delay(2, methods=("PUT", "POST"), pattern=r"step_1(/|%2F)statewise\.json", first=1)


def save_while_another_is_late(
    path: str, proxy: Proxy, *more: Fault, late: Fault = LATE_MANIFEST
) -> sw.SaveError | None:
    """Saves 1 to a path, and 2 while an object of 1 is on its way; returns what the save of 1 raises."""
    proxy.faults = [late]
    errors: list[sw.SaveError] = []

    def save_late() -> None:
        try:
            sw.save(path, numbered.state(1))
        except sw.SaveError as error:
            errors.append(error)

    thread = threading.Thread(target=save_late)
    thread.start()
    while not proxy.hits:
        thread.join(0.01)
    sw.save(path, numbered.state(2))
    proxy.faults = [late, *more]
    thread.join()
    return errors[0] if errors else None


def test_the_first_manifest_wins_however_early_the_other_began(stores: str, proxy: Proxy) -> None:
    path, objects = f"{stores}/step_1", clean(stores)
    error = save_while_another_is_late(path, proxy)
    assert error is not None
    assert (error.message, error.hint) == (lost(path)[0], OTHER_PATH)
    check_is(path, 2, objects)


def test_a_writer_whose_objects_the_winner_has_removed_says_that_it_lost(stores: str, proxy: Proxy) -> None:
    path, objects = f"{stores}/step_1", clean(stores)
    late = delay(2, methods=("PUT", "POST"), pattern=r"step_1(/|%2F)statewise-\w+(/|%2F)_METADATA", first=1)
    error = save_while_another_is_late(path, proxy, late=late)
    assert error is not None
    assert (error.message, error.hint) == (lost(path)[0], OTHER_PATH)
    check_is(path, 2, objects)


def test_a_writer_that_lost_and_may_not_remove_what_it_wrote_says_that_it_lost(
    stores: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{stores}/step_1"
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "0")
    error = save_while_another_is_late(path, proxy, refuse(503, methods=("GET",), pattern=LISTINGS))
    assert error is not None
    assert proxy.hits == 2
    assert error.message == lost(path)[0]
    (note,) = error.__notes__
    assert note.startswith(f"What it has written is left below {path}/statewise-")
    assert "the store said 503: " in note
    restored, _ = sw.restore(path, numbered.plan().abstract())
    assert words(restored) == words(numbered.state(2))


def test_what_is_there_is_not_overwritten(stores: str) -> None:
    path, objects = f"{stores}/step_1", clean(stores)
    sw.save(path, numbered.state(1))
    with pytest.raises(sw.SaveError) as caught:
        sw.save(path, numbered.state(2))
    assert caught.value.message == lost(path)[1]
    check_is(path, 1, objects)
