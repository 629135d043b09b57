"""Groups are of bounded size; saving and restoring leave the garbage collector alone."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from statewise._src.checkpoint.orbax.batching import grouped


@given(st.lists(st.integers(0, 12)), st.integers(1, 20))
def test_groups_keep_the_order_and_are_as_large_as_they_may_be(sizes: list[int], most: int) -> None:
    groups = list(grouped(sizes, lambda size: size, most))
    assert [size for group in groups for size in group] == sizes
    assert all(group and (sum(group) <= most or len(group) == 1) for group in groups)
    assert all(sum(group) + after[0] > most for group, after in itertools.pairwise(groups))


def test_the_garbage_collector_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def switched() -> None:
        raise AssertionError("a library does not switch a user's garbage collector")

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    for name in ("disable", "enable", "freeze"):
        monkeypatch.setattr(gc, name, switched)
    sw.save(tmp_path / "run", state)
    restored, _ = sw.restore(tmp_path / "run", state)
    assert not sw.diff(state, restored)
