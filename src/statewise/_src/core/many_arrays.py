"""One small computation for each of many arrays, compiled in pieces.

XLA compiles a program of ten thousand copies in ten seconds, and one of a hundred thousand in an hour: by the square of
their number.  In pieces of a thousand it is a cost per array, and equal pieces are compiled once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from statewise._src.sharding.part_shardings import PartShardings

__all__ = ["each_array"]

_PIECE = 1024


def each_array(
    fn: Callable[..., Any],
    parts: Sequence[Sequence[Any]],
    static: Sequence[Iterable[Any]],
    places: Sequence[PartShardings | None],
    *args: Any,
) -> list[tuple[Any, ...]]:
    """Returns `fn(array, static, *args)` of each array of some parts.

    Args:
      fn: a function of a module, so that what was compiled of it is found again.
      parts: the arrays of each part.
      static: for each part, what `fn` gets besides each of its arrays; hashable.
      places: for each part the shardings of the results, as XLA would choose others; None where it is not on a mesh.
      *args: further arguments of each call, arrays or numbers.
    """
    arrays = [array for part in parts for array in part]
    options = [option for part in static for option in part]
    shardings: list[Any] = []
    for part, place in zip(parts, places, strict=True):
        shardings += [None] * len(part) if place is None else place.shardings
    found: list[Any] = []
    for start in range(0, len(arrays), _PIECE):
        piece = slice(start, start + _PIECE)
        program = _program(fn, tuple(options[piece]), tuple(shardings[piece]))
        found += program(arrays[piece], *args)
    results = iter(found)
    return [tuple([next(results) for _ in part]) for part in parts]


@functools.lru_cache(maxsize=256)
def _program(fn: Callable[..., Any], static: tuple[Any, ...], shardings: tuple[Any, ...]) -> Any:
    def each(arrays: Sequence[Any], *args: Any) -> list[Any]:
        return [fn(array, option, *args) for array, option in zip(arrays, static, strict=True)]

    return jax.jit(each, out_shardings=list(shardings)) if any(shardings) else jax.jit(each)
