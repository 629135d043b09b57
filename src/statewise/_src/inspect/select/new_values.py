"""What `update` writes: the values given, as the arrays of JAX that the model holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import arrays_of, raw_value, row_of, value_of
from statewise._src.common.paths import Path

__all__ = ["fresh_values"]


def fresh_values(given: Mapping[Path, Any], live: Mapping[Path, Any]) -> Iterator[tuple[Path, Any, Any]]:
    """Path, leaf and new value of each: a NumPy array or a number becomes a JAX array where the model holds one.

    Raises:
      StructureError: numbers that the leaf's dtype would lose; all the leaves.
    """
    values = {path: (*arrays_of(raw_value(leaf)), arrays_of(raw_value(live[path]))[0]) for path, leaf in given.items()}
    check_given(
        (row_of(path, live[path]), new, old.dtype)
        for path, (arrays, _, had) in values.items()
        for new, old in zip(arrays, had, strict=True)
        if isinstance(old, jax.Array) and not isinstance(new, jax.Array)
    )
    for path, (arrays, structure, had) in values.items():
        yield path, live[path], value_of(list(map(_fresh, arrays, had)), structure)


def _fresh(new: Any, old: Any) -> Any:
    is_number = isinstance(old, jax.Array) and not isinstance(new, jax.Array)
    return jnp.asarray(new, dtype=old.dtype) if is_number else new
