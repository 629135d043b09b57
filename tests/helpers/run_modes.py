"""Runs the suite under each of Flax's modes, on each interpreter that is given, and writes the table of results.

`make test-modes` calls it with the newest and the oldest environment.  Each run is a pytest process of its own, with
Flax's environment variables set (tests/helpers/modes.py).  The table is printed, and with `--write` put into
docs/compatibility.md between its markers, together with why tests were skipped.

All modes together take hours.  What is written is also kept in tests/modes.json, each result with its commit, and
`--resume` goes on from there, and runs again what failed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.machine import commit

from modes import MODES, ROOT, VARIABLE

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "compatibility.md"
KEPT = ROOT / "tests" / "modes.json"
BEGIN, END = "<!-- modes: written by `make test-modes` -->", "<!-- modes: end -->"

# All that has to do with models: without the rules of the repository, the types and the pages.
PARTS = (
    *("common", "names", "filters", "plan", "sharding", "core", "step", "inspect", "checkpoint", "report", "cli"),
    *("equivalence", "examples", "laws"),
)
# What `.ci/run` runs of them: what fits into the time of CI, every verb in it.
STATE = "core/test_state.py::test_"
ROUNDTRIP = "checkpoint/test_roundtrip.py::test_"
TRAINING = "equivalence/test_models.py::test_training_gives_the_numbers_of_nnx_jit_and_nnx_optimizer"
FIXED = (
    "laws/test_modes.py::test_a_mode_is_set_as_its_name_says",
    "laws/test_modes.py::test_flax_alone_refuses",
    "filters/test_filters.py",
    "plan/test_intern.py",
    "plan/test_leaf_specs.py",
    "core/test_model_io.py",
    "core/test_other_plans.py::test_a_state_fits_plans_of_all_forms",
    f"{STATE}keys_are_kind_and_path",
    f"{STATE}a_state_maps_kinds_to_their_parts",
    f"{STATE}a_spent_kind_is_seen",
    f"{STATE}one_set_of_weights_serves_several_caches",
    f"{STATE}one_array_in_two_leaves",
    f"{STATE}every_misfit_is_listed",
    f"{STATE}jax_takes_a_state_as_it_is",
    f"{STATE}a_cast_state_is_of_a_plan_of_its_own",
    "step/test_step.py",
    f"{TRAINING}[batchnorm_dropout]",
    f"{TRAINING}[tied_embedding]",
    f"{ROUNDTRIP}a_state_with_its_optimizer_comes_back",
    f"{ROUNDTRIP}every_dtype_comes_back",
    f"{ROUNDTRIP}several_objects_come_back",
    f"{ROUNDTRIP}tied_leaves_stay_tied",
    f"{ROUNDTRIP}an_ephemeral_kind_is_not_saved_and_starts_anew",
)
# What no run has, by marker, in the words of the table.
LEFT_OUT = {
    "slow": "take minutes",
    "heavy": "take more than 20 seconds of CPU time, or need a server",
    "torch": "need torch",
    "docs": "run the examples of the documentation",
    "processes": "start processes",
    "browser": "need a browser",
}

# Asked of each interpreter: the versions, and which modes its Flax has.
QUESTION = """
import json, platform, sys
sys.path.insert(0, sys.argv[1])
import modes
from importlib.metadata import version
print(json.dumps({
    "name": f"flax {version('flax')}, jax {version('jax')}, Python {platform.python_version()}",
    "modes": [name for name, mode in modes.MODES.items() if mode.exists],
}))
"""


# `statewise demo` with the defaults of a mode that has no environment variable, or under the Flax that is simulated.
DEMO = """
import json, sys
sys.path.append(sys.argv[2])
import plain_states
from flax import nnx
from statewise.cli import main
if plain_states.IS_DICT:
    plain_states.install()
defaults = json.loads(sys.argv[1])
if defaults:
    nnx.var_defaults(**defaults)
sys.exit(main(["demo"]))
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run gave: how many tests passed, failed, and were skipped, by reason, and of which commit they were."""

    passed: int
    failed: int
    skipped: Mapping[str, int]
    seconds: float
    demo: bool | None = None
    commit: str | None = None

    @property
    def fine(self) -> bool:
        """Returns whether nothing failed."""
        return not self.failed and self.demo is not False

    def __str__(self) -> str:
        failed = f", **{self.failed} failed**" if self.failed else ""
        demo = {None: "", True: "; the demo passes", False: "; **the demo fails**"}[self.demo]
        return f"{self.passed} passed, {sum(self.skipped.values())} skipped{failed}{demo}"


def asked(python: str) -> dict[str, Any]:
    """Returns what an interpreter has: its name for the table, and the modes."""
    out = subprocess.run([python, "-c", QUESTION, str(HERE)], check=True, capture_output=True, text=True).stdout
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def demo(python: str, mode: str) -> bool:
    """Runs `statewise demo` under one mode; returns whether every promise that it checks holds."""
    environment = {**os.environ, **MODES[mode].environment, "JAX_PLATFORMS": "cpu"}
    command = [python, "-c", DEMO, json.dumps(dict(MODES[mode].defaults)), str(HERE)]
    with tempfile.TemporaryDirectory() as folder:  # it writes its checkpoints where it runs
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        print(f"--- the demo, {mode}, {python}\n{process.stdout[-3000:]}{process.stderr[-3000:]}", flush=True)
    return process.returncode == 0


def run(python: str, mode: str, files: Sequence[str], workers: int, with_demo: bool, quick: float) -> Result:
    """Runs test files under one mode in a process of its own, and the demo in another."""
    started, code = time.monotonic(), commit("src", "tests", ":!tests/modes.json")
    environment = {**os.environ, **MODES[mode].environment, VARIABLE: mode}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")  # most programs are the same in every mode
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        environment["STATEWISE_QUICK_TIMES"] = f"{folder}/times.json"
        command = [
            python,
            "-m",
            "pytest",
            "-q",
            "-m",
            " and ".join(f"not {marker}" for marker in LEFT_OUT),
            f"--junitxml={xml}",
            "-o",
            "junit_logging=no",
        ]
        command += ["--hypothesis-profile=quick", "-p", "no:cacheprovider", *([f"--quick={quick}"] if quick else [])]
        command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        process = subprocess.run(
            [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if not xml.exists():
            raise SystemExit(f"{' '.join(command)} wrote no results:\n{process.stdout[-4000:]}{process.stderr[-4000:]}")
        result = read(xml, time.monotonic() - started)
    if process.returncode or result.failed:
        print(f"--- {mode}, {python}\n{process.stdout[-20000:]}", flush=True)
    if process.returncode and not result.failed:  # an error outside of any test
        result = dataclasses.replace(result, failed=1)
    return dataclasses.replace(result, commit=code, demo=demo(python, mode) if with_demo else None)


def read(xml: Path, seconds: float) -> Result:
    """Reads pytest's results."""
    passed = failed = 0
    skipped: collections.Counter[str] = collections.Counter()
    for case in ET.parse(xml).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skip is not None:
            skipped[_reason(case, skip)] += 1
        else:
            passed += 1
    return Result(passed, failed, dict(skipped), seconds)


def _reason(case: ET.Element, skip: ET.Element) -> str:
    """Returns why a test was skipped.  Of a file that is skipped as a whole pytest has one case, and says why in it."""
    message = skip.get("message", "")
    if message != "collection skipped":
        return message
    reason = ast.literal_eval(skip.text or "('', 0, '')")[-1].removeprefix("Skipped: ")
    return f"all tests of {case.get('name')}, counted as one: {reason}"


def table(results: Mapping[tuple[str, str], Result | None], files: Sequence[str], quick: float = 0.0) -> str:
    """Returns the table of modes by versions, and below it why tests were skipped, as Markdown."""
    names = list(dict.fromkeys(name for _, name in results))
    lines = ["| mode | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for mode, each in MODES.items():
        cells = [str(results.get((mode, name), "not run") or "this Flax does not have it") for name in names]
        lines.append(f"| {each.about} | " + " | ".join(cells) + " |")
    without = [*LEFT_OUT.values(), *([f"take more than {quick:g} seconds"] if quick else [])]
    lines += ["", "What ran: " + ", ".join(f"`{file}`" for file in files) + ".", ""]
    lines += [f"What did not run: tests that {', that '.join(without[:-1])}, or that {without[-1]}.", ""]
    commits: dict[str, list[str]] = {}
    for (mode, name), result in results.items():
        if result and result.commit:
            commits.setdefault(result.commit, []).append(f"{mode} on {name.partition(',')[0]}")
    if commits:
        each_of = [code if len(commits) == 1 else f"{code} ({', '.join(runs)})" for code, runs in commits.items()]
        lines += [f"Commit: {'; '.join(each_of)}.", ""]
    reasons: dict[str, list[str]] = {}
    for (mode, name), result in results.items():
        for reason, count in sorted((result.skipped if result else {}).items()):
            reasons.setdefault(reason, []).append(f"{count} in mode {mode} on {name.partition(',')[0]}")
    lines += ["Why tests were skipped:", ""]
    lines += [f"- {_escaped(reason)}: {'; '.join(counts)}." for reason, counts in reasons.items()]
    return "\n".join(lines) + "\n"


def _escaped(reason: str) -> str:
    return re.sub(r"\s+", " ", reason).replace("|", "\\|").replace("<", "&lt;")


def kept(files: Sequence[str], quick: float) -> dict[tuple[str, str], Result | None]:
    """Returns the results of earlier calls on the same tests."""
    known = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    if (known.get("files"), known.get("quick")) != (list(files), quick):
        return {}
    return {(mode, name): Result(**each) if each else None for mode, name, each in known["results"]}


def keep(files: Sequence[str], quick: float, results: Mapping[tuple[str, str], Result | None]) -> None:
    """Keeps results for the next call."""
    each = [(*key, dataclasses.asdict(result) if result else None) for key, result in results.items()]
    KEPT.write_text(json.dumps({"files": files, "quick": quick, "results": each}, indent=1) + "\n", encoding="utf-8")


def write(text: str, page: Path = PAGE) -> None:
    """Puts the table between the page's markers."""
    content = page.read_text(encoding="utf-8")
    before, _, rest = content.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no markers: {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; returns 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", required=True, help="an interpreter with the test extras")
    parser.add_argument("--mode", action="append", choices=tuple(MODES), help="a mode; all of them without it")
    parser.add_argument("--fixed", action="store_true", help="the small part that CI runs")
    parser.add_argument("--demo", action="store_true", help="also run the demo under each mode")
    parser.add_argument("--quick", type=float, default=0.0, help="leave out tests that take more than these seconds")
    parser.add_argument("--together", action="store_true", help="run all interpreters at the same time")
    parser.add_argument("--workers", type=int, default=1, help="of pytest-xdist, in each run")
    parser.add_argument("--resume", action="store_true", help="run only what passed in no earlier call with --write")
    parser.add_argument("--write", action="store_true", help="put the table into docs/compatibility.md")
    parser.add_argument("files", nargs="*", help="test files or directories; the parts that depend on modes without it")
    given = parser.parse_args(arguments)
    files = given.files or [f"tests/{file}" for file in (FIXED if given.fixed else PARTS)]
    # By the versions: where there is one Python only, both ends are the same.
    answers = {answer["name"]: (python, answer) for python in given.python for answer in [asked(python)]}
    results = kept(files, given.quick) if given.resume else {}
    fresh: list[Result] = []

    def written() -> str:
        text = table(results, files, given.quick)
        if given.write:
            keep(files, given.quick, results)
            write(text)
        return text

    with contextlib.ExitStack() as stack:
        threads = len(answers) if given.together else 1
        pools = [stack.enter_context(concurrent.futures.ThreadPoolExecutor(1)) for _ in range(threads)]
        runs = {}
        for mode in given.mode or MODES:
            for number, (name, (python, answer)) in enumerate(answers.items()):
                if mode not in answer["modes"]:
                    results[mode, name] = None
                elif not ((known := results.get((mode, name))) and known.fine):
                    pool = pools[number % threads]
                    runs[pool.submit(run, python, mode, files, given.workers, given.demo, given.quick)] = (mode, name)
        for done in concurrent.futures.as_completed(runs):
            results[runs[done]] = result = done.result()
            fresh.append(result)
            written()
            print(f"{' on '.join(runs[done])}: {result} in {result.seconds:.0f} s", flush=True)
    print(written())  # also if nothing was left to run
    return int(not all(result.fine for result in fresh))


if __name__ == "__main__":
    sys.exit(main())
