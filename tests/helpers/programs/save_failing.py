"""One of several processes that save while one of them fails, and then dies; run by test_save_together.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"

import errno
from collections.abc import Callable
from typing import NoReturn

import jax

import statewise as sw
from programs.save_together import make, spread
from statewise._src.checkpoint.orbax import state_writer


def fails(_: object) -> NoReturn:
    """Is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def dies(_: object) -> NoReturn:
    """Ends the process as a signal does."""
    os._exit(9)


def said(save: Callable[[], None]) -> str:
    """What a save says when it fails."""
    try:
        save()
    except sw.SaveError as error:
        return error.message
    return "nothing"


def main(number: int, count: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    state = spread(sw.plan(make()).take(make()))
    sw.save(f"{folder}/first", state)
    for name, what in (("full", fails), ("dead", dies)):
        if number == count - 1:
            state_writer.StateWriter.write = what  # type: ignore[method-assign]
        print(name, said(lambda name=name: sw.save(f"{folder}/{name}", state)), flush=True)
    os._exit(0)  # JAX would wait for the process that has ended


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
