"""Killed writers to an object store: nothing that was complete is lost, and nothing half-written is offered."""

from __future__ import annotations

import random

import pytest

import numbered
import statewise as sw
from damaging import words
from statewise._src.checkpoint.orbax.stores import StorePath, listing
from writers import Template

LONGEST = 0.3  # seconds after the start of a save; most of them take less


def is_step(path: str, number: int) -> bool:
    """Whether there is a checkpoint, which then has to be right."""
    try:
        restored, _ = sw.restore(path, numbered.plan().abstract())
    except sw.RestoreError as error:
        there_is_none = (f"There is nothing at {path}.", f"{path} is not a complete checkpoint")
        if not error.message.startswith(there_is_none):
            raise
        return False
    assert words(restored) == words(numbered.state(number))
    return True


def kill_writers(template: Template, base: str, kills: int, dice: random.Random) -> int:
    """Kills so many, and returns how many had half-written something; a later save to that path clears it."""
    first = half_written = 0
    finished: list[int] = []
    for _ in range(kills):
        seen = template.killed("plain", base, first, dice.uniform(0, LONGEST), saves=dice.randrange(2))
        assert not seen.failed, seen
        done = [step for step in range(first, seen.begun + 1) if is_step(f"{base}/step_{step}", step)]
        assert done == list(range(first, first + len(done)))
        assert done[-1:] in ([], [seen.begun], [seen.done])
        assert seen.done in (-1, *done)
        assert first == 0 or is_step(f"{base}/step_{first - 1}", first - 1)
        finished += range(first, seen.done + 1)
        first += len(done)  # the next writer comes to the path at which this one was killed
        half_written += bool(listing(StorePath(f"{base}/step_{first}")))
    seen = template.killed("plain", base, first, 0, saves=1)
    assert seen.done == first
    finished.append(first)
    assert is_step(f"{base}/step_{first}", first)
    sw.save(f"{base}/clean", numbered.state(0))
    clean = len(listing(StorePath(f"{base}/clean")))
    assert {step: len(listing(StorePath(f"{base}/step_{step}"))) for step in finished} == dict.fromkeys(finished, clean)
    return half_written


def kill_managers(template: Template, base: str, kills: int, dice: random.Random) -> None:
    """Kills so many that save with `sw.Checkpoints`: what is offered restores, and nothing that was done is lost."""
    first, url = 1, f"{base}/run"
    for _ in range(kills):
        seen = template.killed("managed", url, first, dice.uniform(0, 3 * LONGEST), saves=dice.randrange(2))
        assert not seen.failed, seen
        with sw.Checkpoints(url) as checkpoints:
            steps, latest = checkpoints.steps, checkpoints.latest or 0
            assert max(seen.done, first - 1) <= latest <= seen.begun
            for step in steps[-2:]:
                restored = checkpoints.restore(numbered.plan().abstract(), step=step).state
                assert words(restored) == words(numbered.state(step))
        first = latest + 1  # the next one writes the step at which this one was killed
    seen = template.killed("managed", url, first, 0, saves=1)
    assert seen.done == first
    with sw.Checkpoints(url) as checkpoints:
        assert words(checkpoints.restore(numbered.plan().abstract()).state) == words(numbered.state(first))


def test_five_kills_lose_nothing(stores: str, store_writers: Template) -> None:
    kill_writers(store_writers, stores, 5, random.Random(0))


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(stores: str, store_writers: Template) -> None:
    assert kill_writers(store_writers, stores, 200, random.Random()) > 20


def test_two_killed_managers_lose_nothing(stores: str, store_writers: Template) -> None:
    kill_managers(store_writers, stores, 2, random.Random(1))


@pytest.mark.slow
def test_two_hundred_killed_managers_lose_nothing(stores: str, store_writers: Template) -> None:
    kill_managers(store_writers, stores, 200, random.Random())
