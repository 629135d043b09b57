"""Groups are of bounded size; the collector rests while many small objects are made, and not a moment longer."""

from __future__ import annotations

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise._src.checkpoint.orbax.batching import grouped, no_collection


@given(st.lists(st.integers(0, 12)), st.integers(1, 20))
def test_groups_keep_the_order_and_are_as_large_as_they_may_be(sizes: list[int], most: int) -> None:
    groups = list(grouped(sizes, lambda size: size, most))
    assert [size for group in groups for size in group] == sizes
    assert all(group and (sum(group) <= most or len(group) == 1) for group in groups)
    assert all(sum(group) + after[0] > most for group, after in itertools.pairwise(groups))


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
