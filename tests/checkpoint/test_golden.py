"""What earlier versions wrote, this one reads: each golden checkpoint restores to the bit, or says what is corrupted.

`tests/golden/make.py` made them; no test writes there.
"""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statewise as sw
from golden_scripts import GOLDEN, load

NAMES = sorted(path.stem for path in GOLDEN.glob("v*.json"))


@pytest.fixture(scope="module")
def make() -> types.ModuleType:
    return load("make")


def expected(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_there_is_one_of_each_sort() -> None:
    assert {"v1-adapter", "v1-named", "v1-packed"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_restores_to_what_was_saved(name: str, make: types.ModuleType) -> None:
    state, report = sw.restore(GOLDEN / name, make.plan().abstract())
    assert report.ok
    assert make.values(state) == expected(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_can_be_looked_at(name: str, make: types.ModuleType) -> None:
    census = sw.inspect(GOLDEN / name)
    assert sw.preview(GOLDEN / name, make.plan().abstract()).ok
    assert census["lora"].size == 4
    assert name == "v1-adapter" or census["params"].size == 2 * (4 + 2 + 2 + 2) + 3
    assert "lora_a" in json.dumps([str(leaf) for leaf in sw.preview(GOLDEN / name, make.plan().abstract()).leaves])


HARM: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a bit of the manifest": ("statewise.json", lambda data: data[:900] + bytes([data[900] ^ 1]) + data[901:]),
    "half a manifest": ("statewise.json", lambda data: data[: len(data) // 2]),
    "a bit of Orbax's index": ("_METADATA", lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "a bit of the database": ("manifest.ocdbt", lambda data: data[:-1] + bytes([data[-1] ^ 128])),
    "an empty file": ("manifest.ocdbt", lambda data: b""),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_that_was_damaged_says_where(
    name: str, harm: str, make: types.ModuleType, tmp_path: Path
) -> None:
    for golden in NAMES:  # beside each other: one of them is the base of another
        shutil.copytree(GOLDEN / golden, tmp_path / golden)
    file, change = HARM[harm]
    (tmp_path / name / file).write_bytes(change((tmp_path / name / file).read_bytes()))
    with pytest.raises(sw.CorruptedError) as caught:
        sw.restore(tmp_path / name, make.plan().abstract())
    assert file in caught.value.message


def test_what_is_saved_now_restores_as_the_golden_ones_do(make: types.ModuleType, tmp_path: Path) -> None:
    state, _ = sw.restore(GOLDEN / "v1-named", make.plan().abstract())
    sw.save(tmp_path / "again", state)
    assert make.values(sw.restore(tmp_path / "again", make.plan().abstract())[0]) == expected("v1-named")
