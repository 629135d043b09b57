"""A disk that fails at any call of a save: full, broken, over the quota, interrupted.  Nothing that was saved is lost.

strace makes the calls fail, in the kernel's place: those of Python, of TensorStore and of Orbax alike.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from programs.save_injected import CANNOT_ATTACH, NAMELESS
from system_calls import need_strace

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "helpers/programs/save_injected.py"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, (TESTS / "helpers", TESTS.parent / "src"))),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
}
ERRORS = ["ENOSPC", "EIO", "EDQUOT", "EINTR"]
MANAGED = [
    ("write", f"/d/{NAMELESS}", ["EDQUOT+"]),
    ("write", "/2.orbax-checkpoint-tmp/_CHECKPOINT_METADATA", ["EIO"]),
    ("fsync", "/run", ["EIO"]),
    ("rename", "/2.orbax-checkpoint-tmp", ["ENOSPC"]),
    ("unlinkat", "/run/1", ["EIO"]),
]
ALWAYS = {
    "save": [
        ("mkdir", "/d", ["EDQUOT"]),
        ("write", f"/d/{NAMELESS}", ["ENOSPC+"]),
        ("fsync", "/d", ["EINTR"]),
        ("write", "/statewise.json", ["EINTR", "EIO"]),
        ("fsync", "/work", ["EIO"]),
    ],
    "first": MANAGED,
    "newer": MANAGED,
}
COMPLETE = {way: [("", "", ERRORS)] for way in ALWAYS}


def told(folder: Path, cases: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What happened in each case; the process has to end by itself."""
    need_strace()
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), json.dumps(cases)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == CANNOT_ATTACH:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-5000:]
    yield from map(json.loads, done.stdout.splitlines())


def check(case: dict[str, Any]) -> None:
    """The old one is there, the new one is complete or not there, and one line says what the system said."""
    new = "new" if case["way"] == "save" else "2"
    assert case["hit"], case
    assert case["there"]["old"] == 1, case
    assert case["there"].get(new, 2) == 2, case
    assert case["there"].get("1") == 1 or case["there"].get(new) == 2, case
    if case["type"]:
        assert case["type"] == "SaveError", case
        assert os.strerror(getattr(errno, case["error"].rstrip("+"))) in case["message"], case
        assert "\n" not in case["message"], case
    else:
        assert new in case["there"], case
    if case["way"] == "save":
        assert case["names"] == ["old", "run", "run/1"] if case["type"] else ["new", "old", "run", "run/1"], case
        assert not case["type"] or case["message"].endswith("Nothing of it is left."), case
    if case["again"] and case["again"]["type"]:  # only if it is there
        assert new in case["there"], case
        assert case["again"]["message"] == f"There is already a step 2 in {case['folder']}/run.", case
    assert case["there after"][new] == 2, case
    assert not [name for name in case["names after"] if "tmp" in name], case


def test_what_fails_loses_nothing_and_says_why(tmp_path: Path) -> None:
    cases = list(told(tmp_path, ALWAYS))
    for case in cases:
        check(case)
    said = {(case["way"], case["call"], case["path"]): case["message"] for case in cases if case["type"]}
    run = tmp_path / "work" / "run"
    new = tmp_path / "work" / "new"
    assert said["save", "fsync", "."] == f"{new} could not be written: Input/output error. Nothing of it is left."
    for way in ("first", "newer"):
        assert said[way, "fsync", "run"] == (
            f"A step could not be written to {run}: Input/output error. Earlier steps are complete."
        )
        assert said[way, "unlinkat", "run/1"] == (
            f"Step 2 in {run} is complete, but not what Orbax does after it, such as deleting older steps: "
            "Input/output error."
        )


@pytest.mark.slow
def test_whatever_fails_loses_nothing_and_says_why(tmp_path: Path) -> None:
    cases = list(told(tmp_path, COMPLETE))
    assert len(cases) > 500, "every call was tried"
    for case in cases:
        check(case)
