"""Reading published weights takes what the model takes, and one array of the files beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from programs.named_memory import LEAVES, SIDE

ROOT = Path(__file__).parents[2]
ONE = SIDE * SIDE * 4


def test_one_array_beside_the_target(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"model.layers.{i}.weight": rng.random((SIDE, SIDE), np.float32) for i in range(LEAVES)}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])}
    command = [sys.executable, str(ROOT / "tests/helpers/programs/named_memory.py"), str(tmp_path)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    grown, value = printed.split()
    assert float(value) == arrays["model.layers.1.weight"][5, 3]
    assert LEAVES * ONE <= int(grown) < (LEAVES + 1.5) * ONE
