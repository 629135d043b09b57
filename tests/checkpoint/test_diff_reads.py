"""What `sw.diff` reads of a checkpoint: nothing, if the other side has no values."""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from disagreeing import state_of
from statewise._src.checkpoint.diff import sources
from statewise._src.checkpoint.diff.diff import diff


def test_the_arrays_of_a_checkpoint_are_not_read_for_an_abstract_side(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("arrays were read")

    state = state_of(w=nnx.Param(jnp.ones(2)))
    sw.save(tmp_path / "run", state)
    monkeypatch.setattr(sources, "read_leaves", read)
    for one, other in itertools.permutations((tmp_path / "run", state.plan.abstract()), 2):
        found = diff(one, other)
        assert not found
        assert found.not_compared == {"params": 1}
    with pytest.raises(AssertionError, match="arrays were read"):
        diff(tmp_path / "run", state)
