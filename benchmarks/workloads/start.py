"""The start of a program: importing, and the first step of a process when JAX's compilation cache is warm.

Every number is of a process of its own.  The ways alternate, and share one folder of compiled programs, which a run
that is not counted has filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.compare import check, numbers_of, table
from benchmarks.measure import Settings
from benchmarks.styles import OURS

__all__ = ["IMPORTS", "child", "start"]

# What a program imports: the verbs of training are all used.
IMPORTS = {
    "flax": "from flax import nnx",
    "statewise": "from flax import nnx; import statewise as sw; sw.plan, sw.State, sw.step, sw.train_step",
}
_TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
BLOCKS = 200


def start(settings: Settings, blocks: int | None = None) -> list[dict[str, Any]]:
    blocks = blocks or (2 if settings.quick else BLOCKS)
    runs = 1 if settings.quick else 5
    imports: dict[str, list[float]] = {key: [] for key in IMPORTS}
    for _ in range(runs):
        for key, code in IMPORTS.items():
            imports[key].append(float(_run("-c", _TIMED.format(code))))
    ways: dict[str, list[dict[str, Any]]] = {"statewise": [], "by-hand": []}
    with tempfile.TemporaryDirectory() as cache:
        for number in range(runs + 1):
            for way, found in ways.items():
                one = json.loads(_run("-m", "benchmarks.workloads.start", way, str(blocks), cache).splitlines()[-1])
                if number:
                    found.append(one)
    check("by-hand", ways["by-hand"][0]["losses"], ways["statewise"][0]["losses"], 1e-4)
    labels = {"statewise": "Statewise", "by-hand": "by hand, flattened"}
    first = {way: [one["first_s"] for one in found] for way, found in ways.items()}
    whole = {way: [one["whole_s"] for one in found] for way, found in ways.items()}
    title = f"A second process, {blocks} blocks of width 8: "
    return [
        _table("start_import", "Importing", imports, {"flax": "`from flax import nnx`", "statewise": "and the verbs"}),
        _table("start_first", title + "from the model to the first output", first, labels),
        _table("start_whole", title + "from building the model to the first output", whole, labels),
    ]


def _table(key: str, title: str, samples: Mapping[str, Sequence[float]], labels: Mapping[str, str]) -> dict[str, Any]:
    rows = [{"key": name, "label": labels[name], **row} for name, row in numbers_of(samples, OURS).items()]
    return table(key, title, rows, per="process", reference=OURS)


def _run(*arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True)
    return done.stdout


def child(way: str, blocks: int, cache: str, began: float) -> dict[str, Any]:
    """Makes the first step of a process: seconds from the model, and from building it, to its output."""
    import jax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    from benchmarks.styles import STYLES
    from benchmarks.workloads.train import many_small_case

    case = many_small_case(blocks)
    model = case.build()
    jax.block_until_ready(list(jax.tree.leaves(model)))
    made = time.perf_counter()
    call = case.loop(STYLES[way](case, model).program)
    losses = [float(jax.block_until_ready(call()))]
    done = time.perf_counter()
    return {"first_s": done - made, "whole_s": done - began, "losses": losses}


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), sys.argv[3], time.perf_counter())))
