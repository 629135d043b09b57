"""Plain Orbax checkpoints, of other programs and for them: trees of arrays, read and written by Orbax itself."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.write import tree_handler

__all__ = ["described_tree", "read_tree", "write_tree"]


def described_tree(folder: Any) -> Any:
    """Returns a checkpoint's tree with a description instead of each value: `shape` and `dtype` for an array."""
    with contextlib.closing(tree_handler()) as handler:
        tree = handler.metadata(epath(folder))
    return getattr(tree, "tree", tree)


def read_tree(folder: Any, structure: Any, dtypes: Sequence[np.dtype | None]) -> list[Any]:
    """Reads arrays of a checkpoint onto the host.

    Args:
      folder: its directory.
      structure: the structure of its tree.
      dtypes: for each leaf of the structure the dtype of its array; None for one that is not read.

    Returns:
      for each leaf what Orbax has read; for those that are not read, anything.
    """
    # Orbax reads trees of the checkpoint's structure, in which placeholders mean that an array is not read.
    items = [ocp.PLACEHOLDER if dtype is None else np.empty((), dtype) for dtype in dtypes]
    how = [ocp.RestoreArgs() if dtype is None else ocp.RestoreArgs(restore_type=np.ndarray) for dtype in dtypes]
    item, restore_args = (jax.tree_util.tree_unflatten(structure, leaves) for leaves in (items, how))
    with contextlib.closing(tree_handler()) as handler:
        read = handler.restore(epath(folder), args=ocp.args.PyTreeRestore(item, restore_args=restore_args))
    return list(structure.flatten_up_to(read))


def write_tree(place: FilePath, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as a plain checkpoint."""
    with contextlib.closing(ocp.Checkpointer(tree_handler())) as checkpointer:
        checkpointer.save(epath(place), args=ocp.args.PyTreeSave(tree))
