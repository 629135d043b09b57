"""What JAX compiled for one run of the suite is there for the next one, whichever worker compiled it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEST = "tests/core/test_state.py::test_jax_takes_a_state_as_it_is"


def run(folder: Path) -> set[str]:
    """Runs a test with a worker, as `make` does; returns the files in the folder."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", TEST]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    return {path.name for path in folder.iterdir() if path.name.endswith("-cache")}


def test_workers_keep_what_jax_compiled(tmp_path: Path) -> None:
    assert run(tmp_path)


@pytest.mark.slow
def test_half_a_file_is_compiled_again_without_a_failure(tmp_path: Path) -> None:
    kept = run(tmp_path)
    for name in kept:
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[:-10])
    assert run(tmp_path) == kept  # under the same names: this run looked for them
