"""The ```python blocks of a Markdown file."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator

PARSER = doctest.DocTestParser()
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)


def code_blocks(text: str) -> Iterator[tuple[str, int]]:
    """Yields each ```python block that is to be run, dedented, with the line (from 0) its code starts on."""
    for match in FENCE.finditer(text):
        if match["info"].split() == ["python"]:
            indent = len(match["indent"])
            code = "".join(line[indent:] for line in match["code"].splitlines(keepends=True))
            yield code, text.count("\n", 0, match.start("code"))
