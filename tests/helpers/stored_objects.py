"""A small state in an object store, and the objects that a checkpoint has there."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import statewise as sw
from checkpoint_models import taken
from statewise._src.checkpoint.orbax.stores import StorePath, listing


def small(number: float = 1.0) -> sw.State:
    return taken({"a": jnp.full(3, float(number)), "b": jnp.full((2, 2), number, jnp.bfloat16)})


def value(state: sw.State) -> float:
    return float(jax.tree.leaves(state)[0].reshape(-1)[0])


def objects(url: str) -> set[str]:
    """The objects below a path; of a writer's own directory only that there is one."""
    names = listing(StorePath(url))
    return {"OWN/" if name.startswith("statewise-") else name for name in names}


WHOLE = {"OWN/", "_METADATA", "_sharding", "commit_success.txt", "manifest.ocdbt", "statewise.json"}
