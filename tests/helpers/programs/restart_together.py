"""One of several processes that go on with runs in object stores; run by test_store_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import numbered
import statewise as sw
from programs.save_together import assert_same_shards, spread


def go_on(url: str) -> None:
    """Restores the newest step, if there is one, with its metrics; saves the next one."""
    with sw.Checkpoints(url) as checkpoints:
        latest = checkpoints.latest or 0
        if latest:
            back = checkpoints.restore(spread(numbered.state(0)), extra="metrics")
            assert_same_shards(spread(numbered.state(latest)), back.state)
            assert (back.step, back.extra) == (latest, {"metrics": {"loss": latest / 4}})
        assert checkpoints.save(latest + 1, spread(numbered.state(latest + 1)), metrics={"loss": (latest + 1) / 4})


def main(number: int, count: int, port: str, urls: list[str]) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    for url in urls:
        go_on(url)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[5:])
