"""Reads checkpoints with Orbax alone, as someone does who has never heard of Statewise; run as a program.

`python plain_orbax.py '[[DO, FOLDER, NAME], ...]'`, where DO is one of the functions below; prints the answers as JSON:
every array, by its path, as `[dtype, shape, bytes in hexadecimal]`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import orbax.checkpoint as ocp

warnings.filterwarnings("ignore", "Sharding info not provided")


def shown(tree: Any) -> dict[str, Any]:
    """Every array of a tree, by its path."""
    return {
        "/".join(str(getattr(key, "key", key)) for key in path): [
            str(array.dtype),
            list(array.shape),
            np.asarray(array).tobytes().hex(),
        ]
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    }


def flat(tree: Any) -> dict[str, Any]:
    """Every description of an array in a tree, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {"/".join(str(getattr(key, "key", key)) for key in path): leaf for path, leaf in leaves}


def read_first(folder: str, name: str) -> Any:
    """An item of a directory, with the first interface's checkpointer."""
    with ocp.StandardCheckpointer() as checkpointer:
        return shown(checkpointer.restore(os.path.join(folder, name)))


def read_new(folder: str, name: str) -> Any:
    """An item of a directory, with the newer interface: by its name, and among all of them; "" is the directory."""
    by_name = shown(ocp.v1.load(folder, checkpointable_name=name or None))
    if name:
        assert shown(ocp.v1.load_checkpointables(folder)[name]) == by_name
    described = ocp.v1.metadata(folder, name or None).metadata
    assert {path: list(leaf.shape) for path, leaf in flat(described).items()} == {
        path: shape for path, (_, shape, _) in by_name.items()
    }
    return by_name


def steps_first(folder: str, name: str) -> Any:
    """The steps of a run with an item of the last one and its metrics, with the first interface's manager."""
    with ocp.CheckpointManager(folder) as manager:
        args = {name: ocp.args.StandardRestore(), "metrics": ocp.args.JsonRestore()}
        read = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args))
        return [sorted(manager.all_steps()), read["metrics"], shown(read[name])]


def steps_new(folder: str, name: str) -> Any:
    """The same with the newer interface's checkpointer."""
    with ocp.v1.training.Checkpointer(folder) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        read = checkpointer.load_checkpointables(steps[-1], {name: None})
        return [steps, checkpointer.checkpoints[-1].metrics, shown(read[name])]


if __name__ == "__main__":
    answers = [globals()[do](folder, name) for do, folder, name in json.loads(sys.argv[1])]
    assert "statewise" not in {name.split(".")[0] for name in sys.modules}
    print(json.dumps(answers), flush=True)
