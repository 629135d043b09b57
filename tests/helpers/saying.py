"""What programs say that are killed while they speak."""

from __future__ import annotations

import os


def say(text: str) -> None:
    """Writes a line to standard output in one call: one that `print` writes in parts may end in the middle."""
    os.write(1, f"{text}\n".encode())
