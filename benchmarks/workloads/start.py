"""The start of a program: importing, and the first step of a process when JAX's compilation cache is warm.

Every number is of a process of its own, in another order of the ways each round.  Each way has a folder of compiled
programs, which its first process fills; those after it have to find every program there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import WrongResultError, check, numbers_of, table
from benchmarks.measure import Settings
from benchmarks.styles import OURS

__all__ = ["IMPORTS", "child", "start"]

# What a program imports: the verbs of training are all used.
IMPORTS = {
    "flax": "from flax import nnx",
    "statewise": "from flax import nnx; import statewise as sw; sw.plan, sw.State, sw.step, sw.train_step",
}
_TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
VERBS = "`import statewise` and its training verbs"
WAYS = (OURS, "by-hand")
BLOCKS = 200

Numbers = dict[str, Any]


def start(settings: Settings, blocks: int | None = None) -> list[dict[str, Any]]:
    blocks = blocks or (2 if settings.quick else BLOCKS)
    runs = 1 if settings.quick else 5
    imports = _imports(runs)
    cold, warm = _processes(runs, blocks)
    labels = {"statewise": "Statewise", "by-hand": "by hand, flattened"}
    title = f"A second process, {blocks} blocks of width 8: "
    return [
        _table("start_import", "Importing", imports, {"flax": "`from flax import nnx`", "statewise": VERBS}),
        _with_cold(_table("start_first", title + "from the model to the first output", warm["first_s"], labels), cold),
        _with_cold(
            _table("start_whole", title + "from building the model to the first output", warm["whole_s"], labels), cold
        ),
    ]


def _imports(runs: int) -> dict[str, list[float]]:
    """Seconds of each import, in another order each round; the first one reads files that later ones find in memory."""
    imports: dict[str, list[float]] = {key: [] for key in IMPORTS}
    for number in range(runs + 1):
        for key in random.sample(list(IMPORTS), len(IMPORTS)):
            seconds = float(_run("-c", _TIMED.format(IMPORTS[key])))
            if number:
                imports[key].append(seconds)
    return imports


def _processes(runs: int, blocks: int) -> tuple[dict[str, Numbers], dict[str, dict[str, list[float]]]]:
    """By way, what a process says that compiles everything; by number and way, what those after it say."""
    cold: dict[str, Numbers] = {}
    warm: dict[str, dict[str, list[float]]] = {number: {way: [] for way in WAYS} for number in ("first_s", "whole_s")}
    losses: list[tuple[str, list[float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs + 1):
            for way in random.sample(WAYS, len(WAYS)):
                cache = Path(folder) / way
                before = _programs(cache)
                said = _run("-m", "benchmarks.workloads.start", way, str(blocks), str(cache))
                one = json.loads(said.splitlines()[-1])
                losses.append((way, one["losses"]))
                if not number:
                    cold[way] = one
                    continue
                if not before or _programs(cache) != before:
                    raise WrongResultError(f"{way}: a process with a warm cache compiled something")
                for name, seconds in warm.items():
                    seconds[way].append(one[name])
    for way, found in losses:
        check(way, found, cold[OURS]["losses"], 1e-4)
    return {way: cold[way] for way in WAYS}, warm


def _programs(cache: Path) -> set[str]:
    """What the compilation cache holds; the times of its last use are in files of their own."""
    return {path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith("-atime")}


def _with_cold(found: dict[str, Any], cold: Mapping[str, Numbers]) -> dict[str, Any]:
    """The table with a row for each way's process that filled the cache: one sample."""
    rows = {row["key"]: row for row in found["rows"]}
    number = "first_s" if found["key"] == "start_first" else "whole_s"
    for way, one in cold.items():
        seconds = one[number]
        times = {"median_s": seconds, "q1_s": seconds, "q3_s": seconds, "samples": 1}
        ratio = seconds / rows[OURS]["median_s"]
        label = f"{rows[way]['label']}, the cache empty (one process)"
        found["rows"].append({"key": f"{way}-cold", "label": label, **times, "ratio": ratio})
    return found


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
    losses += [float(call()) for _ in range(2)]
    return {"first_s": done - made, "whole_s": done - began, "losses": losses}


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), sys.argv[3], time.perf_counter())))
