"""What `make quick` leaves out beside directories: tests that took long in their last run here.

`pytest --quick=0.2` leaves out what took more than 0.2 seconds.  Times are in `.quick_times.json`, which git ignores. A
first run has none: it goes by `slow_tests.txt`, the mean time of each test function over its cases, compiled as quick
runs compile (`python tests/helpers/quick.py RESULTS.xml` brings it up to date from the results of `pytest
--junitxml=RESULTS.xml`).  A time that was not measured again fades, and its test comes back.  The rules of the
repository, in `tests/` itself, always run.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Each mode of Flax runs the same tests: run_modes.py gives a place where there are no times of earlier runs.
FILE = Path(os.environ.get("STATEWISE_QUICK_TIMES", TESTS.parent / ".quick_times.json"))
SLOW = Path(__file__).parent / "slow_tests.txt"
LISTED = 0.2  # seconds: the functions in `slow_tests.txt` take longer
FADES = 0.8  # by this factor in each run that leaves the test out


class Times:
    """A plugin of a quick run: leaves out slow tests, and keeps the times of the others.

    Args:
      limit: in seconds; a test that took longer is left out.
      file: the times of earlier runs.
      slow: the times of functions in a complete run.
    """

    def __init__(self, limit: float, file: Path = FILE, slow: Path = SLOW) -> None:
        self.limit, self.file = limit, file
        self.functions = listed(slow)
        self.known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.measured: dict[str, float] = {}

    def is_slow(self, name: str) -> bool:
        """Returns whether a test took longer than the limit when it was last measured."""
        return self.known.get(name, self.functions.get(name.partition("[")[0], 0.0)) > self.limit

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects slow tests; pytest's summary counts them."""
        slow = [item for item in items if self.is_slow(item.nodeid) and item.path.parent != TESTS]
        for item in slow:
            self.known.setdefault(item.nodeid, self.functions.get(item.nodeid.partition("[")[0], 0.0))
        if slow:
            config.hook.pytest_deselected(items=slow)
            left_out = set(slow)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds up set-up, call and teardown."""
        self.measured[report.nodeid] = self.measured.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Writes the times, in the process that sees all of them."""
        if not hasattr(session.config, "workerinput") and self.measured:
            faded = {name: time * FADES if self.is_slow(name) else time for name, time in self.known.items()}
            times = {name: round(time, 3) for name, time in sorted((faded | self.measured).items())}
            self.file.write_text(json.dumps(times, indent=0), encoding="utf-8")


def mean_times(results: Path) -> dict[str, float]:
    """Returns the mean seconds of each test function over its cases, from JUnit's XML."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for case in ET.parse(results).getroot().iter("testcase"):
        # JUnit gives a dotted name: the file, and the classes in it.
        parts = case.get("classname", "").split(".")
        depth = max((depth for depth in range(1, len(parts) + 1) if _file(parts[:depth]).exists()), default=0)
        if depth:
            file = _file(parts[:depth]).relative_to(TESTS.parent)
            function = case.get("name", "").partition("[")[0]
            times["::".join([str(file), *parts[depth:], function])].append(float(case.get("time", 0)))
    return {name: sum(seconds) / len(seconds) for name, seconds in times.items()}


def listed(slow: Path = SLOW) -> dict[str, float]:
    """Returns the times in the list, by function."""
    lines = (line.partition(" ") for line in slow.read_text(encoding="utf-8").splitlines())
    return {name: float(seconds) for seconds, _, name in lines}


def update(results: Path, slow: Path = SLOW) -> None:
    """Puts the times of a run into the list.  Functions that did not run keep theirs, as long as they exist."""
    kept = {name: seconds for name, seconds in listed(slow).items() if _exists(name)}
    times = {name: seconds for name, seconds in (kept | mean_times(results)).items() if seconds > LISTED}
    slow.write_text("".join(f"{times[name]:.1f} {name}\n" for name in sorted(times)), encoding="utf-8")


def _exists(name: str) -> bool:
    file, function = TESTS.parent / name.partition("::")[0], name.rpartition("::")[2]
    return file.exists() and f"def {function}(" in file.read_text(encoding="utf-8")


def _file(parts: Sequence[str]) -> Path:
    return TESTS.parent.joinpath(*parts).with_suffix(".py")


if __name__ == "__main__":
    update(Path(sys.argv[1]))
