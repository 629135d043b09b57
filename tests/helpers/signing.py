"""Manifests that say whatever a test wants, with a digest that holds."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import statewise as sw
from damaging import state
from refusals import refused
from statewise._src.checkpoint.format.manifest import FORMAT, NAME

LAYOUTS = ("named", "packed")
AGAIN = "restore another checkpoint"


@functools.cache
def saved(layout: str) -> Path:
    """A checkpoint, once in a run."""
    folder = Path(tempfile.mkdtemp()) / layout
    sw.save(folder, state(), layout=layout)
    return folder


def content_of(folder: Path) -> Any:
    return json.loads((folder / NAME).read_text())["content"]


def signed(content: Any, version: int = FORMAT) -> bytes:
    """A manifest of this content whose digest holds, whatever the content."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"statewise":{version},"sha256":"{digest}","content":{text}}}\n'.encode()


def rewritten(folder: Path, change: Callable[[Any], object]) -> None:
    content = content_of(folder)
    change(content)
    (folder / NAME).write_bytes(signed(content))


def corrupted(folder: Path, what: str) -> Any:
    return refused(sw.CorruptedError, f"{folder / NAME} is corrupted: {what}.", hint=AGAIN)


class little_memory:
    """Not a gibibyte more address space than now: who allocates more gets an error, and the test fails."""

    def __enter__(self) -> None:
        used = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)
