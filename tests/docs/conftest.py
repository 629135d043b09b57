"""The site, built once for all tests of a session, whichever worker asks first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import browsers
from once import made_once

ROOT = Path(__file__).parents[2]

browser = browsers.browser  # a fixture


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once("site", build, tmp_path_factory)
