"""Saves to a store that never answers, and reads from it; prints what is said.  The last argument is a URL."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numbered
import statewise as sw


def said(verb: Callable[[], object]) -> str:
    try:
        verb()
    except sw.StatewiseError as error:
        return f"{type(error).__name__}: {error.message}"
    return "nothing"


if __name__ == "__main__":
    path = sys.argv[-1]
    state = numbered.state(1)
    for verb in (lambda: sw.save(path, state), lambda: sw.inspect(path), lambda: sw.restore(path, state)):
        print(said(verb), flush=True)
