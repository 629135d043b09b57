"""What `make quick` leaves out beside directories: tests that took more than a second in its last run here.

Times are kept in `.quick_times.json`, which git ignores.  A first run has none and runs everything; it also fills JAX's
compilation cache, so its times are high.  So a time that was not measured again fades, and its test comes back.
The rules of the repository, in `tests/` itself, always run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILE = TESTS.parent / ".quick_times.json"
LIMIT = 1.0  # seconds
FADES = 0.8  # by this factor in each run that leaves the test out


class Times:
    """A plugin of a quick run: leaves out slow tests, and keeps the times of the others."""

    def __init__(self, file: Path = FILE) -> None:
        self.file = file
        try:
            self.known: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.known = {}
        self.measured: dict[str, float] = {}

    def is_slow(self, name: str) -> bool:
        """Returns whether a test took more than `LIMIT` when it was last measured."""
        return self.known.get(name, 0.0) > LIMIT

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects slow tests; pytest's summary counts them."""
        slow = [item for item in items if self.is_slow(item.nodeid) and item.path.parent != TESTS]
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
