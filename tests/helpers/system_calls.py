"""The system calls of a program, by strace: each call that changes files, with all its data, in the order of its end.

Where strace is missing, or may not follow a program (a container can forbid ptrace), tests that need it are skipped.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

__all__ = ["CHANGING", "STRACE", "Call", "Handle", "calls_in", "need_strace", "traced"]

STRACE = "strace"
WITHOUT = "there is no strace: run `.ci/strace` as root, or `apt-get install strace`"
# Every call that can change a file or a directory, or make a change last; `io_uring_setup`, because what goes through
# such a ring is not seen.
CHANGING = (
    "open,openat,openat2,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,rename,renameat,"
    "renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,sync,syncfs,"
    "sync_file_range,sendfile,copy_file_range,splice,io_uring_setup,mmap"
)
_LONGEST = 1 << 24  # bytes of a call's data that are shown
_LINE = re.compile(r"(\d+) +(.*)")
_START = re.compile(r"(\w+)\((.*)")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_END = re.compile(
    r"(.*)\) += (-?\d+|\?|0x[0-9a-f]+)(<.*?>)?(?:\(deleted\))?(?: (\w+) \(.*\))?(?: \(INJECTED\))?", re.DOTALL
)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_HANDLE = re.compile(r"(-?\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*|[^>\\]*)>(?:\(deleted\))?")


class Handle(NamedTuple):
    """An open file among a call's arguments: its number (-100 for the working directory), and its path."""

    number: int
    path: str


class Call(NamedTuple):
    """A system call.

    Attributes:
      thread: the thread that made it.
      name: its name.
      arguments: strings as bytes, open files as handles, the rest as strace shows it.
      result: what it returned; -1 if it failed.
      made: for a call that opens a file, its path.
      error: the name of the error; empty if there was none.
      start: the number of the line at which it began.
      end: the number of the line at which it had ended.
    """

    thread: int
    name: str
    arguments: tuple[bytes | Handle | str, ...]
    result: int
    made: str
    error: str
    start: int
    end: int


@functools.cache
def _why_not() -> str:
    """Why strace cannot follow a program here; empty if it can."""
    if shutil.which(STRACE) is None:
        return WITHOUT
    done = subprocess.run([STRACE, "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"strace cannot follow a program here: {done.stderr.strip()[:200]}"


def need_strace() -> None:
    """Skips a test where there is no strace, or it may not follow programs."""
    if why := _why_not():
        pytest.skip(why)


def traced(command: Sequence[str], environment: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], list[Call]]:
    """Runs a program, and gives what it printed and its calls that change files."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "calls")
        # Paths and data in hexadecimal, so that no byte of them can be taken for the line's own.
        how = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", str(_LONGEST), "-e", "signal=none", "-e", f"trace={CHANGING}"]
        done = subprocess.run(
            [STRACE, *how, "-o", str(log), *command], env=environment, capture_output=True, text=True, check=False
        )
        return done, list(calls_in(log.read_text()))


def calls_in(log: str, cut: bool = False) -> Iterator[Call]:
    """The calls in what strace has written, in the order in which they ended; `cut` allows data that is cut."""
    unfinished: dict[tuple[int, str], tuple[int, str]] = {}
    for number, line in enumerate(log.splitlines()):
        match = _LINE.fullmatch(line)
        assert match is not None, line[:200]
        thread, text = int(match[1]), match[2]
        if text.startswith(("+++", "---")):
            continue
        if text.endswith("<unfinished ...>"):
            started = _START.fullmatch(text.removesuffix("<unfinished ...>").rstrip())
            assert started is not None, text[:200]
            unfinished[thread, started[1]] = (number, started[2])
            continue
        if resumed := _RESUMED.fullmatch(text):
            start, before = unfinished.pop((thread, resumed[1]))
            name, rest = resumed[1], before + resumed[2]
        else:
            whole = _START.fullmatch(text)
            assert whole is not None, text[:200]
            start, name, rest = number, whole[1], whole[2]
        yield _call(thread, name, rest, (start, number), cut)


def _call(thread: int, name: str, rest: str, lines: tuple[int, int], cut: bool) -> Call:
    match = _END.fullmatch(rest)
    assert match is not None, (name, rest[-300:])
    arguments, result, made, error = match.groups()
    given = tuple(_argument(text, cut) for text in _split(arguments))
    opened = _text(made[1:-1]) if made else ""
    return Call(thread, name, given, -1 if result == "?" else int(result, 0), opened, error or "", *lines)


def _split(arguments: str) -> Iterator[str]:
    """The arguments of a call: what is between commas, but for those within brackets."""
    depth, current = 0, ""
    for part in re.split(r"([\[\]{}<>]|, )", arguments):
        depth += (part in ("[", "{", "<")) - (part in ("]", "}", ">"))
        if part == ", " and depth == 0:
            yield current
            current = ""
        else:
            current += part
    if current:
        yield current


def _argument(text: str, cut: bool) -> bytes | Handle | str:
    if match := _STRING.fullmatch(text):
        assert cut or not match[2], "strace has cut the data"
        return bytes.fromhex(match[1].replace("\\x", ""))
    if match := _HANDLE.fullmatch(text):
        return Handle(-100 if match[1] == "AT_FDCWD" else int(match[1]), _text(match[2]))
    if text.startswith("[{iov_base="):
        parts = re.findall(r'iov_base="((?:\\x[0-9a-f]{2})*)"(\.\.\.)?', text)
        assert cut or not any(dots for _, dots in parts), "strace has cut the data"
        return bytes.fromhex("".join(data for data, _ in parts).replace("\\x", ""))
    return text


def _text(shown: str) -> str:
    return bytes.fromhex(shown.replace("\\x", "")).decode() if shown.startswith("\\x") else shown
