"""One of several processes that save and restore their data iterators together; run by test_data_together.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["JAX_PLATFORMS"] = "cpu"

import grain
import jax
import orbax.checkpoint as ocp

import statewise as sw
from iterators import HERE, drawn, numbers
from programs.save_together import make


def sliced() -> Any:
    """Each process has every so-many-th number."""
    return iter(numbers()[jax.process_index() :: jax.process_count()].repeat(2).batch(2).to_iter_dataset(HERE))


def loader() -> Any:
    """The same, through Grain's DataLoader."""
    sampler = grain.samplers.IndexSampler(
        num_records=40, shard_options=grain.sharding.ShardByJaxProcess(), shuffle=True, seed=3
    )
    source = grain.sources.RangeDataSource(0, 40, 1)
    return iter(grain.DataLoader(data_source=source, sampler=sampler, operations=[], read_options=HERE))


def elastic() -> Any:
    """Grain's iterator for any number of processes: four numbers a batch for all of them."""
    shards = grain.sharding.ShardByJaxProcess()
    return iter(grain.experimental.ElasticIterator(numbers(), 4, shards, read_options=HERE))


PIPELINES: dict[str, Callable[[], Any]] = {"sliced": sliced, "loader": loader, "elastic": elastic}
OPTIONS: dict[str, Any] = {"first": None, "new": ocp.v1.training.Checkpointer}

SAVED = (("sliced", "first"), ("sliced", "new"), ("loader", "first"), ("elastic", "new"))


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    model = make()
    plan = sw.plan(model)
    mesh = jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = plan.init(make, mesh)
    for name, interface in SAVED:
        iterator, again = PIPELINES[name](), PIPELINES[name]()
        drawn(iterator, 3)
        with sw.Checkpoints(f"{folder}/{name}.{interface}", options=OPTIONS[interface]) as checkpoints:
            checkpoints.save(1, state, data=iterator)
            expected = drawn(iterator, 100)
            checkpoints.restore(state, data=again)
        assert drawn(again, 100) == expected, name
    iterator = elastic()
    with sw.Checkpoints(f"{folder}/one") as checkpoints:
        checkpoints.restore(state, data=iterator)
    print("then", drawn(iterator, 1)[0], flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
