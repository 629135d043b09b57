"""What docs/preemption.md says of Orbax's emergency and multi-tier managers: they take trees, and no item of ours."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency
from orbax.checkpoint.experimental.emergency import replicator_checkpoint_manager as replicator

import statewise as sw
from checkpoint_models import numbered


def by_emergency(folder: pathlib.Path, mesh: jax.sharding.Mesh, item: Any) -> None:
    # Not in the background: threads of Orbax's would wait for minutes for what a save that fails does not do.
    options = emergency.CheckpointManagerOptions(enable_async_checkpointing=False)
    with emergency.CheckpointManager(folder, folder, mesh, {}, options=options) as manager:
        manager.save(0, args=ocp.args.Composite(state=item))


def by_replicator(folder: pathlib.Path, mesh: jax.sharding.Mesh, item: Any) -> None:
    with replicator.ReplicatorCheckpointManager(epath.Path(folder), global_mesh=mesh) as manager:
        manager.save(0, args=ocp.args.Composite(state=item))


REFUSALS: dict[str, tuple[Callable[..., None], str]] = {
    "emergency": (by_emergency, "does not match with any registered handler"),
    "replicator": (by_replicator, "is not supported by this CheckpointManager"),
}


@pytest.mark.parametrize("which", REFUSALS)
def test_our_item_is_refused(tmp_path: pathlib.Path, devices: list[jax.Device], which: str) -> None:
    save, said = REFUSALS[which]
    mesh = jax.make_mesh((2, 4), ("replica", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=said):
        save(tmp_path, mesh, sw.checkpointable(numbered(1)))
