"""Runs a command until the input of this program ends, as it does when the process that started it is gone."""

from __future__ import annotations

import subprocess
import sys

with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL) as process:
    sys.stdin.read()
    process.kill()
