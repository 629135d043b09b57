"""Servers that tests start, and that never outlive them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs/tied.py"


@contextlib.contextmanager
def tied(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Runs a command that ends with this process, however that ends."""
    program = [sys.executable, str(PROGRAM), *command]
    pipe, silent = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=silent, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
