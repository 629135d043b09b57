"""`plan.init` makes a large model where it is to lie: nowhere is there a full copy, not even for a moment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from programs.made_memory import LEAVES, SIDE

ROOT = Path(__file__).parents[2]
SIZE = LEAVES * SIDE * SIDE * 4


def measured(how: str) -> tuple[int, int]:
    """Bytes that a process took to make the model, and what one device of eight holds of it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])}
    command = [sys.executable, str(ROOT / "tests/helpers/programs/made_memory.py"), how]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    grown, largest = map(int, printed.split())
    return grown, largest


def test_init_takes_what_the_pieces_take() -> None:
    grown, largest = measured("init")
    assert largest == SIZE // 8
    assert SIZE <= grown < 1.5 * SIZE


def test_to_make_it_whole_and_place_it_then_takes_twice_as_much() -> None:
    """That the measurement sees a full copy, where there is one."""
    grown, largest = measured("take")
    assert largest == SIZE // 8
    assert grown >= 1.9 * SIZE
