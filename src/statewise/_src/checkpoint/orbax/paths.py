"""Where checkpoints are: a path as a user gives it, as Orbax takes it, and as TensorStore does.

A path is text that means itself, and it goes to TensorStore as a field of a specification, never as part of a URL, in
which `#`, `%` and `?` mean something else.  Orbax joins paths to patterns, in which brackets and stars do; what it gets
from here is a `compat.LiteralPath`, which is a pattern of itself alone.  What is left are paths that TensorStore or
Orbax cannot be given at all; `obstacle` knows them, so that they are refused before a byte is written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path as FilePath
from typing import Any

from statewise._src.checkpoint.orbax.epath import epath
from statewise.errors import RestoreError, SaveError

__all__ = [
    "check_usable",
    "is_url",
    "make_folder",
    "new_place",
    "obstacle",
    "place_of",
    "short_name",
    "spec_of",
    "steps_in",
]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
# What TensorStore calls an object store, by the beginning of its URLs.
_DRIVERS = {"gs": "gcs", "s3": "s3"}
# First names of paths that the library which Orbax uses takes for the beginning of a URL.
_TAKEN = ("gs", "s3", "az", "hf")
# Bytes that Orbax's and TensorStore's own names take below a checkpoint, the temporary ones included.
_BELOW = 512
# Bytes of a checkpoint's name that go into that of its temporary directory: with what is added, any file system takes
# the sum, also one that takes names of 143 bytes (an encrypted one).
_NAME = 60


# --- a path as it is given -------------------------------------------------------------------------------------


def _text_of(path: Any) -> str | None:
    """The text of a path; None for what is not one."""
    try:
        text = os.fspath(path)
    except TypeError:
        return None
    return text if isinstance(text, str) and text else None


def is_url(path: Any) -> bool:
    """Whether it is a URL, and so not a path of the local file system."""
    text = _text_of(path)
    return text is not None and _URL.match(text) is not None


def _not_a_path(path: Any) -> str:
    return f"{path!r} is no path." if isinstance(path, str) else f"{type(path).__name__} is no path."


def _impossible(text: str) -> str:
    """Why no file can have this path, in words; empty if one can."""
    if "\0" in text:
        return "it has a null byte"
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return "it has characters that no name of a file can have"
    return ""


def _absolute(text: str) -> str:
    """A local path from the root.  Where it goes up (`..`), links are followed first, as the file system does."""
    path = FilePath(text).absolute()
    if ".." in path.parts:
        path = FilePath(os.path.realpath(path.parent)) / path.name if path.name != ".." else path.resolve()
    # Two slashes at the beginning are allowed to mean something of their own, and nowhere do.
    return f"/{str(path).lstrip('/')}" if os.sep == "/" else str(path)


def _other_url(text: str, done: str) -> tuple[str, str]:
    """The fact and the hint for a URL that is neither a path nor one of a store that is known."""
    scheme, _, rest = text.partition("://")
    # With ./ before it, it is the path of a folder whose name ends in a colon.
    return f"{text} is a URL, and {scheme}:// is not {done}.", f"a path: {rest if scheme == 'file' else f'./{text}'!r}"


def place_of(path: Any, example: str = "sw.restore('run/step_100', target)") -> Any:
    """A path to read from, on whatever file system Orbax can read.

    Args:
      path: as it was given.
      example: code for the hint where it is not a path.

    Raises:
      RestoreError: it is not a path, or a URL that TensorStore has no driver for.
    """
    text = _text_of(path)
    if text is None:
        raise RestoreError(_not_a_path(path), hint=example)
    if is_url(text):
        if text.partition("://")[0] in _DRIVERS:
            return epath(text)
        message, hint = _other_url(text, "read")
        raise RestoreError(message, hint=hint)
    why = _impossible(text)
    if why:
        raise RestoreError(f"{text!r} cannot be a path: {why}.", hint=example)
    text = _absolute(text)
    if text.startswith("/") and text.split("/")[1] in _TAKEN:  # before it is another path by being asked about
        check_usable(text)
    return epath(text)


def new_place(
    path: Any,
    *,
    arrays: bool = True,
    example: str,
    store: str,
    taken: str = "another path, or sw.Checkpoints(directory), which keeps a checkpoint for each step",
) -> FilePath:
    """A local path to write to, where there is nothing yet.

    Args:
      path: as it was given.
      arrays: whether Orbax writes there, and not a file of another format.
      example: code for the hint where this is not a path.
      store: the hint for an object store.
      taken: the hint where there is something already.

    Raises:
      SaveError: it is not a path, there is something already, or it cannot be written to.
    """
    text = _text_of(path)
    if text is None:
        raise SaveError(_not_a_path(path), hint=example)
    if is_url(text):
        if text.partition("://")[0] not in _TAKEN:
            message, hint = _other_url(text, "written")
            raise SaveError(message, hint=hint)
        raise SaveError(f"{text} is on an object store, which cannot rename a directory at once.", hint=store)
    why = _impossible(text)
    final = FilePath(_absolute(text)) if not why else FilePath()
    try:
        if not why:
            os.lstat(final)
    except (FileNotFoundError, NotADirectoryError):
        check_usable(final, writing=True, arrays=arrays)
        return final
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise SaveError(f"{text!r} cannot be a path: {why}.", hint=example)
    raise SaveError(
        f"There is something at {final} already, and nothing is written over.",
        hint=taken,
    )


def steps_in(directory: Any) -> Any:
    """A directory for the steps of a run, which may be there already.

    Raises:
      SaveError: it is not a path, or steps cannot be written below it.
    """
    text = _text_of(directory)
    if text is None:
        raise SaveError(_not_a_path(directory), hint="sw.Checkpoints('run/steps')")
    if is_url(text):
        if text.partition("://")[0] in _DRIVERS:
            return directory
        message, hint = _other_url(text, "written")
        raise SaveError(message, hint=hint)
    why = _impossible(text)
    if why:
        raise SaveError(f"{text!r} cannot be a path: {why}.", hint="sw.Checkpoints('run/steps')")
    place = FilePath(_absolute(text))
    check_usable(place, writing=True)
    return place


def make_folder(folder: FilePath) -> None:
    """Makes a directory and those above it, however many: `mkdir(parents=True)` calls itself for each."""
    for one in reversed((folder, *folder.parents)):
        if not one.is_dir():
            if one.exists():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            one.mkdir(exist_ok=True)  # another process may be at it too


def short_name(name: str) -> str:
    """A name as part of a longer one: a long name is cut, and its digest tells it apart from others cut so."""
    data = os.fsencode(name)
    if len(data) <= _NAME:
        return name
    return f"{data[: _NAME - 17].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


# --- as TensorStore and Orbax take it --------------------------------------------------------------------------


def spec_of(directory: Any) -> dict[str, Any]:
    """A directory as TensorStore's specification of a key-value store."""
    text = str(directory if directory.is_absolute() else directory.absolute())  # TensorStore takes no other
    if is_url(text):
        scheme, _, rest = text.partition("://")
        bucket, _, path = rest.strip("/").partition("/")
        return {"driver": _DRIVERS[scheme], "bucket": bucket, "path": f"{path}/" if path else ""}
    return {"driver": "file", "path": f"{text.rstrip('/')}/"}


def obstacle(path: Any) -> tuple[str, str]:
    """Why TensorStore or Orbax cannot use a local path, and a like one that they can; two empty texts if they can."""
    text = str(path)
    if is_url(text):
        return "", ""
    try:
        text.encode()
    except UnicodeEncodeError:
        plain = "".join("_" if "\ud800" <= letter <= "\udfff" else letter for letter in text)
        return "it is not UTF-8, and TensorStore takes text alone", plain
    if os.sep == "/" and "\\" in text:
        return "TensorStore takes a backslash for a slash", text.replace("\\", "_")
    names = text.split("/")
    if any(name.endswith(".__lock") for name in names):
        plain = "/".join(name.replace(".__lock", "_lock") for name in names)
        return "TensorStore keeps names that end in .__lock for its own files", plain
    if any(name.endswith("gs:") for name in names):
        plain = "/".join(f"{name[:-1]}_" if name.endswith("gs:") else name for name in names)
        return "Orbax takes 'gs:/' for the beginning of a URL", plain
    if text.startswith("/") and names[1] in _TAKEN:
        return f"Orbax takes /{names[1]}/ for {names[1]}://, an object store", f"/data{text}"
    return "", ""


def check_usable(path: Any, *, writing: bool = False, arrays: bool = True) -> None:
    """Raises for a path that TensorStore or Orbax cannot use.

    Args:
      path: of a directory that they are to read, or to write into.
      writing: whether it is to be written.
      arrays: False where it is not for them, but for a file of another format.

    Raises:
      SaveError: it cannot be written.
      RestoreError: it cannot be read.
    """
    why, like = obstacle(path) if arrays else ("", "")
    if why and writing:
        raise SaveError(f"{path} cannot be written: {why}.", hint=f"another path: {like!r}")
    if why:
        raise RestoreError(
            f"{path} cannot be read: {why}.",
            hint="give it another name, or a link that has one, and read that:\n"
            f"link = os.path.join(tempfile.mkdtemp(), 'checkpoint'); os.symlink({str(path)!r}, link)",
        )
    size, most = len(os.fsencode(str(path))), _longest()
    if writing and not is_url(path) and size + _BELOW > most:
        raise SaveError(
            f"{path} cannot be written: of the {most} bytes that a path may have it leaves {max(most - size, 0)} for "
            f"the names of the files below it, which take up to {_BELOW}.",
            hint="a shorter path",
        )


def _longest() -> int:
    """Bytes that a path may have on this system."""
    return os.pathconf("/", "PC_PATH_MAX") if hasattr(os, "pathconf") else 1 << 15
