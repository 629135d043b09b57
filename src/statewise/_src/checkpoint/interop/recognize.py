"""Recognizing files that are not checkpoints, by their first bytes, with what can be read instead.

A file of another format is not corrupted, and fetching it again does not help.  Nothing in it is executed or unpacked.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from statewise._src.checkpoint.format.manifest import LARGEST, NAME
from statewise._src.checkpoint.orbax.stores import StorePath, copying

__all__ = ["Recognized", "looks_like_safetensors", "recognized", "within"]

_HEAD = 4096
# The package safetensors does not accept a longer header.
_HEADER = 100_000_000
_OF_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt")
_INDEX = ".safetensors.index.json"
_READ = "what can be read: a checkpoint of Statewise or of Orbax (its directory), or a .safetensors file"
_AS_DICT = "read it into nested dicts of arrays, and: sw.convert(arrays, 'converted', target=target)"
_UNPACK = "unpack it, and give what is in it"
_PICKLE = (
    "it is not read, because a pickle can run any code; write its arrays as safetensors with the program that it is "
    "from: safetensors.torch.save_file(tensors, 'model.safetensors'), or safetensors.numpy"
)
# The first bytes of a format, what it is, and what helps.
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _AS_DICT),
    (b"GGUF", "a GGUF file", _AS_DICT),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file itself", "git lfs pull"),
)


class Recognized(NamedTuple):
    """A recognized file: what it is in words, the hint, and whether its contents leave no doubt."""

    what: str
    hint: str
    certain: bool = True


def recognized(path: Any) -> Recognized:
    """Returns what a file is that cannot be read as a checkpoint."""
    file = path if isinstance(path, StorePath) else FilePath(os.fspath(path))
    if file.name in (NAME, *_OF_ORBAX):
        what = "the manifest of one" if file.name == NAME else "a file of an Orbax checkpoint"
        return Recognized(what, f"the directory that it is in: {str(file.parent)!r}")
    if isinstance(file, StorePath):
        return Recognized("a file", f"copy it to a disk, and give that: {copying(file)}", False)
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    text, start = str(file), head.lstrip()[:1]
    if looks_like_safetensors(head):
        return Recognized("a safetensors file", _then_restored(repr(text)), False)
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return Recognized(what, hint)
    if head.startswith(b"\x93NUMPY"):
        return Recognized("a NumPy .npy file", _then_restored(f"{{'path/of/the/leaf': np.load({text!r})}}"))
    if head.startswith(b"PK\x03\x04"):
        return _zipped(file)
    # A pickle of protocol 2 to 5, and then an opcode.
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:3] not in (b"", b"\0"):
        return Recognized("a pickle", _PICKLE)
    if head[257:262] == b"ustar":
        return Recognized("a tar archive", _UNPACK)
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return Recognized("an HTML page", "fetch the file itself: this is a page about it, or about an error")
    if start in (b"{", b"[") and file.stat().st_size <= LARGEST and (as_json := _json(file)) is not None:
        return as_json
    if file.name.endswith(".msgpack"):
        loaded = f"flax.serialization.msgpack_restore(pathlib.Path({text!r}).read_bytes())"
        return Recognized("a msgpack file", _then_restored(loaded), False)
    what = "an empty file" if not head else "a text file" if _is_text(head) else "a file in an unknown format"
    return Recognized(what, _READ, False)


def looks_like_safetensors(head: bytes) -> bool:
    """Returns whether a file starts as safetensors does: with its header's length, then JSON."""
    return 2 <= int.from_bytes(head[:8], "little") <= _HEADER and head[8:9] == b"{"


def _then_restored(source: str) -> str:
    return f"sw.convert({source}, 'converted', target=target); sw.restore('converted', target)"


def _zipped(file: FilePath) -> Recognized:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # not a zip file that can be read
        names = []
    if names and all(name.endswith(".npy") for name in names):
        return Recognized("a NumPy .npz file", _then_restored(f"dict(np.load({str(file)!r}))"))
    if any(name.endswith("data.pkl") for name in names):
        return Recognized("a PyTorch file, which holds a pickle", _PICKLE)
    if "model.weights.h5" in names:
        return Recognized("a Keras file", _AS_DICT)
    return Recognized("a zip archive", _UNPACK)


def _json(file: FilePath) -> Recognized | None:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return Recognized("the index of a checkpoint in several safetensors files", _of_folder(file.parent))
    return Recognized("a JSON file", _READ)


def _of_folder(folder: object) -> str:
    """Returns how a folder of safetensors files is read, by other names or by ours."""
    return (
        f"sw.restore({str(folder)!r}, target, names=names)  # sw.Names, which say what our leaves are called there\n"
        f"or, if they have the names of ours: {_then_restored(repr(str(folder)))}"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # otherwise a letter is cut off at the end of the head
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in text)


def within(folder: Any) -> Recognized | None:
    """Returns what a directory holds that can be read, if it is not a checkpoint itself; None for nothing."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    indices = [name for name in names if name.endswith(_INDEX)]
    files = [name for name in names if name.endswith(".safetensors")]
    held = (indices or files)[:1]
    hint = f"copy it to a disk: {copying(folder)}" if isinstance(folder, StorePath) else _of_folder(folder)
    return Recognized(f"holds {held[0]}", hint) if held else None
