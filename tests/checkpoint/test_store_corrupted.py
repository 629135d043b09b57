"""Corruption in an object store: whatever object it is in, it is found and named, or the values are right."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import numbered
import statewise as sw
from corrupting import HARM, QUICK, flipped, objects, set_to
from damaging import words
from statewise._src.checkpoint.orbax.stores import StorePath, listing, remove

POSITIONS = 25
# What is at the path itself for plain Orbax to read; Statewise reads what is in the directory of the writer.
FOR_ORBAX = {"_METADATA", "_sharding", "manifest.ocdbt", "commit_success.txt"}


def check_found_or_right(path: str, name: str) -> bool:
    """Returns whether a restore has found what is wrong; if not, it has the values that were saved."""
    try:
        restored, _ = sw.restore(path, numbered.plan().abstract())
    except (sw.CorruptedError, sw.RestoreError) as error:
        # The error says which object, or which leaf, or that there is no manifest.
        named = name in error.message or bool(error.leaves)
        if not named and name != "statewise.json":
            raise
        return True
    assert words(restored) == words(numbered.state(1))
    return False


@pytest.fixture
def two_steps(stores: str) -> Iterator[tuple[StorePath, StorePath]]:
    """Two checkpoints with as many objects."""
    for step in (1, 2):
        sw.save(f"{stores}/step_{step}", numbered.state(step))
    yield StorePath(f"{stores}/step_1"), StorePath(f"{stores}/step_2")
    restored, _ = sw.restore(f"{stores}/step_2", numbered.plan().abstract())
    assert words(restored) == words(numbered.state(2))


@pytest.mark.parametrize(
    "harm", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in HARM]
)
def test_a_corrupted_object_is_named_or_not_read(harm: str, two_steps: tuple[StorePath, StorePath]) -> None:
    path, other = two_steps
    own, others = objects(path), objects(other)
    assert len(own) == len(others)
    missed = set()
    for (name, data), instead in zip(own.items(), others.values(), strict=True):
        corrupted = HARM[harm](data, instead)
        if corrupted == data:  # two steps have the same
            continue
        set_to(path, name, corrupted)
        if not check_found_or_right(str(path), name):
            missed.add(name)
        set_to(path, name, data)
    assert missed <= FOR_ORBAX
    assert not check_found_or_right(str(path), "")


def test_two_steps_that_have_swapped_an_object_never_give_a_wrong_value(
    two_steps: tuple[StorePath, StorePath],
) -> None:
    path, other = two_steps
    own, others = objects(path), objects(other)
    for (name, data), (of_other, instead) in zip(own.items(), others.items(), strict=True):
        set_to(path, name, instead)
        set_to(other, of_other, data)
        check_found_or_right(str(path), name)
        set_to(path, name, data)
        set_to(other, of_other, instead)


def test_a_step_that_has_all_objects_of_another_is_that_step(two_steps: tuple[StorePath, StorePath]) -> None:
    """A copy of a checkpoint is one; nothing of what was there before may be mixed in."""
    path, other = two_steps
    remove(path, listing(path))
    for name, data in objects(other).items():
        set_to(path, name, data)
    restored, _ = sw.restore(str(path), numbered.plan().abstract())
    assert words(restored) == words(numbered.state(2))


@pytest.mark.slow
def test_a_bit_flipped_anywhere_is_found(two_steps: tuple[StorePath, StorePath]) -> None:
    path, _ = two_steps
    dice = random.Random(0)
    for name, data in objects(path).items():
        for at in dice.sample(range(len(data)), min(len(data), POSITIONS)):
            set_to(path, name, flipped(data, at, dice.randrange(8)))
            check_found_or_right(str(path), name)
        set_to(path, name, data)
