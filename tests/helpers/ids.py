"""Ids of parametrized tests that are the same in every process, as pytest-xdist needs them."""

from __future__ import annotations

import re
from typing import Any


def named(value: Any) -> str:
    """What a value prints as, without its address; a set in order."""
    if isinstance(value, set):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
