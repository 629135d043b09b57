"""Orbax's emergency manager with the arrays of a state, in two processes: one has the newest step, both restore it."""

from __future__ import annotations

from pathlib import Path

import pytest

from programs.emergency_together import STEPS
from started import started


@pytest.mark.slow
def test_both_processes_restore_a_step_that_only_one_has_kept(tmp_path: Path) -> None:
    with started("emergency_together.py", tmp_path / "run", 2) as running:
        running.check_ended_well()
        assert all(f"the same at {STEPS}" in running.said(number) for number in range(2))
    kept = {place.name: sorted(step.name for step in place.iterdir()) for place in (tmp_path / "run").iterdir()}
    assert kept == {"local0": [], "local1": ["4", "5"], "lasting": ["2", "4"]}
