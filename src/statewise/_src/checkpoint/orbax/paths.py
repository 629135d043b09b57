"""Paths of checkpoints: as users write them, as Orbax takes them, and as TensorStore does.

A path is literal text.  TensorStore gets it as a field of a specification, never as part of a URL, in which `#`, `%`
and `?` have a meaning.  Orbax joins paths to patterns, in which brackets and stars have one; it gets an `epath`, which
matches only itself.  The remaining paths are those that TensorStore or Orbax cannot take at all; `obstacle` knows them,
so that they are rejected before a byte is written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path as FilePath
from typing import Any

from statewise._src.checkpoint.format.keys import is_utf8
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.stores import SCHEMES, StorePath, check_bucket, is_url, spec_of_store
from statewise.errors import RestoreError, SaveError, StatewiseError

__all__ = [
    "PATTERN",
    "TAKEN_HINT",
    "check_usable",
    "is_url",
    "new_place",
    "obstacle",
    "place_of",
    "short_name",
    "spec_of",
    "steps_in",
]

# What is left of a URL that went through `pathlib`.
_HALF_URL = re.compile(r"(gs|s3):/[^/]")
# The first names of paths that the library which Orbax uses takes for the start of a URL.
_TAKEN = ("gs", "s3", "az", "hf")
# The hint for a path at which there is something.
TAKEN_HINT = "another path, or sw.Checkpoints(directory), which keeps a checkpoint for each step"
# The number of bytes of an object's name, at most, and those that ours take below a checkpoint.
_LONGEST_KEY, _BELOW_KEY = 1024, 100
# The number of bytes that Orbax's and TensorStore's own names take below a checkpoint, including temporary ones.
_BELOW = 512
# The number of bytes of a checkpoint's name in the name of its temporary directory: together with what is added, any
# file system takes it, even one that takes names of 143 bytes (an encrypted one).
_NAME = 60
# The characters that fsspec, and Orbax in the names of steps, take for patterns.
PATTERN = re.compile(r"[*?[]")


# --- a path as users write it ----------------------------------------------------------------------------------


def _text_of(path: Any) -> str | None:
    """Returns the text of a path; None for something that is not a path."""
    try:
        text = os.fspath(path)
    except TypeError:
        return None
    return text if isinstance(text, str) and text else None


def _checked_text(path: object, error: type[StatewiseError], example: str, done: str, schemes: Collection[str]) -> str:
    """Returns the text of a path; raises this error if it cannot be one, or is a URL of another scheme."""
    text = _text_of(path)
    if text is None:
        raise error(f"{repr(path) if isinstance(path, str) else type(path).__name__} is not a path.", hint=example)
    if is_url(text):
        scheme, _, rest = text.partition("://")
        if scheme not in schemes:
            # With ./ before it, it is the path of a directory whose name ends in a colon.
            local = rest if scheme == "file" else f"./{text}"
            raise error(f"{text} is a URL, and {scheme}:// is not {done}.", hint=f"a path: {local!r}")
        return text
    if _HALF_URL.match(text):
        raise error(
            f"{text} is a URL without one of its slashes: a pathlib.Path cannot have two.",
            hint=f"the text of the URL, or an epath.Path: '{text[:4]}/{text[4:]}'",
        )
    why = "it has a null byte" if "\0" in text else ""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        why = why or "it has characters that no file name can have"
    if why:
        raise error(f"{text!r} cannot be a path: {why}.", hint=example)
    return text


def _absolute(text: str) -> str:
    """Returns a local path from the root.  If it has `..`, links are followed first, as the file system does."""
    path = FilePath(text).absolute()
    if ".." in path.parts:
        path = FilePath(os.path.realpath(path.parent)) / path.name if path.name != ".." else path.resolve()
    # POSIX allows two slashes at the start to have a meaning of their own; on no system of today do they.
    return f"/{str(path).lstrip('/')}" if os.sep == "/" else str(path)


def place_of(path: object, example: str = "sw.restore('run/step_100', target)") -> Any:
    """Returns a path to read from, on any file system that Orbax can read.

    Args:
      path: the path, as the user gave it.
      example: code for the hint if it is not a path.

    Raises:
      RestoreError: it is not a path, or a URL that TensorStore has no driver for.
    """
    text = _checked_text(path, RestoreError, example, "read", SCHEMES)
    if is_url(text):
        return _in_store(text, RestoreError)
    text = _absolute(text)
    # Checked before `epath` would make a URL of it.
    if text.startswith("/") and text.split("/")[1] in _TAKEN:
        check_usable(text)
    return epath(text)


def _in_store(text: str, error: type[StatewiseError]) -> StorePath:
    """Returns the path of a URL; raises this error if a store cannot have it."""
    try:
        place = StorePath(text)
        text.encode()
        check_bucket(place)
    except UnicodeEncodeError as wrong:
        raise error(f"{text!r} cannot be a path: it has characters that are not text.", hint="another path") from wrong
    except ValueError as wrong:
        raise error(
            f"{text} cannot be a path: {wrong}.", hint="'gs://bucket/run/step_100', or 's3://bucket/run/step_100'"
        ) from wrong
    return place


def new_place(
    path: object,
    *,
    arrays: bool = True,
    example: str,
    store: str = "",
    taken: str = TAKEN_HINT,
) -> FilePath | StorePath:
    """Returns a path to write to, at which there is nothing; of a store this is not known yet.

    Args:
      path: the path, as the user gave it.
      arrays: whether Orbax writes there, and not a file of another format.
      example: code for the hint if this is not a path.
      store: the hint for an object store, if it cannot be written to.
      taken: the hint if there is something already.

    Raises:
      SaveError: it is not a path, there is something already, or it cannot be written to.
    """
    text = _checked_text(path, SaveError, example, "written", SCHEMES)
    if is_url(text):
        if store:
            raise SaveError(
                f"{text} is in an object store, where only checkpoints of Statewise are written.", hint=store
            )
        place = _in_store(text, SaveError)
        check_usable(place, writing=True)
        return place
    final = FilePath(_absolute(text))
    try:
        os.lstat(final)  # not `exists`: a broken link is something too
    except (FileNotFoundError, NotADirectoryError):
        check_usable(final, writing=True, arrays=arrays)
        return final
    except OSError as error:
        raise SaveError(f"{text!r} cannot be a path: {error.strerror or error}.", hint=example) from error
    raise SaveError(f"There is already something at {final}, and nothing is overwritten.", hint=taken)


def steps_in(directory: object) -> Any:
    """Returns a directory for the steps of a run, which may exist already.

    Raises:
      SaveError: it is not a path, or steps cannot be written below it.
    """
    text = _checked_text(directory, SaveError, "sw.Checkpoints('run/steps')", "written", SCHEMES)
    if is_url(text):
        if found := PATTERN.search(text):
            # Deleting a step of `run[1]` or `run*` would delete that step of `run1` too.
            raise SaveError(
                f"{text} cannot hold steps: gcsfs and s3fs, with which Orbax deletes steps, take {found[0]!r} for a "
                "pattern.",
                hint="another directory, without such characters",
            )
        return _in_store(text, SaveError)
    place = FilePath(_absolute(text))
    check_usable(place, writing=True)
    return place


def short_name(name: str) -> str:
    """Returns a name as part of a longer one: a long name is cut, and its digest distinguishes it from others."""
    data = os.fsencode(name)
    if len(data) <= _NAME:
        return name
    return f"{data[: _NAME - 17].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


# --- a path as TensorStore and Orbax take it -------------------------------------------------------------------


def spec_of(directory: Any) -> dict[str, Any]:
    """Returns a directory as TensorStore's specification of a key-value store."""
    text = str(directory if directory.is_absolute() else directory.absolute())  # TensorStore takes only absolute paths
    if is_url(text):
        return spec_of_store(StorePath(text))
    return {"driver": "file", "path": f"{text.rstrip('/')}/"}


def obstacle(path: object) -> tuple[str, str]:
    """Returns why TensorStore or Orbax cannot use a local path, and a similar one; empty texts if they can use it."""
    text = str(path)
    if is_url(text):
        return "", ""
    if not is_utf8(text):
        plain = "".join(letter if is_utf8(letter) else "_" for letter in text)
        return "it is not UTF-8, and TensorStore takes only text", plain
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


def check_usable(path: object, *, writing: bool = False, arrays: bool = True) -> None:
    """Raises for a path that TensorStore or Orbax cannot use.

    Args:
      path: the path of a directory that they read, or write into.
      writing: whether it is written.
      arrays: False for a file of another format, which they do not use.

    Raises:
      SaveError: it cannot be written.
      RestoreError: it cannot be read.
    """
    why, similar = obstacle(path) if arrays else ("", "")
    if why and writing:
        raise SaveError(f"{path} cannot be written: {why}.", hint=f"another path: {similar!r}")
    if why:
        raise RestoreError(
            f"{path} cannot be read: {why}.",
            hint="give it another name, or a link that has one, and read that:\n"
            f"link = os.path.join(tempfile.mkdtemp(), 'checkpoint'); os.symlink({str(path)!r}, link)",
        )
    if writing and isinstance(path, StorePath):
        size = len(path.key.encode())
        if size + _BELOW_KEY > _LONGEST_KEY:
            raise SaveError(
                f"{path} cannot be written: of the {_LONGEST_KEY} bytes that a name in a store may have, it leaves "
                f"{max(_LONGEST_KEY - size, 0)} for the names of the objects below it, which take up to {_BELOW_KEY}.",
                hint="a shorter path",
            )
        return
    size = len(os.fsencode(str(path)))
    longest = os.pathconf("/", "PC_PATH_MAX") if hasattr(os, "pathconf") else 1 << 15
    if writing and not is_url(path) and size + _BELOW > longest:
        raise SaveError(
            f"{path} cannot be written: of the {longest} bytes that a path may have, it leaves "
            f"{max(longest - size, 0)} for the names of the files below it, which take up to {_BELOW}.",
            hint="a shorter path",
        )
