"""What a file is that is not a checkpoint: said by its first bytes, with what is read instead.

A file of another format is not corrupted, and to fetch it again does not help.  Nothing of it is run, and nothing is
unpacked.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from statewise._src.checkpoint.format.manifest import LARGEST, NAME

__all__ = ["Recognized", "looks_like_safetensors", "recognized", "within"]

_HEAD = 4096
# A header of safetensors is not longer: the package says so.
_HEADER = 100_000_000
_OF_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt")
_INDEX = ".safetensors.index.json"
_READ = "what is read: a checkpoint of Statewise or of Orbax (its directory), or a .safetensors file"
_AS_DICT = "read it into nested dicts of arrays, and: sw.convert(arrays, 'converted', target=target)"
_PICKLE = (
    "it is not read, as a pickle can run any code; write its arrays as safetensors with the program that it is from: "
    "safetensors.torch.save_file(tensors, 'model.safetensors'), or safetensors.numpy"
)
# The first bytes of a format, what it is, and what helps.
_MAGIC = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _AS_DICT),
    (b"GGUF", "a GGUF file", _AS_DICT),
    (b"\x1f\x8b", "an archive of gzip", "unpack it, and give what is in it"),
    (b"\x28\xb5\x2f\xfd", "an archive of zstd", "unpack it, and give what is in it"),
    (b"version https://git-lfs", "a pointer of Git LFS, in the place of the file itself", "git lfs pull"),
)


class Recognized(NamedTuple):
    """What a file is: in words, the hint, and whether its contents say so beyond doubt."""

    what: str
    hint: str
    certain: bool = True


def recognized(path: Any) -> Recognized:
    """What a file is that cannot be read as a checkpoint."""
    file = FilePath(os.fspath(path))
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    text, start = str(file), head.lstrip()[:1]
    if file.name == NAME:
        return Recognized("the manifest of one", f"the directory that it is in: {str(file.parent)!r}")
    if file.name in _OF_ORBAX:
        return Recognized("a file of an Orbax checkpoint", f"the directory that it is in: {str(file.parent)!r}")
    if looks_like_safetensors(head):
        return Recognized("a safetensors file", _then_restored(repr(text)), False)
    for magic, what, hint in _MAGIC:
        if head.startswith(magic):
            return Recognized(what, hint)
    if head.startswith(b"\x93NUMPY"):
        return Recognized("an .npy file of NumPy", _then_restored(f"{{'path/of/the/leaf': np.load({text!r})}}"))
    if head.startswith(b"PK\x03\x04"):
        return _zipped(file)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:3] not in (b"", b"\0"):
        return Recognized("a pickle", _PICKLE)
    if head[257:262] == b"ustar":
        return Recognized("an archive of tar", "unpack it, and give what is in it")
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return Recognized("an HTML page", "fetch the file itself: this is a page about it, or of an error")
    if start in (b"{", b"[") and file.stat().st_size <= LARGEST:
        found = _json(file)
        if found is not None:
            return found
    if file.name.endswith(".msgpack"):
        loaded = f"flax.serialization.msgpack_restore(pathlib.Path({text!r}).read_bytes())"
        return Recognized("a msgpack file", _then_restored(loaded), False)
    if not head:
        return Recognized("an empty file", _READ, False)
    what = "a text file" if _is_text(head) else "a file of a format that is not known here"
    return Recognized(what, _READ, False)


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file begins as one of safetensors does: with its header's length, then JSON."""
    return 2 <= int.from_bytes(head[:8], "little") <= _HEADER and head[8:9] == b"{"


def _then_restored(source: str) -> str:
    return f"sw.convert({source}, 'converted', target=target); sw.restore('converted', target)"


def _zipped(file: FilePath) -> Recognized:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = []
    if names and all(name.endswith(".npy") for name in names):
        return Recognized("an .npz file of NumPy", _then_restored(f"dict(np.load({str(file)!r}))"))
    if any(name.endswith("data.pkl") for name in names):
        return Recognized("a file of PyTorch, which holds a pickle", _PICKLE)
    if "model.weights.h5" in names:
        return Recognized("a file of Keras", _AS_DICT)
    return Recognized("a zip archive", "unpack it, and give what is in it")


def _json(file: FilePath) -> Recognized | None:
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict) and isinstance(found.get("weight_map"), dict):
        return Recognized("the index of a checkpoint in several safetensors files", _in_parts(file))
    return Recognized("a JSON file", _READ)


def _in_parts(index: FilePath) -> str:
    """How the files that an index names are read: as one dict, whose keys are paths."""
    return (
        "what it names, all at once (`import json, os, pathlib, safetensors.flax`):\n"
        f"names = {{*json.loads(pathlib.Path({str(index)!r}).read_text())['weight_map'].values()}}\n"
        f"parts = [safetensors.flax.load_file(os.path.join({str(index.parent)!r}, name)) for name in names]\n"
        "arrays = {name.replace('.', '/'): array for part in parts for name, array in part.items()}\n"
        "sw.convert(arrays, 'converted', target=target); sw.restore('converted', target)"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a letter is cut off where the head ends
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter.isspace() for letter in text)


def within(folder: Any) -> Recognized | None:
    """What a directory holds that can be read, though it is not a checkpoint itself; None for nothing."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    indices = [name for name in names if name.endswith(_INDEX)]
    files = [name for name in names if name.endswith(".safetensors")]
    if indices:
        return Recognized(f"holds {indices[0]}", _in_parts(FilePath(os.fspath(folder)) / indices[0]))
    if files:
        return Recognized(f"holds {files[0]}", f"the path of that file: {str(folder / files[0])!r}")
    return None
