"""What is no manifest, no checkpoint, or no file at all: refused in words, and never waited for."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

import statewise as sw
from damaging import state, words
from refusals import refused
from signing import LAYOUTS, corrupted, little_memory, saved
from statewise._src.checkpoint.format.manifest import FORMAT, LARGEST, NAME


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(saved(request.param), tmp_path / "copy")
    return tmp_path / "copy"


# --- no manifest at all ------------------------------------------------------------------------------------------

DEEP = b"[" * 200_000 + b"]" * 200_000
TEXT = b'{"statewise":1,"sha256":"%s","content":%s}\n'


def with_digest(content: bytes) -> bytes:
    return TEXT % (hashlib.sha256(content).hexdigest().encode(), content)


NOT_ONE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is not a manifest"),
    "not JSON": (b"PK\x03\x04 and so on", "it is not a manifest"),
    "JSON of something else": (b'{"content":{}}', "it is not a manifest"),
    "cut": (b'{"statewise":1,"sha256":"', "it is incomplete"),
    "format 0": (b'{"statewise":0,"sha256":"","content":{}}\n', "it is not a manifest"),
    "format as text": (b'{"statewise":"1","sha256":"","content":{}}\n', "it is not a manifest"),
    "another digest": (TEXT % (b"0" * 64, b"{}"), "its checksum does not match"),
    "deep": (with_digest(b'{"a":' + DEEP + b"}"), "it is nested too deeply"),
    "NaN": (with_digest(b'{"a":NaN}'), "its content is not JSON"),
    "infinite": (with_digest(b'{"a":1e999}'), "its content is not JSON"),
    "long number": (with_digest(b'{"a":' + b"9" * 9999 + b"}"), "its content is not JSON"),
    "a key twice": (with_digest(b'{"a":1,"a":2}'), "it is not written as Statewise writes it"),
    "spaces": (with_digest(b'{"a": 1}'), "it is not written as Statewise writes it"),
    "not ASCII": (with_digest('{"a":"\u00e9"}'.encode()), "its content is not JSON"),
    "other fields": (with_digest(b'{"a":1}'), "its content has other fields"),
    "open": (with_digest(b'{"a":1')[:-2] + b"}}\n", "its checksum does not match"),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_no_manifest_is_refused(name: str, tmp_path: Path) -> None:
    data, what = NOT_ONE[name]
    (tmp_path / NAME).write_bytes(data)
    for reading in (sw.inspect, lambda path: sw.restore(path, state())):
        with corrupted(tmp_path, what):
            reading(tmp_path)


def test_a_manifest_of_a_later_format_asks_for_an_update(folder: Path) -> None:
    (folder / NAME).write_bytes(b'{"statewise":%d,"whatever":{}}' % (FORMAT + 1))
    with refused(
        sw.CorruptedError,
        f"{folder / NAME} is of format {FORMAT + 1}; this version of Statewise reads formats up to {FORMAT}.",
        hint="update Statewise: pip install --upgrade statewise",
    ):
        sw.restore(folder, state())


def test_a_hundred_megabytes_are_not_read(folder: Path) -> None:
    os.truncate(folder / NAME, 100_000_000)
    with (
        refused(
            sw.CorruptedError,
            f"{folder / NAME} is not a manifest: it has 100000000 bytes, and the limit is {LARGEST}.",
            hint=None,
        ),
        little_memory(),
    ):
        sw.inspect(folder)


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
@pytest.mark.parametrize("name", [NAME, "_METADATA"])
def test_a_pipe_or_a_device_is_not_read(kind: str, name: str, folder: Path) -> None:
    size = (folder / name).stat().st_size
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(sw.CorruptedError) as caught:
        sw.restore(folder, state())
    assert size
    assert caught.value.message.endswith(f"{name} is not a file.")


def test_a_link_to_the_same_file_elsewhere_is_as_good(folder: Path, tmp_path: Path) -> None:
    for name in (NAME, "_METADATA", "manifest.ocdbt"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert words(sw.restore(folder, state(7))[0]) == words(state())
