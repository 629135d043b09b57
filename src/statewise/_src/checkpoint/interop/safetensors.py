"""safetensors files.

A file is eight bytes that give the length of a header, the header in JSON, and the arrays one after another.  The
package checks all of that; arrays are read here, by their byte ranges.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from statewise._src.checkpoint.format.keys import dtype_of
from statewise._src.checkpoint.interop.read_range import read_range
from statewise._src.checkpoint.interop.recognize import recognized
from statewise._src.checkpoint.interop.sources import Source, SourceArray
from statewise.errors import CorruptedError, RestoreError, StatewiseError

__all__ = [
    "SAFETENSORS_DTYPES",
    "first_line",
    "open_file",
    "safetensors_package",
    "write_file",
]

# The dtypes of a safetensors file, by the format's codes; those that are missing here have no dtype in JAX.
SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def safetensors_package() -> Any:
    """Imports the package `safetensors`, which is optional.

    Raises:
      StatewiseError: it is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError as error:
        raise StatewiseError(
            "safetensors files need the package safetensors, which is not installed.",
            hint="pip install 'statewise[safetensors]'",
        ) from error
    return safetensors


def open_file(path: FilePath) -> Source:
    """Opens a safetensors file.

    Raises:
      CorruptedError: it is not what was written.
      RestoreError: it is a file of another format.
      StatewiseError: the package safetensors is not installed.
    """
    package = safetensors_package()
    try:
        # This checks the complete header: that it is JSON, and that the arrays fill the file without gaps.
        with package.safe_open(path, framework="np") as file:
            known = _known((file.metadata() or {}).get("statewise"))
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (package.SafetensorError, OSError, ValueError) as error:
        _check_other(path)
        raise CorruptedError(
            f"{path} is corrupted, or not a safetensors file: {first_line(error)}.",
            hint="fetch or write it again; sw.convert reads checkpoints of Statewise, of Orbax, and .safetensors files",
        ) from error
    header.pop("__metadata__", None)
    entries = []
    for name, facts in header.items():
        dtype = SAFETENSORS_DTYPES.get(facts["dtype"], facts["dtype"])
        entries.append(SourceArray(name, tuple(name.split(".")), tuple(facts["shape"]), dtype, **known.get(name, {})))
    dtypes = {entry.name: entry.dtype for entry in entries}

    def read(names: Collection[str]) -> dict[str, np.ndarray]:
        arrays = {}
        for name in names:
            # Not with the package: its NumPy side does not have float8, its Flax side narrows 64 bits to 32.
            own = dtype_of(dtypes[name])
            assert own is not None, "a dtype that JAX lacks fits no leaf"
            arrays[name] = np.empty(header[name]["shape"], own)
            read_part(name, [slice(None)] * arrays[name].ndim, arrays[name])
        return arrays

    def read_part(name: str, index: Sequence[slice], into: np.ndarray) -> None:
        shape, start = header[name]["shape"], 8 + length + header[name]["data_offsets"][0]
        wanted = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
        try:
            with path.open("rb", buffering=0) as raw:
                read_range(raw, start, shape, index, into.reshape(wanted))
        except EOFError as error:
            raise CorruptedError(
                f"{path} is corrupted: it has become shorter.", hint="fetch or write it again"
            ) from error

    return Source(str(path), "safetensors", tuple(entries), read, read_part=read_part)


def _check_other(path: FilePath) -> None:
    """Raises if a file is of another format, because then it is not corrupted."""
    try:
        file = recognized(path)
    except OSError:
        return  # the caller reports that it cannot be read
    if file.certain or not (path.name.endswith(".safetensors") or file.what == "a safetensors file"):
        raise RestoreError(f"{path} is not a checkpoint, but {file.what}.", hint=file.hint)


def _known(text: str | None) -> dict[str, dict[str, Any]]:
    """Returns what a file that Statewise wrote says about its leaves: kind, type, PRNG; nothing if it is malformed."""
    try:
        leaves = json.loads(text or "{}")["leaves"]
        return {
            name: {field: facts[field] for field in ("kind", "type", "prng") if isinstance(facts.get(field), str)}
            for name, facts in leaves.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def write_file(place: FilePath, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Writes arrays into a safetensors file.

    Raises:
      OSError: the file system refuses; names and dtypes were checked before.
    """
    package = safetensors_package()
    # In C order; unlike np.ascontiguousarray this leaves 0-d arrays as they are.
    flat = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        package.numpy.save_file(flat, place, metadata=metadata)
    except package.SafetensorError as error:
        raise OSError(str(error)) from error
