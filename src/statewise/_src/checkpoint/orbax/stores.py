"""Object stores, `gs://` and `s3://`, through TensorStore: paths, listings, reads, conditional writes, deletions.

An object store has objects with names, and no directories: what is called one here is a part of a name up to a slash.
Nothing is renamed, and nothing is remembered: each answer is the store's own, of the moment of the question.  One
object can be written on the condition that it does not exist, or has not changed since it was read; that is what makes
a checkpoint complete or absent.

A request that fails for a moment is repeated by TensorStore, with pauses that grow; what it raises in the end becomes a
`StoreError`, which says what the store said.  Credentials are found by TensorStore as the clouds' own tools find them.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import tensorstore as ts

from statewise._src.checkpoint.orbax.store_errors import StoreError, said, store_errors

__all__ = [
    "SCHEMES",
    "Found",
    "StorePath",
    "check_bucket",
    "copying",
    "is_url",
    "listing",
    "probe",
    "read",
    "remove",
    "settings_of_stores",
    "spec_of_store",
    "write_all",
    "write_if",
]

# TensorStore's names of object stores, by the scheme of their URLs.
SCHEMES = {"gs": "gcs", "s3": "s3"}
# How often a request is repeated: with the pauses below, for two to three minutes.
_RETRIES, _FIRST_PAUSE, _LONGEST_PAUSE = 12, "100ms", "32s"
_RETRIES_VARIABLE = "STATEWISE_STORE_RETRIES"
# A request has failed, and is repeated, after this many seconds in which fewer bytes a second than this came or went:
# TensorStore's own variables, which it reads at its first request.  Without them it waits for a silent store for ever.
_SILENCE = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "30", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1"}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
# TensorStore's name for a range of bytes that an object does not have.
_RANGE = "OUT_OF_RANGE"
# A name to ask for where only the answer of the store matters.
_PROBED = b"statewise.json"
_NO_NAME = "no object can have a name below it (control characters, or too long)"


def is_url(path: object) -> bool:
    """Returns whether a path is a URL, and not a path of the local file system."""
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        return False
    return isinstance(text, str) and _URL.match(text) is not None


# --- paths -----------------------------------------------------------------------------------------------------


class StorePath(os.PathLike[str]):
    """A path in an object store, with those methods of a `pathlib.Path` that reading a checkpoint takes.

    Args:
      text: the URL.  Slashes at the end or twice are dropped, and `.` and `..` have the meaning that they have in any
        path; every other character is itself.

    Raises:
      ValueError: there is no bucket in it.
    """

    __slots__ = ("bucket", "key", "scheme")

    def __init__(self, text: str) -> None:
        self.scheme, _, rest = text.partition("://")
        self.bucket, _, key = rest.partition("/")
        self.key = posixpath.normpath(f"/{key}").lstrip("/")
        if self.scheme not in SCHEMES or self.bucket in ("", ".", ".."):
            raise ValueError("it does not name a bucket")

    def __fspath__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __str__(self) -> str:
        return self.__fspath__()

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self}/{name}")

    @property
    def name(self) -> str:
        """Returns the last part of the path."""
        return posixpath.basename(self.key) or self.bucket

    @property
    def parent(self) -> StorePath:
        """Returns the path without its last part; a bucket is its own parent."""
        return StorePath(f"{self.scheme}://{self.bucket}/{posixpath.dirname(self.key)}")

    def is_absolute(self) -> bool:
        """Returns True."""
        return True

    def absolute(self) -> StorePath:
        """Returns the path."""
        return self

    def is_file(self) -> bool:
        """Returns whether there is an object of this name."""
        return bool(self.key) and probe(self)

    def is_dir(self) -> bool:
        """Returns whether there are objects below this name."""
        return bool(listing(self))

    def exists(self) -> bool:
        """Returns whether there is an object of this name, or below it."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[StorePath]:
        """Yields the names right below this one, in order."""
        yield from (self / name for name in sorted({name.partition("/")[0] for name in listing(self)}))

    def read_bytes(self) -> bytes:
        """Returns an object."""
        found = read(self)
        if found.data is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found.data

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns an object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Writes an object, whatever was there."""
        with store_errors():
            _objects(self).write(self.key, data).result()

    def write_text(self, text: str) -> None:
        """Writes an object, whatever was there."""
        self.write_bytes(text.encode())

    def unlink(self) -> None:
        """Removes the object."""
        with store_errors():
            _objects(self).write(self.key, None).result()

    def read_range(self, start: int, stop: int | None) -> bytes | None:
        """Returns bytes of an object, or None if it does not have all of them.

        Raises:
          FileNotFoundError: there is no such object.
        """
        try:
            found = _objects(self).read(self.key, byte_range=slice(start, stop)).result()
        except ValueError as error:
            if _RANGE in str(error):
                return None
            raise said(error) from error
        if found.state == "missing":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return bytes(found.value)

    def open(self, mode: str = "rb", buffering: int = -1) -> io.RawIOBase:
        """Returns the object as a file to be read, of which only the bytes that are read are fetched."""
        assert mode == "rb", "an object is written as a whole"
        return _ObjectFile(self)


class _ObjectFile(io.RawIOBase):
    """An object as a file; each read is a request."""

    def __init__(self, path: StorePath) -> None:
        super().__init__()
        self._path = path
        self._at = 0
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence != io.SEEK_END, "the size of an object is not known"
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next bytes; fewer only at the end."""
        if size == 0:
            return b""
        end = None if size is None or size < 0 else self._at + size
        data = self._path.read_range(self._at, end)
        if data is None and end is not None:  # the object ends before
            data = self._path.read_range(self._at, None)
        self._at += len(data or b"")
        return data or b""

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data[: len(view)]
        return min(len(data), len(view))


def copying(path: StorePath) -> str:
    """Returns the command that copies what is at a path to a disk."""
    commands = {"gs": "gcloud storage cp --recursive", "s3": "aws s3 cp --recursive"}
    return f"{commands[path.scheme]} {path} {path.name}"


# --- requests --------------------------------------------------------------------------------------------------


def settings_of_stores() -> dict[str, Any]:
    """Returns TensorStore's settings of how often a request to a store is repeated."""
    number = os.environ.get(_RETRIES_VARIABLE) or str(_RETRIES)
    if not number.isdecimal():
        raise StoreError(f"{_RETRIES_VARIABLE}={number!r} is not a number")
    retries = {
        "max_retries": int(number),
        "initial_delay": _FIRST_PAUSE,
        "max_delay": _LONGEST_PAUSE,
    }
    return {"gcs_request_retries": retries, "s3_request_retries": retries}


@functools.cache
def _shared(retries: str) -> Any:
    """Returns the context of all requests for single objects; one for each number of retries."""
    return ts.Context(settings_of_stores())


def spec_of_store(path: StorePath) -> dict[str, Any]:
    """Returns TensorStore's specification of the objects below a path."""
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)
    spec: dict[str, Any] = {"driver": SCHEMES[path.scheme], "bucket": path.bucket}
    spec["path"] = f"{path.key}/" if path.key else ""
    if path.scheme != "s3":
        return spec
    # TensorStore asks S3 itself for a condition only if it knows the endpoint; otherwise it would look, and then write.
    spec["use_conditional_write"] = True
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # TensorStore finds the region of a bucket of Amazon's; it does not read the variables for other endpoints.
    return spec | ({"endpoint": endpoint, "aws_region": region or "us-east-1"} if endpoint else {})


def check_bucket(path: StorePath) -> None:
    """Raises if no bucket can have this name, or no object in it can have one below this path.

    Raises:
      ValueError: it cannot.
    """
    bucket = StorePath(f"{path.scheme}://{path.bucket}")
    for place, why in ((bucket, f"{path.bucket!r} is not the name of a bucket"), (path, _NO_NAME)):
        try:
            ts.KvStore.Spec(spec_of_store(place))
        except ValueError as error:
            raise ValueError(why) from error


def _objects(path: StorePath) -> Any:
    """Returns the bucket of a path, opened; once, because TensorStore looks for credentials each time."""
    bucket = StorePath(f"{path.scheme}://{path.bucket}")
    return _opened(json.dumps(spec_of_store(bucket)), os.environ.get(_RETRIES_VARIABLE, ""))


@functools.cache
def _opened(spec: str, retries: str) -> Any:
    return ts.KvStore.open(json.loads(spec), context=_shared(retries)).result()


@dataclasses.dataclass(frozen=True)
class Found:
    """An object as it was read.

    Attributes:
      data: its bytes; None if there is none.
      generation: identifies what was read, for a write on the condition that it is still there.
    """

    data: bytes | None
    generation: bytes


def read(path: StorePath) -> Found:
    """Returns an object, and which one it is; without data if there is none."""
    with store_errors():
        found = _objects(path).read(path.key).result()
    return Found(None if found.state == "missing" else bytes(found.value), found.stamp.generation)


def probe(path: StorePath) -> bool:
    """Returns whether there is an object of this name, without reading it."""
    with store_errors():
        return bool(_objects(path).read(path.key, byte_range=slice(0, 0)).result().state != "missing")


def listing(path: StorePath) -> list[str]:
    """Returns the names of all objects below a path, without the path itself, in order."""
    with store_errors():
        store, prefix = _objects(path), _prefix(path)
        below = ts.KvStore.KeyRange(prefix, _after(prefix))
        answer = store.list(below, strip_prefix_length=len(prefix))
        if path.scheme == "gs" and (answer.exception() is not None or not answer.result()):
            # TensorStore takes the refusal of a listing by Google's store for an empty one, or for one that it cannot
            # read; but that of a read for what it is.
            store.read(prefix + _PROBED, byte_range=slice(0, 0)).result()
        names = sorted(name.decode("utf-8", "surrogateescape") for name in answer.result())
    return [name for name in names if name]  # some tools write an object of the folder's own name


def _prefix(path: StorePath) -> bytes:
    return f"{path.key}/".encode() if path.key else b""


def _after(prefix: bytes) -> bytes:
    """Returns the first name after all that begin with a prefix, which ends in a slash; of no prefix, no limit."""
    return prefix[:-1] + b"0" if prefix else b""


def write_if(path: StorePath, data: bytes, generation: bytes) -> bytes | None:
    """Writes an object if the one there is still the one that was read, or if there was none and is none.

    Args:
      path: its path.
      data: its bytes.
      generation: from `read`.

    Returns:
      the generation of the new object; None if it was not written, because there is another object.
    """
    with store_errors():
        store = _objects(path)
        written = store.write(path.key, data, if_equal=generation).result().generation
        if written:
            return bytes(written)
        # A request that was repeated may have been written the first time, so that its own object was in the way.
        found = store.read(path.key).result()
    return bytes(found.stamp.generation) if found.state == "value" and found.value == data else None


def write_all(path: StorePath, files: Mapping[str, bytes]) -> None:
    """Writes objects below a path at the same time, whatever was there."""
    with store_errors():
        store, prefix = _objects(path), _prefix(path)
        _wait_for([store.write(prefix + name.encode(), data) for name, data in files.items()])


def remove(path: StorePath, names: Collection[str]) -> None:
    """Removes objects below a path; those that do not exist are removed already."""
    with store_errors():
        store, prefix = _objects(path), _prefix(path)
        _wait_for([store.write(prefix + name.encode("utf-8", "surrogateescape"), None) for name in names])


def _wait_for(requests: Sequence[Any]) -> None:
    """Waits for all, and raises if one was refused: when it does, none is left that could still be carried out."""
    errors = [error for request in requests if (error := request.exception()) is not None]
    if errors:
        raise errors[0]
