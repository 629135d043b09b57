"""Reading published weights takes what the model takes, and less than one array, or one layer of a stack, beside it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from programs.named_memory import SIDE

ROOT = Path(__file__).parents[2]
ONE = SIDE * SIDE * 4


def file_of(path: Path, single: int, stacked: int) -> None:
    """A file whose arrays are holes, which take no disk, but for one number in each: its own."""
    names = [f"model.layers.{i}.weight" for i in range(single)] + [f"model.blocks.{i}.weight" for i in range(stacked)]
    facts = {
        name: {"dtype": "F32", "shape": [SIDE, SIDE], "data_offsets": [number * ONE, (number + 1) * ONE]}
        for number, name in enumerate(names)
    }
    header = json.dumps(facts).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        begin = file.tell()
        file.truncate(begin + len(names) * ONE)
        for number in range(len(names)):
            file.seek(begin + number * ONE + (5 * SIDE + 3) * 4)
            file.write(struct.pack("<f", number + 1))


@pytest.mark.parametrize(("devices", "single", "stacked"), [(1, 24, 8), (8, 3, 4)], ids=["2 GB", "8 devices"])
def test_less_than_one_array_beside_the_target(tmp_path: Path, devices: int, single: int, stacked: int) -> None:
    file_of(tmp_path / "model.safetensors", single, stacked)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(ROOT / "tests/helpers/programs/named_memory.py"), str(tmp_path)]
    command += [str(single), str(stacked)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    grown, alone, of_stack = json.loads(printed)
    numbers = [number + 1.0 for number in range(single + stacked)]
    assert alone + of_stack == numbers
    assert (single + stacked) * ONE <= grown < (single + stacked + 1) * ONE
