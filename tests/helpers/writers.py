"""Writers in processes of their own, which a test kills: many, each for the price of a fork."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "helpers/programs/fork_writers.py"
PATHS = (TESTS / "helpers", TESTS.parent / "src")


class Template:
    """A process of which each writer is a fork."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def killed(
        self,
        how: str,
        base: str,
        first: int,
        after: float,
        *,
        saves: int = 0,
        when_begun: Callable[[], object] | None = None,
    ) -> Killed:
        """Has a writer save one step after the other, and kills it some time after a save has begun.

        Args:
            how: `plain` writers save to a path for each step, `managed` ones keep two.
            base: The path under which it saves.
            first: Its first step.
            after: So many seconds after it begins the save that is cut short.
            saves: So many saves are done before that one.
            when_begun: Is called when it has begun the first.
        """
        self._input.write(f"{base} {first} {how}\n")
        self._input.flush()
        pid, seen = 0, Killed(first)
        killer: threading.Timer | None = None
        for line in iter(self._process.stdout.readline, ""):  # type: ignore[union-attr]
            word, *rest = line.split(" ", 2)
            number = int(rest[0])
            if word == "pid":
                pid = number
            elif word == "begun":
                seen.begun = number
                if when_begun is not None and number == first:
                    when_begun()
                if number == first + saves:
                    killer = threading.Timer(after, kill, (pid,))
                    killer.start()
            elif word == "done":
                seen.done = number
            elif word == "failed":
                seen.failed = rest[1].strip()
            elif word == "ended":
                break
        if killer is not None:
            killer.cancel()
            killer.join()
        assert self._process.poll() is None, "the template has ended"
        return seen


class Killed:
    """What a writer had said when it was killed.

    Attributes:
        begun: The last step that it began to save; -1 if none.
        done: The last that it had saved; -1 if none.
        failed: What an error said that ended it.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.begun = self.done = -1
        self.failed = ""

    def __repr__(self) -> str:
        return f"Killed(first={self.first}, begun={self.begun}, done={self.done}, failed={self.failed!r})"


def kill(pid: int) -> None:
    """Kills a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def template(variables: Mapping[str, str]) -> Iterator[Template]:
    """Runs a template of writers, with these variables in its environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "OPENBLAS_NUM_THREADS": "1",
        **variables,
    }
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, str(PROGRAM)], stdin=pipe, stdout=pipe, text=True, env=environment) as made:
        try:
            yield Template(made)
        finally:
            made.kill()
