"""Run as a program by the tests of failing disks: saves, while strace makes one system call after the other fail.

`python save_injected.py FOLDER CASES`: for each way to save it traces a save first, for the calls that it makes and
their paths; then it saves once for each call that the cases select, which fails once, and prints what happened.  CASES
is JSON: for each way a list of calls (empty for all), the end of their path, and the errors; `ENOSPC+` every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

import statewise as sw
from checkpoint_models import number_of, numbered
from system_calls import CHANGING, STRACE, Call, Handle, calls_in

__all__ = ["CANNOT_ATTACH", "NAMELESS"]

CANNOT_ATTACH = 77  # the exit status where strace may not follow a process that runs already
# What stands for a file with a random name, as TensorStore gives its data files.
NAMELESS = "0" * 32

FAILING = [name for name in CHANGING.split(",") if name not in ("mmap", "io_uring_setup")]
ALLOW_ANYONE = 0x59616D61  # prctl's PR_SET_PTRACER: a child of this process may follow it
PATIENCE = 100  # seconds for one save: after that all threads are printed, and the process ends
RANDOM = re.compile(r"(?<=/d/)[0-9a-f]{32}$")


@contextlib.contextmanager
def followed(options: Sequence[str], log: Path) -> Iterator[None]:
    """Has strace follow this process, with all its threads."""
    command = [STRACE, "-f", "-y", "-xx", "-s", "64", "-e", "signal=none", *options, "-o", str(log)]
    with subprocess.Popen([*command, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        while "Requested path" in said:
            said = strace.stderr.readline()
        if "attached" not in said:
            print(f"strace cannot follow a process that runs already: {said.strip()}", file=sys.stderr)
            sys.exit(CANNOT_ATTACH)
        try:
            yield
        finally:
            strace.terminate()
            strace.stderr.read()


# --- the ways to save --------------------------------------------------------------------------------------------


def save(folder: Path) -> None:
    """Beside an older one."""
    sw.save(folder / "new", numbered(2))


def checkpoints(folder: Path, options: Any = None) -> None:
    """A step after an older one, which is then deleted."""
    with sw.Checkpoints(folder / "run", max_to_keep=1, options=options) as steps:
        steps.save(2, numbered(2), metrics={"loss": 1.0})
        steps.wait()


WAYS: dict[str, Callable[[Path], None]] = {
    "save": save,
    "first": checkpoints,
    "newer": functools.partial(checkpoints, options=ocp.v1.training.Checkpointer),
}


def older(folder: Path) -> None:
    """What is there before."""
    sw.save(folder / "old", numbered(1))
    with sw.Checkpoints(folder / "run") as steps:
        steps.save(1, numbered(1), metrics={"loss": 2.0})


def there(folder: Path) -> dict[str, float | str]:
    """What is there, by name: its number, or why it cannot be restored."""
    found: dict[str, float | str] = {}
    places = {path.name: path for path in (folder / "old", folder / "new") if path.exists()}
    with sw.Checkpoints(folder / "run") as steps:
        places |= {str(step): steps.path(step) for step in steps}
    for name, path in places.items():
        try:
            found[name] = number_of(sw.restore(path, numbered(-1))[0])
        except sw.StatewiseError as error:
            found[name] = f"{type(error).__name__}: {error.message}"
    return found


def names(folder: Path) -> list[str]:
    """What stands in the directories that are saved to."""
    return sorted([*os.listdir(folder), *(f"run/{name}" for name in os.listdir(folder / "run"))])


# --- calls that fail ---------------------------------------------------------------------------------------------


def path_of(call: Call, folder: Path) -> str | None:
    """The first path among a call's arguments, by which strace can select it; None if it is outside the folder."""
    first = 1 if call.name in ("write", "pwrite64", "writev", "pwritev", "pwritev2") else 2
    paths = [given for given in call.arguments[:first] if isinstance(given, (bytes, Handle))]
    shown = [given.path if isinstance(given, Handle) else given.decode() for given in paths]
    return next((path for path in shown if f"{path}/".startswith(f"{folder}/")), None)


def calls_of(way: str, folder: Path) -> list[tuple[str, str]]:
    """The calls that a save makes in the folder, each once, with its path."""
    log = folder.parent / "log"
    with followed(["-e", f"trace={','.join(FAILING)}"], log):
        WAYS[way](folder)
    calls = [(call.name, path_of(call, folder)) for call in calls_in(log.read_text(), cut=True)]
    pairs = {(name, RANDOM.sub(NAMELESS, path)) for name, path in calls if path is not None}
    # A file with a random name cannot be selected, only the first call of its sort, and other files are opened before.
    return sorted((name, path) for name, path in pairs if name != "openat" or not path.endswith(NAMELESS))


def tried(way: str, folder: Path, template: Path, call: str, path: str, error: str) -> dict[str, Any]:
    """Saves while a call on a path fails, once in each thread or every time; tells what happened."""
    shutil.rmtree(folder)
    shutil.copytree(template, folder)
    log = folder.parent / "log"
    where = [] if path.endswith(NAMELESS) else ["-P", path]
    said: dict[str, Any] = {"call": call, "path": os.path.relpath(path, folder), "error": error}
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    failing = f"inject={call}:error={error.rstrip('+')}:when=1{'+' if error.endswith('+') else ''}"
    with followed([*where, "-e", f"trace={call}", "-e", failing], log):
        said |= saved(way, folder)
    said["hit"] = log.read_text().count("(INJECTED)")
    said["names"], said["there"] = names(folder), there(folder)
    said["again"] = saved(way, folder) if said["type"] else None
    said["names after"], said["there after"] = names(folder), there(folder)
    faulthandler.cancel_dump_traceback_later()
    return said


def saved(way: str, folder: Path) -> dict[str, str]:
    """Saves; tells the error, if there is one."""
    try:
        WAYS[way](folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
        return {"type": type(error).__name__, "message": getattr(error, "message", str(error))}
    return {"type": "", "message": ""}


def main(folder: Path, cases: dict[str, list[tuple[str, str, list[str]]]]) -> None:
    """Tries all cases of each way."""
    ctypes.CDLL(None).prctl(ALLOW_ANYONE, ctypes.c_ulong(2**64 - 1), 0, 0, 0)
    secrets.randbits = lambda bits: 7  # so that a temporary directory has the same name every time
    template = folder / "template"
    template.mkdir()
    older(template)
    for way, selected in cases.items():
        work = folder / "work"
        shutil.copytree(template, work)
        calls = calls_of(way, work)
        for name, end, errors in selected:
            chosen = [(call, path) for call, path in calls if call.startswith(name) and path.endswith(end)]
            assert chosen, (way, name, end, calls)
            for call, path in chosen:
                for error in errors:
                    told = tried(way, work, template, call, path, error)
                    print(json.dumps({"way": way, "folder": str(work), **told}), flush=True)
        shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
