"""Run as a program by the tests: an evaluator, which looks at a run's directory whenever it is asked by a line.

`python poll_steps.py DIRECTORY`: answers with JSON: the steps, the newest, and the number in that one's state.
"""

from __future__ import annotations

import json
import sys

import statewise as sw
from checkpoint_models import number_of, numbered

if __name__ == "__main__":
    with sw.Checkpoints(sys.argv[1]) as checkpoints:
        print(flush=True)
        for _ in sys.stdin:
            steps, latest = checkpoints.steps, checkpoints.latest
            number = number_of(checkpoints.restore(numbered(0)).state) if steps else None
            print(json.dumps([steps, latest, number]), flush=True)
