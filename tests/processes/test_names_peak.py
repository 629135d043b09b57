"""Reading published weights takes what the model takes, and less than one array, or one layer of a stack, beside it."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

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


def test_less_than_one_array_beside_the_target(tmp_path: Path) -> None:
    """A mesh of 8 devices; then 2 GB on one. One process, most of whose time are imports."""
    cases = [("mesh", 3, 4, 8), ("whole", 24, 8, 1)]
    for name, single, stacked, _ in cases:
        (tmp_path / name).mkdir()
        file_of(tmp_path / name / "model.safetensors", single, stacked)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    program = ROOT / "tests/helpers/programs/named_memory.py"
    asked = json.dumps([(str(tmp_path / name), *rest) for name, *rest in cases])
    printed = subprocess.run(
        [sys.executable, str(program), asked], env=environment, capture_output=True, text=True, check=True
    ).stdout
    for (_, single, stacked, _), (grown, numbers) in zip(cases, json.loads(printed), strict=True):
        count = single + stacked
        assert numbers == [number + 1.0 for number in range(count)]
        assert 0.95 * count * ONE <= grown < (count + 1) * ONE
