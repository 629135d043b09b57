"""Starts a program of tests/helpers/programs in several processes, which find each other on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds, for processes that have to start, to find each other and to compile


class Started:
    """Processes, and what they print."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], files: list[Path]) -> None:
        self.processes = processes
        self._files = files

    def said(self, number: int = 0) -> str:
        return self._files[number].read_text()

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Waits for something that the processes do; fails with what they printed if they end or take too long."""
        end = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < end, self._all()
            assert any(process.poll() is None for process in self.processes) or is_so(), self._all()
            time.sleep(0.02)

    def ends(self) -> list[int]:
        """How each of them ended."""
        return [process.wait(timeout=PATIENCE) for process in self.processes]

    def _all(self) -> str:
        return "\n".join(self.said(number)[-3000:] for number in range(len(self._files)))

    def check_ended_well(self) -> None:
        assert self.ends() == [0] * len(self.processes), self._all()


@contextlib.contextmanager
def started(script: str, folder: Path, count: int, *arguments: object) -> Iterator[Started]:
    """Runs `script NUMBER COUNT PORT FOLDER ARGUMENTS` so many times at once; kills what is left at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/helpers")])
    program = str(ROOT / "tests/helpers/programs" / script)
    files = [folder.parent / f"{folder.name}.{number}.txt" for number in range(count)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, file in enumerate(files):
            command = [sys.executable, program, number, count, port, folder, *arguments]
            with file.open("w") as out:
                processes.append(
                    subprocess.Popen(list(map(str, command)), env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        yield Started(processes, files)
    finally:
        for process in processes:
            process.kill()
            process.wait()
