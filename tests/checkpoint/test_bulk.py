"""The garbage collector rests while many small objects are made, and not a moment longer."""

from __future__ import annotations

import gc

import pytest

from statewise.checkpoint.bulk import no_collection


def test_the_collector_rests_within_and_goes_on_after() -> None:
    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), no_collection():
        1 / 0
    assert gc.isenabled()


def test_blocks_within_blocks_end_with_the_outermost() -> None:
    with no_collection():
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_the_user_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
