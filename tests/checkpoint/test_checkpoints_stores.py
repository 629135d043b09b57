"""`sw.Checkpoints` on object stores: what it does on a disk, it does there."""

from __future__ import annotations

from collections.abc import Iterator

import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered

NEW = ocp.v1.training.Checkpointer


@pytest.fixture(params=["first async", "first sync", "new async", "new sync"])
def checkpoints(request: pytest.FixtureRequest, stores: str) -> Iterator[sw.Checkpoints]:
    """On each of Orbax's interfaces, on each store."""
    options = NEW if "new" in request.param else None
    url, asynchronous = f"{stores}/deep/run", "async" in request.param
    with sw.Checkpoints(url, max_to_keep=2, asynchronous=asynchronous, options=options) as made:
        yield made


def test_steps_are_saved_and_restored(checkpoints: sw.Checkpoints) -> None:
    assert (checkpoints.steps, checkpoints.latest) == ((), None)
    for step in (3, 5, 10):
        assert checkpoints.save(step, numbered(step), metrics={"loss": step / 2})
    checkpoints.wait()
    assert (checkpoints.steps, checkpoints.latest, len(checkpoints)) == ((5, 10), 10, 2)
    newest = checkpoints.restore(numbered(0), extra="metrics")
    assert (newest.step, number_of(newest.state), newest.extra) == (10, 10, {"metrics": {"loss": 5.0}})
    assert number_of(checkpoints.restore(numbered(0).plan.abstract(), step=5).state) == 5
