"""SIGTERM, as machines that are taken away send it: the step at hand is saved, with its data, and the process ends.

With several processes that train together: test_multihost.py.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from iterators import Counting, drawn
from started import started


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("flag", 1),
        ("new", 1),
        pytest.param("first", 1, marks=pytest.mark.slow),
    ],
)
def test_a_sigterm_saves_the_step_at_hand_and_ends_the_process(tmp_path: Path, how: str, count: int) -> None:
    with started("preempted.py", tmp_path / "run", count, how) as running:
        running.wait_until(lambda: "step 5\n" in running.said())
        running.processes[-1].send_signal(signal.SIGTERM)
        running.check_ended_well()
        ends = [re.search(r"ended at (\d+) True", running.said(number)) for number in range(count)]
    assert None not in ends
    steps = {int(found[1]) for found in ends if found is not None}
    assert len(steps) == 1
    iterator, expected = Counting(), Counting()
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        assert set(checkpoints.steps) == steps
        if count == 1:
            result = checkpoints.restore(numbered(0), data=iterator)
            assert {number_of(result.state)} == steps
            drawn(expected, result.step)
            assert drawn(iterator, 50) == drawn(expected, 50)
