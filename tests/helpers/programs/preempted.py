"""Run by tests that send it SIGTERM: counts steps, until a signal says that it is enough.

`python preempted.py NUMBER COUNT PORT FOLDER HOW`: by a flag that a handler sets (`flag`), or by what JAX's processes
agree on, through Orbax's first interface or its newer one (`first`, `new`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import orbax.checkpoint as ocp

import statewise as sw
from checkpoint_models import numbered
from iterators import Counting


def main(number: int, count: int, port: str, folder: str, how: str) -> None:
    stop = threading.Event()
    if how == "flag":
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    else:
        jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    iterator, options = Counting(), ocp.v1.training.Checkpointer if how == "new" else None
    with sw.Checkpoints(folder, every=1000, options=options) as checkpoints:
        for step in range(1, 100_000):
            next(iterator)
            is_last = stop.is_set()
            saved = checkpoints.save(step, numbered(step), data=iterator, force=is_last)
            print("step", step, flush=True)
            if is_last or ocp.multihost.reached_preemption(step):
                print("ended at", step, saved, flush=True)
                break
            time.sleep(0.01)
    if how != "flag":
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
