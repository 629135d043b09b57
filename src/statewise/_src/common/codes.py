"""Code objects of Python functions."""

from __future__ import annotations

import types
from collections.abc import Iterator

__all__ = ["codes_in"]


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a function's code, and the code of the functions defined inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes_in(const)
